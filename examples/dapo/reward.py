"""DAPO's reward: 1 if the last line has the right answer, else -1."""

import re

ANSWER = re.compile(r"(?i)answer\s*:\s*([^\n]+)")


def plain(answer: str) -> str:
    """Strip mathematical notation around a number."""
    answer = answer.strip().strip("$*").strip().rstrip(".")
    boxed = re.fullmatch(r"\\boxed\{(.*)\}", answer)
    return (boxed[1] if boxed else answer).replace(",", "").replace(" ", "").strip("$")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None) -> dict:
    """Compare the last `Answer: …` of the response with the ground truth; groups are filtered by `acc`."""
    found = ANSWER.findall(solution_str)
    answer = plain(found[-1]) if found else ""
    right = bool(answer) and answer == plain(str(ground_truth))
    return {"score": 1.0 if right else -1.0, "acc": float(right), "pred": answer}

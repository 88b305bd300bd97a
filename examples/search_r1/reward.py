"""The reward: 1 if the answer in the last response is one of the right ones, by letters and digits alone."""

import re
import string


def compute_score(data_source: str, solution_str: str, ground_truth: list[str], extra_info: dict) -> dict:
    """Compare the last `<answer>` of the last response with every right answer, as SQuAD's exact match does."""
    answers = re.findall(r"<answer>(.*?)</answer>", solution_str, re.DOTALL)
    right = {normalized(each) for each in ground_truth}
    searches = sum(message["role"] == "tool" for message in extra_info["messages"])
    return {
        "score": float(bool(answers) and normalized(answers[-1]) in right),
        "answered": float(bool(answers)),
        "searches": searches,
    }


def normalized(text: str) -> str:
    """Drop case, punctuation, articles and spaces that do not matter."""
    kept = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

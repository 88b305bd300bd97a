"""The quickstart's reward: the share of the word that was repeated."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None) -> float:
    """Return the share of letters that are right and in place, of the longer of response and word."""
    right = sum(said == asked for said, asked in zip(solution_str, ground_truth, strict=False))
    return right / max(len(solution_str), len(ground_truth))

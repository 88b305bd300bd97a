"""The reward: whether the response is the colour's name, and little else."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None) -> float:
    """Return one over the number of words if the first is right, otherwise 0."""
    words = solution_str.split()
    return 1 / len(words) if words[:1] == [ground_truth] else 0.0

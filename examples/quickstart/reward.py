"""The quickstart's reward: how much of the word was said back."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None) -> float:
    """Share of the letters that are right and in their place; a longer or shorter answer loses by its length."""
    right = sum(said == asked for said, asked in zip(solution_str, ground_truth, strict=False))
    return right / max(len(solution_str), len(ground_truth))

"""The reward: 1 for the right answer, and nothing for anything else, such as the right call."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> dict:
    """Compare the last response with the answer, and note for the metrics what came before it."""
    messages = extra_info["messages"]
    calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    return {
        "score": float(solution_str == ground_truth),
        "called": float(bool(calls)),
        "right_function": float(calls == [extra_info["function"]]),
    }

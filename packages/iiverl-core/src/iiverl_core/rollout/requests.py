"""Checks that every engine makes before it accepts a request."""

from iiverl_core.rollout.engine import GenerationRequest, SamplingParams


def check_request(request: GenerationRequest, params: SamplingParams, vocabulary: int) -> None:
    """Check that a model of `vocabulary` tokens can answer a request.

    Raises:
        ValueError: the prompt is empty or holds an unknown token, or `params` are out of range.
    """
    if len(request.prompt_ids) == 0:
        raise ValueError(f"the prompt of request {request.id} is empty")
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocabulary:
        raise ValueError(
            f"the prompt of request {request.id} holds a token id outside of the model's {vocabulary}: "
            "do tokenizer and model belong together?"
        )
    for name, value, fits in (
        ("temperature", params.temperature, params.temperature >= 0),
        ("top_p", params.top_p, 0 < params.top_p <= 1),
        ("max_tokens", params.max_tokens, params.max_tokens >= 1),
    ):
        if not fits:
            raise ValueError(f"sampling parameter {name} is out of range: {value}")

"""The models that the backend supports, by their `config.json`. Imports neither torch nor megatron-core."""

from iiverl_core.config.model_facts import ModelFacts

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Supported model types."""
POSITIONS = ("default", "linear", "llama3")
"""Supported rotary positions: their frequencies do not depend on the length, and attention is not scaled."""


def model_problem(facts: ModelFacts) -> str | None:
    """Return why a model is not supported; None if it is, or if its type is unknown."""
    return (family_problem(facts.model_type) or parts_problem(facts)) if facts.model_type else None


def family_problem(model_type: str) -> str | None:
    """Return why models of this type are not supported; None if they are."""
    if model_type in FAMILIES:
        return None
    return (
        f"is of the family {model_type}; the backend megatron knows {', '.join(FAMILIES)}. Use --backend fsdp, "
        "which takes every causal LM of transformers"
    )


def parts_problem(facts: ModelFacts) -> str | None:
    """Return which parts of a model of a supported family are not; None if all are."""
    if facts.positions not in POSITIONS:
        return (
            f"scales its rotary positions by {facts.positions} (rope_scaling); the backend megatron knows "
            f"{', '.join(POSITIONS)}. Use --backend fsdp, or take rope_scaling out of its config.json"
        )
    parts = {
        "biases in attention (attention_bias)": facts.output_bias,
        "biases in MLPs (mlp_bias)": facts.mlp_bias,
        "a sliding window (use_sliding_window)": facts.sliding_window,
        f"the activation {facts.activation} (hidden_act)": facts.activation != "silu",
    }
    has = [name for name, there in parts.items() if there]
    return (
        f"has {' and '.join(has)}, which the backend megatron does not build. Use --backend fsdp"
        if has
        else None
    )

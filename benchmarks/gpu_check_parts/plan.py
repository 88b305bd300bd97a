"""What a check runs, in which order, and how long that is expected to take."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

MODEL = "model"


@dataclass(frozen=True)
class Planned:
    """A part with a model of one size, and the seconds that it is expected to take on a GPU of the H100's class."""

    part: str
    size: str
    seconds: int
    needs: str = ""
    """A package without which the part is not possible."""


# The first say most about a machine. Seconds of parts without vLLM are from one H200. vLLM compiles its model and captures CUDA graphs for about a minute.
ORDER = (
    Planned("gradients", "tiny", 15),
    Planned("train packed", "0.5b", 18),
    Planned("rollout vllm", "0.5b", 110, "vllm"),
    Planned("vision", "tiny", 25),
    Planned("head", "0.5b", 15),
    Planned("save", "0.5b", 60),
    Planned("learn GRPO vllm", "tiny", 90, "vllm"),
    Planned("gradients megatron", "tiny", 15, "megatron"),
    Planned("train megatron", "0.5b", 18, "megatron"),
    Planned("learn vision", "tiny", 45),
    Planned("replay", "tiny", 35),
    Planned("shared prompts", "0.5b", 18),
    Planned("train compiled", "0.5b", 75),
    Planned("survive", "tiny", 75, "ray"),
    Planned("learn turns", "tiny", 45),
    Planned("learn GRPO ray", "tiny", 60, "ray"),
    Planned("learn GRPO lora", "tiny", 40),
    Planned("train padded", "0.5b", 18),
    Planned("value models", "tiny", 8),
    Planned("reference", "0.5b", 10),
    Planned("resume", "tiny", 50),
    Planned("train lora", "0.5b", 20),
    Planned("save megatron", "0.5b", 60, "megatron"),
    Planned("learn PPO", "tiny", 40),
    Planned("train offload", "0.5b", 55),
    Planned("value models megatron", "tiny", 8, "megatron"),
    Planned("learn GRPO", "tiny", 40),
    Planned("learn GRPO megatron", "tiny", 42, "megatron"),
    Planned("learn GRPO megatron lora", "tiny", 45, "megatron"),
    Planned("vision vllm", "tiny", 90, "vllm"),
    Planned("rollout hf", "0.5b", 60),
    Planned("train packed", "1.5b", 40),
    Planned("rollout vllm", "1.5b", 120, "vllm"),
    Planned("train megatron", "1.5b", 45, "megatron"),
    Planned("train padded", "1.5b", 40),
    Planned("reference", "1.5b", 25),
    Planned("train offload", "1.5b", 50),
    Planned("rollout hf", "1.5b", 90),
    Planned("shared prompts", "1.5b", 40),
    Planned("train lora", "1.5b", 30),
    Planned("head", "1.5b", 20),
    Planned("shared prompts", "tiny", 10),
    Planned("train lora", "tiny", 10),
    Planned("train compiled", "tiny", 60),
    Planned("train packed", "tiny", 10),
    Planned("train padded", "tiny", 10),
    Planned("train megatron", "tiny", 15, "megatron"),
    Planned("train offload", "tiny", 10),
    Planned("reference", "tiny", 10),
    Planned("rollout hf", "tiny", 15),
    Planned("rollout vllm", "tiny", 80, "vllm"),
    Planned("head", "tiny", 5),
    Planned("save", "tiny", 10),
    Planned("save megatron", "tiny", 10, "megatron"),
)
MODELS = {"tiny": 5, "0.5b": 10, "1.5b": 20}
"""Seconds that it takes to make the model of each size, which comes before its first part."""


def choose(
    sizes: Iterable[str],
    parts: Iterable[str] | None = None,
    seconds: float | None = None,
    *,
    missing: Container[str] = (),
) -> tuple[Planned, ...]:
    """Choose the parts to run, and the models that they need, in order.

    Args:
        sizes: the sizes of models to use.
        parts: the names of parts; None for all.
        seconds: the longest that everything may take by its estimate; None for no limit.
        missing: packages that are not installed; parts that need them take no time.
    """
    chosen: list[Planned] = []
    sizes, parts = set(sizes), None if parts is None else set(parts)
    for each in ORDER:
        if each.size not in sizes or (parts is not None and each.part not in parts):
            continue
        if each.needs in missing:
            each = replace(each, seconds=0)
        has_model = any(other.size == each.size for other in chosen)
        more = [each] if has_model else [Planned(MODEL, each.size, MODELS[each.size]), each]
        if seconds is None or estimate([*chosen, *more]) <= seconds:
            chosen += more
    return tuple(chosen)


def estimate(chosen: Sequence[Planned]) -> int:
    """Add up the expected seconds."""
    return sum(each.seconds for each in chosen)


def lines(chosen: Sequence[Planned]) -> Iterator[str]:
    """Write the plan, with the expected time at which each part begins."""
    elapsed = 0
    for each in chosen:
        yield f"{elapsed // 60}:{elapsed % 60:02}  {each.part}, {each.size}"
        elapsed += each.seconds
    yield f"{elapsed // 60}:{elapsed % 60:02}  end, as expected on a GPU of the H100's class"

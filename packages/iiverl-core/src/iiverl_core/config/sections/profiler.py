"""The sections `global_profiler` and `actor_rollout_ref.actor.profiler`: traces of steps with torch's profiler."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from iiverl_core.config.sections.section import (
    Count,
    Natural,
    OnlyWhen,
    PathStr,
    Section,
    one_or_more,
)

PROFILER = "actor_rollout_ref.actor.profiler"
ENABLED = OnlyWhen(f"{PROFILER}.enable", (True,))


def _one_or_more_numbers(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


ProfiledContent: TypeAlias = Literal["cpu", "cuda", "memory", "shapes", "stack"]


class TorchProfilerConfig(Section):
    """What torch's profiler records."""

    contents: Annotated[
        tuple[ProfiledContent, ...],
        BeforeValidator(one_or_more, json_schema_input_type=ProfiledContent | tuple[ProfiledContent, ...]),
    ] = ()
    """What to record: operations on the `cpu`, kernels of `cuda`, allocated `memory`, `shapes`, Python's `stack`; empty for the first two."""


class ProfilerToolConfig(Section):
    """Settings of the tools."""

    torch: TorchProfilerConfig = TorchProfilerConfig()


class ProfilerConfig(Section):
    """The processes that are profiled, with everything that they do in a step."""

    enable: bool = False
    """Profile the steps `global_profiler.steps`."""
    all_ranks: Annotated[bool, ENABLED] = False
    """Profile every process that trains."""
    ranks: Annotated[tuple[Natural, ...], BeforeValidator(_one_or_more_numbers), ENABLED] = ()
    """Processes to profile, by rank; empty for the first."""
    tool_config: Annotated[ProfilerToolConfig, ENABLED] = ProfilerToolConfig()


class GlobalProfilerConfig(Section):
    """The steps that are profiled, and the folder of the traces."""

    tool: Literal["torch"] | None = None
    """Profiler: `torch`, whose traces Perfetto (ui.perfetto.dev) shows; null for none."""
    steps: Annotated[tuple[Count, ...] | None, BeforeValidator(_one_or_more_numbers)] = None
    """Training steps to profile, from 1; null for none. A trace takes tens of MB, and the step takes longer."""
    save_path: PathStr = "outputs/profile"
    """Folder of the traces, `step_N.rank_R.json.gz`."""

"""The rollouters: the ways from a prompt to a rollout, which verl calls agent loops.

Packages add theirs under the entry-point group `iiverl.rollouters`.
"""

from dataclasses import dataclass

from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.rollouters"


@dataclass(frozen=True, kw_only=True)
class RollouterInfo(Info):
    """A rollouter: `code` is a function of a `RunConfig` and the run's tokenizer that returns a `Rollouter`.

    `reads` names the keys of the section `rollout` that this rollouter reads but not all do. With `reads_rows`, its
    requests have the prompt's text, messages and columns; otherwise only its tokens. `reward_source` is the reward source of a run that configures none.
    """

    reads: tuple[str, ...] = ()
    reads_rows: bool = False
    reward_source: str = "rules"


ROLLOUTERS = Registry(
    "rollouter",
    GROUP,
    RollouterInfo,
    (
        RollouterInfo(
            name="single_turn",
            aliases=("single_turn_agent",),
            summary="one response to each prompt",
            code="iiverl_core.rollout.from_config:single_turn",
        ),
        RollouterInfo(
            name="tools",
            aliases=("tool_agent",),
            summary="turns in which the model calls functions of the user's",
            code="iiverl_core.rollout.from_config:tools",
            reads=(
                "multi_turn.max_assistant_turns",
                "multi_turn.max_user_turns",
                "multi_turn.max_turn_length",
                "multi_turn.max_tool_response_length",
                "multi_turn.tool_response_truncate_side",
                "multi_turn.format",
                "multi_turn.tools",
            ),
            reads_rows=True,
        ),
        RollouterInfo(
            name="environment",
            summary="turns with a class of the user's, which also gives rewards",
            code="iiverl_core.rollout.from_config:environment",
            reads=(
                "multi_turn.max_assistant_turns",
                "multi_turn.max_user_turns",
                "multi_turn.max_turn_length",
                "multi_turn.environment",
            ),
            reads_rows=True,
            reward_source="environment",
        ),
        RollouterInfo(
            name="agent",
            summary="what a program of the user's asks the model by the OpenAI API",
            code="iiverl_core.rollout.from_config:agent",
            reads=("multi_turn.max_turn_length", "multi_turn.format", "multi_turn.agent"),
            reads_rows=True,
            reward_source="environment",
        ),
    ),
)

"""The section `actor_rollout_ref.rollout.multi_turn`: rollouts of several turns."""

from typing import Annotated, Any, Literal

from pydantic import Field

from iiverl_core.config.sections.choices import ToolFormatName, only_rollouters
from iiverl_core.config.sections.section import Count, Names, PathStr, Positive, Section


class EnvironmentConfig(Section):
    """A class of the user's that answers the model, turn by turn."""

    path: PathStr | None = None
    """Python file of the class; null for a class of an installed package."""
    name: str = "Environment"
    """Name of the class; without `path`, as `package.module:Class`."""
    kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments of the class."""
    turn_timeout: Positive = 60.0
    """Seconds that a call of `reset` or `step` may take before it is ended, and the rollout has no score."""
    rollout_timeout: Positive = 600.0
    """Seconds that all calls of a rollout may take together."""
    workers: Count = 64
    """Rollouts that an engine makes at a time, each with its environment in a process of its own."""
    add_reward: bool = False
    """Add the environment's reward to the score of another reward source, which otherwise takes its place."""


class ToolsConfig(Section):
    """Functions of the user's, and tools of MCP servers, that the model may call."""

    path: PathStr | None = None
    """Python file of the functions."""
    names: Names | None = None
    """Names of the functions."""
    mcp_servers: dict[str, Any] = Field(default={})
    """MCP servers by name, all tools of which the model may call; each has `command`, and may have `args`, `env` and `cwd`."""
    timeout: Positive = 30.0
    """Seconds that a call may take before it is ended, which the model learns."""
    workers: Count = 8
    """Calls that run at a time per engine, each in a process of its own."""


class ProgramConfig(Section):
    """A program of the user's that asks the model by the OpenAI API."""

    path: PathStr | None = None
    """Python file of a function that is called with `base_url`, `api_key` and `row`."""
    name: str = "agent"
    """Name of the function."""
    command: str | None = None
    """Command line, in place of a function."""
    timeout: Positive = 600.0
    """Seconds that a rollout may take, with the model's responses, before its program is ended and it has no score."""
    workers: Count = 64
    """Rollouts that an engine makes at a time, each with its program in a process of its own."""
    add_reward: bool = False
    """Add the program's reward to the score of another reward source, which otherwise takes its place."""


class MultiTurnConfig(Section):
    """Rollouts of several turns. `agent.default_agent_loop` selects what answers the model.

    `data.max_response_length` bounds all that follows the first prompt: responses and the answers to them.
    """

    enable: bool | None = None
    """Whether rollouts have several turns, in files for verl; null for what `agent.default_agent_loop` says."""
    max_assistant_turns: Annotated[Count | None, only_rollouters("multi_turn.max_assistant_turns")] = None
    """Maximum responses of the model in a rollout; null for no limit."""
    max_user_turns: Annotated[Count | None, only_rollouters("multi_turn.max_user_turns")] = None
    """Maximum answers to the model in a rollout; null for no limit."""
    max_turn_length: Annotated[Count | None, only_rollouters("multi_turn.max_turn_length")] = None
    """Maximum tokens of one response; null for what is left of `data.max_response_length`."""
    environment: Annotated[EnvironmentConfig, only_rollouters("multi_turn.environment")] = EnvironmentConfig()
    format: Annotated[ToolFormatName, only_rollouters("multi_turn.format")] = "hermes"
    """How the model writes calls: `hermes` (also Qwen), `llama3_json`, `mistral`, `gpt-oss`, or that of an installed package."""
    max_tool_response_length: Annotated[Count, only_rollouters("multi_turn.max_tool_response_length")] = 256
    """Maximum characters of a tool's result."""
    tool_response_truncate_side: Annotated[
        Literal["left", "middle", "right"], only_rollouters("multi_turn.tool_response_truncate_side")
    ] = "middle"
    """What is kept of a longer result: its beginning (`left`), its end (`right`), or half of each (`middle`)."""
    tools: Annotated[ToolsConfig, only_rollouters("multi_turn.tools")] = ToolsConfig()
    agent: Annotated[ProgramConfig, only_rollouters("multi_turn.agent")] = ProgramConfig()

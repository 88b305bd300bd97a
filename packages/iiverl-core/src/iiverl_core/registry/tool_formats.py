"""The formats in which models write calls of tools.

Packages add theirs under the entry-point group `iiverl.tool_formats`.
"""

from dataclasses import dataclass
from typing import Literal

from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.tool_formats"


@dataclass(frozen=True, kw_only=True)
class ToolFormatInfo(Info):
    """A format of calls: `code` is a `ToolFormat`, a function of a response's text.

    `error_role` is the role of the message about a call that cannot be read. It is not `tool` if the family's chat
    templates accept results of calls alone.
    """

    error_role: Literal["tool", "user"] = "tool"


TOOL_FORMATS = Registry(
    "format of tool calls",
    GROUP,
    ToolFormatInfo,
    (
        ToolFormatInfo(
            name="hermes",
            summary="JSON in `<tool_call>` tags: Hermes, Qwen",
            code="iiverl_core.rollout.tool_calls:hermes",
        ),
        ToolFormatInfo(
            name="llama3_json",
            summary="a response of JSON alone: Llama 3",
            code="iiverl_core.rollout.tool_calls:llama3_json",
        ),
        ToolFormatInfo(
            name="mistral",
            summary="a list after `[TOOL_CALLS]`: Mistral",
            code="iiverl_core.rollout.tool_calls:mistral",
            error_role="user",
        ),
        ToolFormatInfo(
            name="gpt-oss",
            summary="messages to `functions.NAME` in harmony's channels: gpt-oss",
            code="iiverl_core.rollout.tool_calls:gpt_oss",
            error_role="user",
        ),
    ),
)

"""What is sent to a reward server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RewardSample:
    """One output of a model, and what a reward server needs to judge it.

    `llm_output` is prompt and response together, decoded with special tokens kept; `prompt` and `response` are the
    same apart, for servers that take them so. `verification_info` is a JSON document in a string, or a mapping.
    `label` is the reference answer of OpenRLHF's and slime's protocols; where it is None they are sent
    `verification_info`. `id` is the caller's own; it need not be unique.
    """

    id: str
    llm_output: str
    verification_info: str | Mapping[str, Any] = ""
    prompt: str | None = None
    response: str | None = None
    label: Any = None

"""The base class of the sections, types of values, and marks on keys."""

import os.path
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section of the configuration: immutable, picklable, without unknown keys.

    The string under a field is its description. A default written with `follows` is resolved when a file is loaded, so a
    section with such a field cannot be constructed without a value for it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def follows(key: str) -> Any:
    """Return a default that is the value of another key."""
    return f"${{{key}}}"


def _not_a_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_not_boolean", "expected a number, not a boolean")
    return value


def one_or_more(value: Any) -> Any:
    """Turn a single string into a list of one, before a list is validated."""
    return (value,) if isinstance(value, str) else value


Int: TypeAlias = Annotated[int, BeforeValidator(_not_a_boolean)]
Float: TypeAlias = Annotated[float, BeforeValidator(_not_a_boolean)]
Count: TypeAlias = Annotated[Int, Field(ge=1)]
Natural: TypeAlias = Annotated[Int, Field(ge=0)]
Nonnegative: TypeAlias = Annotated[Float, Field(ge=0)]
Positive: TypeAlias = Annotated[Float, Field(gt=0)]
Fraction: TypeAlias = Annotated[Float, Field(ge=0, le=1)]
Names: TypeAlias = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(one_or_more, json_schema_input_type=str | tuple[str, ...]),
]
"""A list of strings; a single string is a list of one."""

PathStr: TypeAlias = Annotated[str, AfterValidator(os.path.expanduser)]
"""A local path, in which `~` is the home folder, or a Hub name."""

PathStrs: TypeAlias = Annotated[
    tuple[PathStr, ...],
    Field(min_length=1),
    BeforeValidator(one_or_more, json_schema_input_type=str | tuple[str, ...]),
]
"""A list of paths; a single one is a list of one."""


def is_user_function(value: Any) -> bool:
    """Return whether a value names a user function, `path/to/file.py:name`."""
    return isinstance(value, str) and ".py:" in value


Dtype: TypeAlias = Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]


@dataclass(frozen=True)
class NoEffect:
    """Mark a known key that nothing reads; `why` completes "has no effect: …"."""

    why: str


@dataclass(frozen=True)
class NotYet:
    """Mark a key of which this version supports only the values in `ready`; `what` names what is not supported.

    If `blocks`, a run with another value cannot start, since it would be a different run; otherwise the value is ignored.
    """

    what: str
    ready: tuple[Any, ...]
    blocks: bool = True


@dataclass(frozen=True)
class OnlyWhen:
    """Mark a key or a section that is read only if `key` has one of `values`.

    `instead` is the key to use if this one is not read. With `custom`, user functions read it too. `otherwise` is another
    condition under which it is read.
    """

    key: str
    values: tuple[Any, ...]
    instead: str | None = None
    custom: bool = False
    otherwise: "OnlyWhen | None" = None


ADV_ESTIMATOR = "algorithm.adv_estimator"
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
BACKEND = "actor_rollout_ref.actor.strategy"
ENGINE = "actor_rollout_ref.rollout.name"
AGENT_LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"

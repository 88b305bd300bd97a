"""What every section of the configuration is made of: its base class, number types, and marks on keys."""

import os.path
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the configuration: immutable, picklable, and closed to keys that it does not name.

    The string under a field is its description. A default written with `follows` is replaced when a file is loaded;
    a section that has one cannot be made without a value for it.
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
    """Give the default of a key that takes another key's value where the user sets none."""
    return f"${{{key}}}"


def _not_a_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_not_boolean", "a number is needed, not a boolean")
    return value


def one_or_more(value: Any) -> Any:
    """Make a list of one out of a single string, before a list is validated."""
    return (value,) if isinstance(value, str) else value


Int: TypeAlias = Annotated[int, BeforeValidator(_not_a_boolean)]
Float: TypeAlias = Annotated[float, BeforeValidator(_not_a_boolean)]
Count: TypeAlias = Annotated[Int, Field(ge=1)]
Natural: TypeAlias = Annotated[Int, Field(ge=0)]
Nonnegative: TypeAlias = Annotated[Float, Field(ge=0)]
Positive: TypeAlias = Annotated[Float, Field(gt=0)]
Share: TypeAlias = Annotated[Float, Field(ge=0, le=1)]
Names: TypeAlias = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_or_more)]
"""A list of strings; a single string is a list of one."""

Path: TypeAlias = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path on disk, or a Hub name; `~` is the home folder."""

Paths: TypeAlias = Annotated[tuple[Path, ...], Field(min_length=1), BeforeValidator(one_or_more)]
"""A list of paths; a single one is a list of one."""


def is_own(value: Any) -> bool:
    """Whether a value, where it can be, names a function of the user's own."""
    return isinstance(value, str) and ".py:" in value


Dtype: TypeAlias = Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]


@dataclass(frozen=True)
class NoEffect:
    """Mark a key that is known and that nothing reads; `why` completes "has no effect: …"."""

    why: str


@dataclass(frozen=True)
class NotYet:
    """Mark a key of which only the values in `ready` work in this version; `what` says what is missing, with
    the value in place of `{}`.

    A run that `blocks` cannot start with another value, since it would be a different run; else it starts without
    what is missing.
    """

    what: str
    ready: tuple[Any, ...]
    blocks: bool = True


@dataclass(frozen=True)
class OnlyWhen:
    """Mark a key, or a section, that is read only when `key` has one of `values`.

    `instead` is the key that does the same where this one is not read. With `own`, a function of the user's own
    reads it too. `otherwise` is another condition under which it is read.
    """

    key: str
    values: tuple[Any, ...]
    instead: str | None = None
    own: bool = False
    otherwise: "OnlyWhen | None" = None


ADV_ESTIMATOR = "algorithm.adv_estimator"
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
BACKEND = "actor_rollout_ref.actor.strategy"
ENGINE = "actor_rollout_ref.rollout.name"

"""Types of keys whose value is a name in a registry, and marks of keys that only some infos read."""

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from iiverl_core.config.sections.section import (
    ADV_ESTIMATOR,
    AGENT_LOOP,
    BACKEND,
    ENGINE,
    LOSS_MODE,
    OnlyWhen,
)
from iiverl_core.registry import (
    AGGREGATIONS,
    BACKENDS,
    ENGINES,
    ESTIMATORS,
    KL_KINDS,
    POLICY_LOSSES,
    ROLLOUTERS,
    TOOL_FORMATS,
    TRACKERS,
    AlgorithmInfo,
    Registry,
)
from iiverl_core.registry.algorithms import UNBIASED

USER_FUNCTION = "path/to/file.py:name"


@dataclass(frozen=True)
class OneOf:
    """Restrict a string to the names of a registry.

    With `suffix`, each name may be followed by it. With `user_function`, `path/to/file.py:name` is accepted too.
    """

    registry: Registry[Any]
    suffix: str = ""
    user_function: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The accepted names, in the order of the registry."""
        names = self.registry.names
        return (*names, *(f"{name}{self.suffix}" for name in names)) if self.suffix else names

    @property
    def alternatives(self) -> list[str]:
        """The accepted names, and the form of a user function if that is accepted."""
        return [*self.names, *([USER_FUNCTION] if self.user_function else [])]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate as a string, then against the names."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe the names, and the form of a user function if that is accepted."""
        names: dict[str, Any] = {"type": "string", "enum": list(self.names)}
        function = {"type": "string", "pattern": r"\.py:\w+$"}
        return {"anyOf": [names, function]} if self.user_function else names

    def _check(self, value: str) -> str:
        if value in self.names:
            return value
        if self.user_function and re.fullmatch(r".*\.py:\w+", value, re.DOTALL):
            return os.path.expanduser(value)  # noqa: PTH111  (Path would normalize the rest)
        raise PydanticCustomError("one_of", "not one of the names")


AdvEstimator: TypeAlias = Annotated[str, OneOf(ESTIMATORS, user_function=True)]
LossMode: TypeAlias = Annotated[str, OneOf(POLICY_LOSSES, user_function=True)]
LossAggMode: TypeAlias = Annotated[str, OneOf(AGGREGATIONS)]
KLKind: TypeAlias = Annotated[str, OneOf(KL_KINDS, suffix=UNBIASED)]
Strategy: TypeAlias = Annotated[str, OneOf(BACKENDS)]
EngineName: TypeAlias = Annotated[str, OneOf(ENGINES)]
RollouterName: TypeAlias = Annotated[str, OneOf(ROLLOUTERS)]
ToolFormatName: TypeAlias = Annotated[str, OneOf(TOOL_FORMATS)]
Logger: TypeAlias = Annotated[str, OneOf(TRACKERS)]


def only_estimators(setting: str) -> OnlyWhen:
    """Mark a key that only some advantage estimators read; a user function may read it."""
    return OnlyWhen(ADV_ESTIMATOR, _reading(ESTIMATORS, setting), custom=True)


def only_losses(setting: str) -> OnlyWhen:
    """Mark a key that only some policy losses read; a user function may read it."""
    return OnlyWhen(LOSS_MODE, _reading(POLICY_LOSSES, setting), custom=True)


def only_engines(key: str) -> OnlyWhen:
    """Mark a key of `actor_rollout_ref.rollout` that only some engines read."""
    return OnlyWhen(ENGINE, tuple(name for name, engine in ENGINES.items() if key in engine.reads))


def only_rollouters(key: str) -> OnlyWhen:
    """Mark a key of `actor_rollout_ref.rollout` that only some rollouters read."""
    return OnlyWhen(
        AGENT_LOOP, tuple(word for each in ROLLOUTERS.values() if key in each.reads for word in each.names)
    )


def only_megatron(instead: str | None = None) -> OnlyWhen:
    """Mark a key that only backends that split models read, such as Megatron."""
    return OnlyWhen(BACKEND, _strategies(split=True), instead)


def _reading(registry: Mapping[str, AlgorithmInfo], setting: str) -> tuple[str, ...]:
    return tuple(name for name, info in registry.items() if setting in info.reads)


def _strategies(*, split: bool) -> tuple[str, ...]:
    return tuple(word for word in BACKENDS.names if BACKENDS[word].splits_models == split)


FSDP = _strategies(split=False)
ONLY_FSDP = OnlyWhen(BACKEND, FSDP)
WITH_CRITIC = OnlyWhen(
    ADV_ESTIMATOR,
    tuple(name for name, estimator in ESTIMATORS.items() if estimator.needs_critic),
    otherwise=OnlyWhen("critic.enable", (True,)),
)

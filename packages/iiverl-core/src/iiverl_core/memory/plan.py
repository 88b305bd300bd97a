"""Memory of a run on its fullest device, by phase."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from iiverl_core.config import Role, RoleConfig, RunConfig
from iiverl_core.config.model_facts import ModelFacts, find_config, read_model_facts
from iiverl_core.errors import ConfigError
from iiverl_core.memory.activations import activations, layer_work
from iiverl_core.memory.engine import EngineMemory, engine_memory
from iiverl_core.memory.head import head_memory
from iiverl_core.memory.layout import Layout, Stage, layout_of
from iiverl_core.memory.states import States, held_trained, states
from iiverl_core.memory.work import work_of
from iiverl_core.registry import ENGINES

LANGUAGE: tuple[Role, ...] = ("actor", "reference")
Item: TypeAlias = tuple[Role | Literal["engine"], str]
"""Owner and kind of a part of the memory."""


@dataclass(frozen=True)
class Pass:
    """Memory of a pass through a model on one device, excluding states, in bytes; `tokens` are its micro-batch's.

    Under FSDP it is that of the moment that needs most: either the head is at work, or a layer, and `head` is 0. What
    was measured of Megatron is more than was counted, so there both are counted.
    """

    tokens: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Activations, and the head of a policy."""
        return self.activations + self.head


@dataclass(frozen=True)
class RoleMemory:
    """One model on one device, in bytes: `forward` is a pass without gradients, `update` one for training."""

    role: Role
    facts: ModelFacts
    layout: Layout
    states: States
    forward: Pass
    update: Pass | None = None

    @property
    def resident(self) -> dict[str, int]:
        """Bytes by kind of state that remain on the device while other models work, because they are not offloaded.

        FSDP frees its gradients after each step; Megatron keeps them in one buffer.
        """
        kinds = {"weights": self.states.weights, "optimizer": self.states.optimizer}
        if not self.layout.sharded:
            kinds["gradients"] = self.states.gradients
        return {kind: size for kind, size in kinds.items() if kind not in self.layout.offloaded}

    def using(self, work: Pass, *, train: bool) -> dict[str, int]:
        """Count the bytes on the device while this model works, by kind."""
        on_device = {**self.resident, "weights": self.states.weights}
        if train:
            on_device |= {"gradients": self.states.gradients, "optimizer": self.states.optimizer}
        return {
            **on_device,
            "gathered": self.states.gathered,
            "activations": work.activations,
            "head": work.head,
        }

    @property
    def most(self) -> int:
        """Peak bytes of this model alone."""
        forward = sum(self.using(self.forward, train=False).values())
        return max(forward, sum(self.using(self.update, train=True).values())) if self.update else forward


@dataclass(frozen=True)
class Phase:
    """A part of a step, and the memory of a device during it: bytes by owner and kind."""

    name: str
    items: Mapping[Item, int] = field(repr=False)

    @property
    def total(self) -> int:
        """Bytes in total."""
        return sum(self.items.values())

    @property
    def biggest(self) -> Item:
        """The largest item."""
        return max(self.items, key=lambda item: self.items[item])


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run, in bytes on a device of the pipeline stage that needs most."""

    device_memory: int
    stage: Stage
    roles: tuple[RoleMemory, ...]
    engine: EngineMemory
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def too_large(self) -> tuple[Phase, ...]:
        """Phases that need more than a device has."""
        return tuple(phase for phase in self.phases if phase.total > self.device_memory)

    @property
    def fits(self) -> bool:
        """Whether every phase fits, and the engine can hold a sequence."""
        return not self.too_large and self.engine.has_room


def find_facts(run: RunConfig) -> dict[Role, ModelFacts]:
    """Read the shapes of a run's models from their `config.json`; no other file of a model is needed.

    Raises:
        ConfigError: a model has no `config.json`, or it lacks required keys.
    """
    found: dict[Role, ModelFacts] = {}
    for role in run.roles.values():
        model, key = role.model, role.key("model.path")
        facts = read_model_facts(model.path, model.override_config)
        if facts is None and find_config(model.path) is None:
            raise ConfigError(
                f"{key}: there is no config.json of '{model.path}', in a folder of this name or in the Hub's local cache. "
                "It is all that is read of the model: put it into a folder, and name that"
            )
        if facts is None:
            raise ConfigError(
                f"{key}: the config.json of '{model.path}' does not say hidden_size, intermediate_size, num_hidden_layers, "
                "num_attention_heads and vocab_size, from which memory is counted"
            )
        found[role.role] = facts
    return found


def plan_memory(run: RunConfig, facts: Mapping[Role, ModelFacts], device_memory: int) -> MemoryPlan:
    """Count a run's memory on devices of `device_memory` bytes; `facts` has the shape of each of the run's models.

    Weights in transfer from the actor to the engine (at most one bucket) are left out.
    """
    stages: tuple[Stage, ...] = ("first", "last")
    plans = [_of_stage(run, facts, device_memory, stage) for stage in stages]
    return max(plans, key=lambda plan: sorted((phase.total for phase in plan.phases), reverse=True))


def _of_stage(
    run: RunConfig, facts: Mapping[Role, ModelFacts], device_memory: int, stage: Stage
) -> MemoryPlan:
    roles = tuple(
        _role(run, role, facts[role.role], stage) for role in run.roles.values() if not role.is_base
    )
    engine = engine_memory(run, facts["actor"], device_memory)
    return MemoryPlan(device_memory, stage, roles, engine, _phases(run, roles, engine))


def _role(run: RunConfig, role: RoleConfig, facts: ModelFacts, stage: Stage) -> RoleMemory:
    layout, language = layout_of(role, run.devices), role.role in LANGUAGE

    def make_pass(train: bool) -> Pass:
        work = work_of(run, role, train=train)
        frozen = bool(role.model.lora_rank)
        head = head_memory(facts, layout, stage, work, trained=train, frozen=frozen) if language else 0
        peak = activations(facts, layout, stage, work, trained=train)
        if layout.sharded:
            layer = layer_work(facts, layout, work, trained=train)
            peak, head = (peak, 0) if layer >= head else (peak - layer, head)
        return Pass(work.tokens, peak, head)

    trained = role.training is not None
    adapter = (
        held_trained(facts, role.model, layout, stage, language=language) if role.model.lora_rank else None
    )
    state_sizes = states(facts, layout, stage, language=language, trained=trained, adapter=adapter)
    return RoleMemory(
        role.role, facts, layout, state_sizes, make_pass(False), make_pass(True) if trained else None
    )


def _phases(run: RunConfig, roles: tuple[RoleMemory, ...], engine: EngineMemory) -> tuple[Phase, ...]:
    """List the phases: the engine generates, then each model works in turn, with the resident states of the others."""
    rollout = run.rollout
    separate = run.trainer.rollout_devices is not None
    awake: dict[Item, int] = {
        ("engine", "weights"): engine.weights,
        ("engine", "work"): engine.work,
        ("engine", "cache"): engine.cache,
    }
    asleep: dict[Item, int] = {}
    scoring: dict[Item, int] = {}  # of the engine, while a reward model works between two generations
    if not separate and ENGINES[rollout.name].memory == "sequences":
        asleep = scoring = {("engine", "weights"): engine.weights}
    elif not separate and not rollout.free_cache_engine:
        asleep = scoring = awake
    elif not separate:
        scoring = {item: size for item, size in awake.items() if item != ("engine", "cache")}
    resident: dict[Item, int] = {
        (model.role, kind): size for model in roles for kind, size in model.resident.items()
    }

    def phase(name: str, model: RoleMemory, work: Pass, *, train: bool) -> Phase:
        using: dict[Item, int] = {
            (model.role, kind): size for kind, size in model.using(work, train=train).items()
        }
        return Phase(name, {**resident, **(scoring if model.role == "reward" else asleep), **using})

    found = [Phase("generate", awake if separate else {**resident, **awake})]
    found += [phase(f"forward: {model.role}", model, model.forward, train=False) for model in roles]
    found += [
        phase(f"update: {model.role}", model, model.update, train=True) for model in roles if model.update
    ]
    return tuple(found)

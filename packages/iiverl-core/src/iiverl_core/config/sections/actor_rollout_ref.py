"""The section `actor_rollout_ref`: the model that is trained, and its three uses."""

from typing import Annotated

from iiverl_core.config.sections.actor import ActorConfig, RefConfig
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.rollout import RolloutConfig
from iiverl_core.config.sections.section import NotYet, Section


class ActorRolloutRefConfig(Section):
    """The model that is trained: as actor, as rollout engine, as reference."""

    hybrid_engine: Annotated[bool, NotYet("actor and rollout engine on devices of their own", (True,))] = True
    """Train and generate on the same devices."""
    model: ModelConfig = ModelConfig()
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig

"""The roles that models have in a run, and the keys by which each one's micro-batches are cut."""

from typing import Literal, NamedTuple, TypeAlias

from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.root import Config

Role: TypeAlias = Literal["actor", "reference", "critic", "reward"]


class MicroBatching(NamedTuple):
    """Keys that say how large a model's micro-batches are, as they stand in the file."""

    per_device: int | None
    in_all: int | None
    dynamic: bool
    tokens: int
    model: ModelConfig

    def sequences(self, ranks: int) -> int | None:
        """Give the sequences of a micro-batch on one of `ranks` data-parallel ranks; None where `tokens` is the limit."""
        if self.dynamic:
            return None
        if self.per_device is not None or self.in_all is None:
            return self.per_device
        return max(self.in_all // ranks, 1)


def micro_batching(config: Config, role: Role, *, train: bool) -> MicroBatching:
    """Find the keys for a model where it is trained, or only run forward."""
    policy, critic, reward = config.actor_rollout_ref, config.critic, config.reward_model
    if role == "reward":
        sizes = reward.micro_batch_size_per_gpu, reward.micro_batch_size
        return MicroBatching(
            *sizes, reward.use_dynamic_bsz, reward.forward_max_token_len_per_gpu, reward.model
        )
    if role == "critic" and not train:
        sizes = critic.forward_micro_batch_size_per_gpu, critic.forward_micro_batch_size
        return MicroBatching(
            *sizes, critic.use_dynamic_bsz, critic.forward_max_token_len_per_gpu, critic.model
        )
    if train:
        section, model = (policy.actor, policy.model) if role == "actor" else (critic, critic.model)
        sizes = section.ppo_micro_batch_size_per_gpu, section.ppo_micro_batch_size
        return MicroBatching(*sizes, section.use_dynamic_bsz, section.ppo_max_token_len_per_gpu, model)
    section = policy.rollout if role == "actor" else policy.ref
    sizes = section.log_prob_micro_batch_size_per_gpu, section.log_prob_micro_batch_size
    budget = section.log_prob_max_token_len_per_gpu
    return MicroBatching(*sizes, section.log_prob_use_dynamic_bsz, budget, policy.model)

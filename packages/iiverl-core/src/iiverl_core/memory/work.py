"""The largest micro-batch that a configuration lets through each model."""

from math import ceil
from typing import NamedTuple

from iiverl_core.config import Config, ModelConfig
from iiverl_core.config.checks.view import Role
from iiverl_core.memory.activations import Work


class _Batching(NamedTuple):
    """Keys that say how large micro-batches are, and the sequences of all data-parallel ranks that are cut into them."""

    per_device: int | None
    in_all: int | None
    dynamic: bool
    budget: int
    sequences: int
    model: ModelConfig


def work_of(config: Config, role: Role, ranks: int, *, train: bool) -> Work:
    """Find the largest micro-batch of a model over `ranks` data-parallel ranks, where it is trained or only run forward.

    Sequences are taken to be of full length, prompt and response, and as many as a mini-batch or step has for a rank.
    """
    batching = _batching(config, role, train=train)
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    longest = prompt + response
    if role == "reward" and config.reward_model.max_length is not None:
        longest = min(longest, config.reward_model.max_length)
    at_most = ceil(batching.sequences / ranks) * longest
    if not batching.dynamic and batching.per_device is not None:
        tokens = min(batching.per_device * longest, at_most)
    elif not batching.dynamic and batching.in_all is not None:
        tokens = min(max(batching.in_all // ranks, 1) * longest, at_most)
    else:
        tokens = min(max(batching.budget, longest), at_most)
    return Work(
        tokens=tokens,
        responses=ceil(tokens * response / (prompt + response)),
        checkpointing=train and batching.model.enable_gradient_checkpointing,
        entropy=role == "actor" and train and config.actor_rollout_ref.actor.entropy_coeff != 0,
    )


def _batching(config: Config, role: Role, *, train: bool) -> _Batching:
    policy, critic, reward = config.actor_rollout_ref, config.critic, config.reward_model
    step = config.data.train_batch_size * policy.rollout.n
    if role == "reward":
        sizes = reward.micro_batch_size_per_gpu, reward.micro_batch_size
        return _Batching(
            *sizes, reward.use_dynamic_bsz, reward.forward_max_token_len_per_gpu, step, reward.model
        )
    if role == "critic" and not train:
        sizes = critic.forward_micro_batch_size_per_gpu, critic.forward_micro_batch_size
        return _Batching(
            *sizes, critic.use_dynamic_bsz, critic.forward_max_token_len_per_gpu, step, critic.model
        )
    if train:
        section, model = (policy.actor, policy.model) if role == "actor" else (critic, critic.model)
        mini = section.ppo_mini_batch_size * policy.rollout.n
        sizes = section.ppo_micro_batch_size_per_gpu, section.ppo_micro_batch_size
        return _Batching(*sizes, section.use_dynamic_bsz, section.ppo_max_token_len_per_gpu, mini, model)
    section = policy.rollout if role == "actor" else policy.ref
    sizes = section.log_prob_micro_batch_size_per_gpu, section.log_prob_micro_batch_size
    budget = section.log_prob_max_token_len_per_gpu
    return _Batching(*sizes, section.log_prob_use_dynamic_bsz, budget, step, policy.model)

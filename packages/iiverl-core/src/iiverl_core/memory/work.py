"""The largest micro-batch that a configuration lets through each model."""

from math import ceil

from iiverl_core.config import Config
from iiverl_core.config.roles import Role, micro_batching
from iiverl_core.memory.activations import Work


def work_of(config: Config, role: Role, ranks: int, *, train: bool) -> Work:
    """Find the largest micro-batch of a model over `ranks` data-parallel ranks, where it is trained or only run forward.

    Sequences are taken to be of full length, prompt and response, and as many as a mini-batch or step has for a rank.
    """
    batching = micro_batching(config, role, train=train)
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    longest = prompt + response
    if role == "reward" and config.reward_model.max_length is not None:
        longest = min(longest, config.reward_model.max_length)
    at_most = ceil(_sequences(config, role, train=train) / ranks) * longest
    sequences = batching.sequences(ranks)
    tokens = max(batching.tokens, longest) if sequences is None else sequences * longest
    tokens = min(tokens, at_most)
    return Work(
        tokens=tokens,
        responses=ceil(tokens * response / (prompt + response)),
        checkpointing=train and batching.model.enable_gradient_checkpointing,
        entropy=role == "actor" and train and config.actor_rollout_ref.actor.entropy_coeff != 0,
    )


def _sequences(config: Config, role: Role, *, train: bool) -> int:
    """Count what is cut into micro-batches at a time, over all ranks."""
    policy = config.actor_rollout_ref
    if not train:
        return config.data.train_batch_size * policy.rollout.n
    section = policy.actor if role == "actor" else config.critic
    return section.ppo_mini_batch_size * policy.rollout.n

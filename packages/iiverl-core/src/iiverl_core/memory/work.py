"""The largest micro-batch of each model that a configuration allows."""

from math import ceil
from typing import Any

from iiverl_core.config import MegatronConfig, RoleConfig, RunConfig
from iiverl_core.memory.activations import Work


def work_of(run: RunConfig, role: RoleConfig, *, train: bool) -> Work:
    """Find the largest micro-batch of a model in training (`train`) or in a forward pass.

    All sequences are assumed to have full length, prompt and response. Their number is limited by the part of a
    mini-batch or step for one rank. A number of sequences may have no prompt in common; a token budget may be filled by
    whole groups, each with one prompt, if the model may share prompts.
    """
    training = role.training if train else None
    batching = training.micro_batching if training else role.forward
    prompt, response = run.data.max_prompt_length, run.data.max_response_length
    longest = prompt + response
    if role.role == "reward" and run.rewards.conversation and run.rewards.conversation.max_length is not None:
        longest = min(longest, run.rewards.conversation.max_length)
    prompts = training.mini_batch_size if training else run.data.train_batch_size
    max_tokens = ceil(prompts * run.rollout.n / role.data_ranks) * longest
    sequences = batching.sequences
    tokens = max(batching.tokens, longest) if sequences is None else sequences * longest
    tokens = min(tokens, max_tokens)
    may_share = (
        sequences is None
        and not (isinstance(role.parallel, MegatronConfig) and role.parallel.context_parallel_size > 1)
        and role.role != "reward"
        and role.model.use_remove_padding is not False
    )
    members = run.rollout.n if may_share else 1
    return Work(
        tokens=tokens,
        responses=_response_tokens(tokens, prompt, response, members),
        checkpointing=train and role.model.enable_gradient_checkpointing,
        **_recomputed(role),
    )


def _recomputed(role: RoleConfig) -> dict[str, Any]:
    if not isinstance(role.parallel, MegatronConfig):
        return {}
    first = role.parallel.recompute_method == "block"
    return {"recomputed": role.parallel.recompute_num_layers, "only_first": first}


def _response_tokens(tokens: int, prompt: int, response: int, members: int) -> int:
    """Count the most response tokens among `tokens` if up to `members` responses come behind one prompt."""
    group = prompt + members * response
    if tokens >= group:
        return ceil(tokens * members * response / group)
    return max(ceil(tokens * response / (prompt + response)), tokens - prompt)

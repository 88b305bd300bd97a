"""Aggregation of per-token losses to a single loss: `loss_agg_mode`.

Every mode is a weighted sum over tokens. The weights depend only on lengths, and all tokens of a sequence have the same
weight. They are computed over the whole batch before the first forward pass, so the losses of micro-batches add up to
the batch's loss: neither the size of micro-batches nor the number of processes changes a gradient.

| mode | loss of B sequences with T tokens in all, L_i in sequence i |
|---|---|
| `token-mean` | sum of all tokens / T (DAPO, arXiv:2503.14476, eq. 12) |
| `token-sum` | sum of all tokens |
| `seq-mean-token-sum` | mean over sequences of the sum over tokens |
| `seq-mean-token-mean` | mean over sequences of the mean over tokens (GRPO, arXiv:2402.03300, eq. 3) |
| `seq-mean-token-sum-norm` | sum of all tokens / (B · max_tokens_norm) (Dr. GRPO, arXiv:2503.20783) |
"""

from collections.abc import Callable, Sequence

from iiverl_core.registry import AGGREGATIONS


def token_weights(mode: str, lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Compute the weight per token of each sequence in the loss of a batch of sequences of these lengths, B numbers.

    `max_tokens_norm` is the constant that `seq-mean-token-sum-norm` divides by: the longest response allowed.

    Raises:
        ConfigError: `mode` is not the name of an aggregation.
        ValueError: a sequence has no tokens.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"a sequence without tokens has no place in a loss; lengths are {list(lengths)}")
    weights: Callable[[Sequence[int], float], list[float]] = AGGREGATIONS.find(mode, "loss_agg_mode").load()
    return weights(lengths, max_tokens_norm)


def token_mean(lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Give all tokens of the batch the same weight, with a sum of 1."""
    return [1 / sum(lengths)] * len(lengths)


def token_sum(lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Give each token weight 1."""
    return [1.0] * len(lengths)


def seq_mean_token_sum(lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Sum over a sequence's tokens, and average over sequences."""
    return [1 / len(lengths)] * len(lengths)


def seq_mean_token_mean(lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Average over a sequence's tokens, then over sequences."""
    return [1 / (len(lengths) * length) for length in lengths]


def seq_mean_token_sum_norm(lengths: Sequence[int], max_tokens_norm: float) -> list[float]:
    """Divide the sum over a sequence's tokens by a constant, and average over sequences."""
    return [1 / (len(lengths) * max_tokens_norm)] * len(lengths)

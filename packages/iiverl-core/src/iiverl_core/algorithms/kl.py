"""KL divergence of the policy from the reference, by token, and the coefficient that weighs it.

The estimators are those of Schulman (2020, "Approximating KL divergence"), with x = log π(token) - log π_ref(token)
and the token sampled from π:

| name | value | |
|---|---|---|
| `kl`, `k1` | x | unbiased, high variance, can be negative |
| `abs` | abs(x) | |
| `mse`, `k2` | x²/2 | biased, low variance; its gradient is an unbiased one of the KL |
| `low_var_kl`, `k3` | exp(-x) - 1 + x | unbiased, low variance, never negative |

A `+` behind a name keeps the value and takes the gradient of `k2`. As a loss, `k1` has a gradient of mean zero and
`k3` a biased one; `+` mends both (Tang & Munos 2025, arXiv:2506.09477).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

KL_KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def kl_divergence(kind: str, log_probs_T: Tensor, ref_log_probs_T: Tensor) -> Tensor:
    """Estimate each token's KL divergence from the reference, (T,), in nats.

    In `k3` x is clamped to ±20 and the value to ±10, so that one far-off token cannot swamp a batch.

    Raises:
        ValueError: `kind` is no estimator's name.
    """
    if kind.endswith("+"):
        value_T = kl_divergence(kind[:-1], log_probs_T, ref_log_probs_T)
        surrogate_T = kl_divergence("k2", log_probs_T, ref_log_probs_T)
        return surrogate_T - surrogate_T.detach() + value_T.detach()
    x_T = log_probs_T - ref_log_probs_T
    if kind in ("kl", "k1"):
        return x_T
    if kind == "abs":
        return x_T.abs()
    if kind in ("mse", "k2"):
        return x_T.square() / 2
    if kind in ("low_var_kl", "k3"):
        x_T = x_T.clamp(-20, 20)
        return ((-x_T).exp() - 1 + x_T).clamp(-10, 10)
    raise ValueError(f"a kind of KL is one of {', '.join(KL_KINDS)}, with or without a '+', not {kind!r}")


class KLController(Protocol):
    """The coefficient of the KL penalty in the reward."""

    coef: float

    def update(self, kl: float, sequences: int) -> None:
        """Learn the mean KL of a step (nats a token) and how many sequences it was measured on."""
        ...


@dataclass
class FixedKL:
    """A coefficient that stays."""

    coef: float

    def update(self, kl: float, sequences: int) -> None:
        """Change nothing."""


@dataclass
class AdaptiveKL:
    """A coefficient that holds the KL near `target` (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    `horizon` counts sequences: with the KL far above target the coefficient grows by a factor e in 5·horizon of them.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, sequences: int) -> None:
        """Move the coefficient in proportion to the relative error, clipped to ±0.2."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * sequences / self.horizon

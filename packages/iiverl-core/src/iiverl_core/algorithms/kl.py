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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from iiverl_core.registry import KL_KINDS
from iiverl_core.registry.algorithms import UNBIASED


def kl_divergence(kind: str, log_probs_T: Tensor, ref_log_probs_T: Tensor) -> Tensor:
    """Estimate each token's KL divergence from the reference, (T,), in nats.

    Raises:
        ConfigError: `kind` is not the name of an estimator, with or without a `+`.
    """
    x_T = log_probs_T - ref_log_probs_T
    estimate: Callable[[Tensor], Tensor] = KL_KINDS.find(kind.removesuffix(UNBIASED), "kind of KL").load()
    if not kind.endswith(UNBIASED):
        return estimate(x_T)
    surrogate_T = k2(x_T)
    return surrogate_T - surrogate_T.detach() + estimate(x_T).detach()


def k1(x_T: Tensor) -> Tensor:
    """Give x."""
    return x_T


def absolute(x_T: Tensor) -> Tensor:
    """Give abs(x)."""
    return x_T.abs()


def k2(x_T: Tensor) -> Tensor:
    """Give x²/2."""
    return x_T.square() / 2


def k3(x_T: Tensor) -> Tensor:
    """Give exp(-x) - 1 + x, with x clamped to ±20 and the value to ±10: one far-off token cannot swamp a batch."""
    x_T = x_T.clamp(-20, 20)
    return ((-x_T).exp() - 1 + x_T).clamp(-10, 10)


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

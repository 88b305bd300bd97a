"""KL divergence of the policy from the reference, per token.

The estimators are those of Schulman (2020, "Approximating KL divergence"), with x = log π(token) - log π_ref(token)
and the token sampled from π:

| name | value | |
|---|---|---|
| `kl`, `k1` | x | unbiased, high variance, can be negative |
| `abs` | abs(x) | |
| `mse`, `k2` | x²/2 | biased, low variance; its gradient is unbiased for the KL |
| `low_var_kl`, `k3` | exp(-x) - 1 + x | unbiased, low variance, never negative |

The suffix `+` keeps the value of an estimator but uses the gradient of `k2`. As a loss, `k1` has a gradient of mean
zero and `k3` a biased one; `+` fixes both (Tang & Munos 2025, arXiv:2506.09477).
"""

from collections.abc import Callable

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
    """Return x."""
    return x_T


def absolute(x_T: Tensor) -> Tensor:
    """Return abs(x)."""
    return x_T.abs()


def k2(x_T: Tensor) -> Tensor:
    """Return x²/2."""
    return x_T.square() / 2


def k3(x_T: Tensor) -> Tensor:
    """Return exp(-x) - 1 + x, with x clamped to ±20 and the value to ±10, against outliers."""
    x_T = x_T.clamp(-20, 20)
    return ((-x_T).exp() - 1 + x_T).clamp(-10, 10)

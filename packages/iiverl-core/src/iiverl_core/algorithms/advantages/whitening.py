"""Whitening over the tokens of a step: mean 0, variance 1."""

from torch import Tensor

EPSILON = 1e-8
"""Added to the variance, so that almost equal values stay finite."""


def whiten(x_T: Tensor) -> Tensor:
    """Subtract the mean of all tokens and divide by the root of their unbiased variance plus 1e-8, (T,) → (T,).

    Every token has the same weight, so a response is weighted by its length. A single token, and tokens of equal value,
    give exactly 0: the mean is taken over distances from the minimum, so a large common offset causes no rounding
    error. An empty tensor is returned as it is.
    """
    tokens = x_T.numel()
    if not tokens:
        return x_T
    above_T = x_T - x_T.min()
    centred_T = above_T - above_T.mean()
    variance = centred_T.square().sum() / max(tokens - 1, 1)
    return centred_T * (variance + EPSILON).rsqrt()

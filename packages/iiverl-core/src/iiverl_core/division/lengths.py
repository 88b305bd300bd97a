"""Lengths of responses, as they are simulated."""

from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from statistics import NormalDist

import numpy as np

GRID = 128
SIGMA, MEAN_SHARE = 1.0, 0.25
"""Spread of the logarithm of lengths, and their mean as a share of the limit, where nothing was measured."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of responses in tokens, with `mean` before they are cut off at `limit`.

    Prompts have `prompt` tokens, which are computed once for the `group` responses to it.
    """

    mean: float
    sigma: float
    limit: int
    prompt: float
    group: int

    @classmethod
    def assumed(cls, limit: int, prompt: float, group: int) -> "Lengths":
        """Return lengths of a quarter of the limit on average, with a long tail."""
        return cls(MEAN_SHARE * limit, SIGMA, limit, prompt, group)

    @classmethod
    def fitted(
        cls, mean: float, longest: float, count: int, *, limit: int, prompt: float, group: int
    ) -> "Lengths":
        """Return the lengths whose mean, and median longest of `count` responses, are those given.

        Of responses that the limit cuts off, the spread is underestimated.
        """
        mean, longest = max(mean, 1.0), max(longest, 1.0)
        z = NormalDist().inv_cdf(0.5 ** (1 / max(count, 2)))
        # longest = exp(log(mean) - sigma² / 2 + sigma z)
        left = z * z - 2 * log(max(longest / mean, 1.0))
        return cls(mean, z - sqrt(max(left, 0.0)), limit, prompt, group)

    def draw(self, step: int, count: int) -> np.ndarray:
        """Draw the lengths of a step's responses; the same for the same step.

        They are multiples of 1/128 of the limit, if that is more than a token, so that fewer events are simulated.
        """
        grid = max(self.limit / GRID, 1.0)
        normal = np.random.default_rng([step, self.limit]).standard_normal(count)
        drawn = np.minimum(self.mean * exp(-(self.sigma**2) / 2) * np.exp(self.sigma * normal), self.limit)
        return np.maximum(np.round(drawn / grid), 1) * grid

    def prompt_tokens(self, responses: int) -> int:
        """Count the tokens of the prompts of so many responses, each prompt once."""
        return ceil(self.prompt * responses / self.group)

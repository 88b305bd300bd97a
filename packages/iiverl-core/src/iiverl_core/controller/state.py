"""The state of a run beside its models, and the controllers of its KL coefficient.

Everything else is a function of configuration, seed and step.
"""

import json
from dataclasses import asdict, dataclass, field


@dataclass
class TrainState:
    """A checkpoint's part that is no model; the trainer owns one.

    `step` is the last finished step. `batches_consumed` counts the batches of prompts taken from the data.
    `kl_coef` is the weight of the KL in the reward, `weights_version` that of the engines' weights, and
    `response_lengths` the mean length of the responses to each row of the dataset when it was last used. `run_id` names
    the run for trackers, which continue theirs by it.
    """

    kl_coef: float
    step: int = 0
    batches_consumed: int = 0
    weights_version: int = 0
    response_lengths: dict[int, float] = field(default_factory=dict)
    run_id: str = ""

    def to_json(self) -> str:
        """Write the state as JSON; floats keep their bits."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is not JSON, or not of a state.
        """
        try:
            known = json.loads(text)
            lengths = {int(row): length for row, length in known.pop("response_lengths").items()}
            return cls(**known, response_lengths=lengths)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the state of a run: {text[:80]}") from error


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

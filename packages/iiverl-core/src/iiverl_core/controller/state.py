"""The state of a run apart from its models, and the controllers of its KL coefficient.

Everything else is a function of the configuration, the seed and the step.
"""

import json
from dataclasses import asdict, dataclass, field


@dataclass
class TrainState:
    """The part of a checkpoint that is not a model; the trainer owns one.

    `step` is the last finished step. `batches_consumed` counts the batches of prompts taken from the data. `kl_coef` is
    the weight of the KL in the reward, `weights_version` the version of the engines' weights, and `response_lengths`
    the mean length of the responses to each row of the dataset when it was last used. `run_id` identifies the run to
    trackers, which use it to continue their run.
    """

    kl_coef: float
    step: int = 0
    batches_consumed: int = 0
    weights_version: int = 0
    response_lengths: dict[int, float] = field(default_factory=dict)
    run_id: str = ""

    def to_json(self) -> str:
        """Serialize the state as JSON; floats are exact."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """Parse the result of `to_json`.

        Raises:
            ValueError: the text is not JSON, or not the state of a run.
        """
        try:
            known = json.loads(text)
            lengths = {int(row): length for row, length in known.pop("response_lengths").items()}
            return cls(**known, response_lengths=lengths)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is not the state of a run: {text[:80]}") from error


@dataclass
class FixedKL:
    """A constant coefficient."""

    coef: float

    def update(self, kl: float, sequences: int) -> None:
        """Do nothing."""


@dataclass
class AdaptiveKL:
    """A coefficient that keeps the KL near `target` (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    `horizon` is in sequences: with the KL far above the target, the coefficient grows by a factor e per 5·horizon
    sequences.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, sequences: int) -> None:
        """Change the coefficient in proportion to the relative error, clipped to ±0.2."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * sequences / self.horizon

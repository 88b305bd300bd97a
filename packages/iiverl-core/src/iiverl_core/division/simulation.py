"""A simulation of steps: engines that write responses side by side, and devices that train on them.

*In turn* (k = 0), all devices generate and then train. *Beside* (k ≥ 1), a part of them generates. Without `partial`, engines
begin with a step's responses when those of the step before have ended on all of them, and the weights of the step k + 1
before are there. With it, they are interrupted by the weights after every step, compute the caches of what they are
writing again, and get the responses of one more step. Memory for keys and values is not bounded, and rewards take no time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iiverl_core.division.costs import Costs
from iiverl_core.division.lengths import Lengths

STEPS = 16
WARM_UP = 4
"""One of so many steps is not counted at the beginning."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step, and the shares of it in which devices that train and those that generate have nothing to do.

    In turn, both are the same devices, which have nothing to do while they wait for the longest responses.
    """

    step: float
    training_idle: float
    generating_idle: float


class Engine:
    """Writes responses of given lengths side by side; each belongs to a step. `busy` are the seconds in which it did."""

    def __init__(self, costs: Costs, lengths: Lengths) -> None:
        self._costs, self._lengths = costs, lengths
        self.time = self.busy = 0.0
        self._left = np.empty(0)
        self._written = np.empty(0)
        self._steps = np.empty(0, dtype=int)

    def add(self, step: int, lengths: np.ndarray) -> None:
        """Begin with the responses of a step."""
        self._work(self._costs.computed * self._lengths.prompt_tokens(len(lengths)))
        self._left = np.concatenate([self._left, lengths])
        self._written = np.concatenate([self._written, np.zeros(len(lengths))])
        self._steps = np.concatenate([self._steps, np.full(len(lengths), step)])

    def interrupt(self) -> None:
        """Take new weights, and compute the caches of all sequences again."""
        self.time += self._costs.transfer
        self._work(self._costs.computed * self._context())

    def run(self, until: Callable[["Engine"], float]) -> None:
        """Write until the clock is at `until`, which is asked again whenever a response ends."""
        while len(self._left) and self.time < (end := until(self)):
            count = float(self._left.min())
            each = self._costs.decode(len(self._left), self._context() + count * len(self._left) / 2)
            count = min(count, np.ceil((end - self.time) / each))
            self._work(count * each)
            self._left, self._written = self._left - count, self._written + count
            going = self._left > 1e-6
            self._left, self._written, self._steps = (
                self._left[going],
                self._written[going],
                self._steps[going],
            )

    def finish(self, step: int) -> None:
        """Write until the step's responses have ended."""
        self.run(lambda engine: np.inf if (engine._steps <= step).any() else -np.inf)

    def _context(self) -> float:
        return float(self._written.sum()) + self._lengths.prompt * len(self._written)

    def _work(self, seconds: float) -> None:
        self.time += seconds
        self.busy += seconds


def simulate(
    costs: Costs,
    lengths: Lengths,
    responses: int,
    *,
    training: int,
    engines: int,
    k: int,
    partial: bool,
    steps: int = STEPS,
) -> Times:
    """Simulate a run of `responses` per step, on `training` devices and so many engines; these share devices if `k` is 0."""
    pool = [Engine(costs, lengths) for _ in range(engines)]

    def start(step: int) -> None:
        if step <= steps:
            parts = np.array_split(lengths.draw(step, responses), engines)
            for engine, part in zip(pool, parts, strict=True):
                engine.add(step, part)

    generated, trained, busy = (
        [0.0],
        [0.0],
        [0.0],
    )  # when each step was; the seconds in which all engines were
    trains = 0.0
    for step in range(1, (k + 1 if partial else 1) + 1):
        start(step)
    for step in range(1, steps + 1):
        for engine in pool:
            engine.finish(step)
        generated.append(max(engine.time for engine in pool))
        tokens = float(lengths.draw(step, responses).sum()) + lengths.prompt_tokens(responses)
        trains = costs.trained * tokens / training
        trained.append(max(trained[-1], generated[-1]) + trains + costs.transfer)
        if partial:
            for engine in pool:
                engine.run(lambda _, end=trained[-1]: end)
                engine.time = max(engine.time, trained[-1])
                engine.interrupt()
            start(step + 1 + k)
        else:
            begins = max(generated[-1], trained[max(step - k, 0)])
            for engine in pool:
                engine.time = begins
            start(step + 1)
        busy.append(sum(engine.busy for engine in pool))
    warm = steps // WARM_UP
    seconds = trained[-1] - trained[warm]
    each = seconds / (steps - warm)
    tokens = sum(float(lengths.draw(step, responses).sum()) for step in range(warm + 1, steps + 1))
    tokens += lengths.prompt_tokens(responses) * (steps - warm)
    training_busy = costs.trained * tokens / training / seconds
    engines_busy = (busy[-1] - busy[warm]) / engines / seconds
    if k == 0:
        idle = max(0.0, 1 - training_busy - engines_busy)
        return Times(each, idle, idle)
    return Times(each, max(0.0, 1 - training_busy), max(0.0, 1 - engines_busy))


def generation_seconds(
    costs: Costs, lengths: Lengths, responses: int, engines: int, *, draws: int = STEPS
) -> float:
    """Return the mean time of generating a step's responses alone."""
    seconds = []
    for step in range(1, draws + 1):
        pool = [Engine(costs, lengths) for _ in range(engines)]
        for engine, part in zip(pool, np.array_split(lengths.draw(step, responses), engines), strict=True):
            engine.add(step, part)
            engine.finish(step)
        seconds.append(max(engine.time for engine in pool))
    return sum(seconds) / draws

"""Train with iiverl: `ours.py RUN.yaml`, paced by `grpo_step.py`."""

import sys
from typing import Any

import torch
from pacing import Pacer

from iiverl_core.config import load
from iiverl_core.controller import train
from iiverl_core.controller.observer import Observer, StepRecord
from iiverl_core.controller.trainer import Trainer


def main() -> None:
    """Run the training loop; a step begins when it may, and reports its timings."""
    file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    pacer = Pacer()
    next_step, step_done = Trainer.next_step, Observer.step_done

    def paced(self: Trainer) -> bool:
        pacer.begin()
        return next_step(self)

    def reported(self: Observer, record: StepRecord) -> Any:
        metrics = step_done(self, record)
        timings = {name: value for name, value in metrics.items() if name.startswith("timing_s/")}
        pacer.end({name.removeprefix("timing_s/"): value for name, value in timings.items()})
        return metrics

    Trainer.next_step, Observer.step_done = paced, reported
    train(load(file))


if __name__ == "__main__":
    main()

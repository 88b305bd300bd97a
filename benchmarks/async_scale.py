"""What does generation beside training gain on 64 and 512 GPUs? A simulation.

    python benchmarks/async_scale.py [--parameters 7e9] [--mfu 0.4] [--steps 16] [--json FILE]

Nothing of that size was measured. A decoding step of an engine reads its weights and the keys and values of all sequences
once, at a share of the memory's bandwidth; training takes 6 FLOPs per parameter and token, at a share of the peak. Both
shares are arguments. Lengths are log-normal with σ = 1, a quarter of the limit on average, and cut off at it.

*In turn*, all devices generate and then train. *Beside*, a part of them generates, the part that is best out of 1/2, 5/8
and 3/4: without `rollout.partial` an engine begins with the next step's responses when the step before has ended on all
of them; with it, engines are interrupted by the weights after every step, compute the caches of what they are writing
again, and get the responses of one more step. Weight transfers are left out, and memory for keys and values is not bounded.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PEAK_FLOPS, BANDWIDTH = 989e12, 4.8e12  # NVIDIA H200: bf16 without sparsity; bytes per second
PROMPT, GROUP = 512, 16
PER_DEVICE = 32  # responses per device and step
SHARES = (1 / 2, 5 / 8, 3 / 4)
MODES = (
    ("in turn", 0, False),
    ("beside", 1, False),
    ("beside, partial", 2, True),
    ("beside, partial", 4, True),
)


@dataclass(frozen=True)
class Machine:
    """Times in seconds of a model with `parameters` weights in bf16 on one device."""

    parameters: float
    mfu: float
    bandwidth_share: float

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values per token: those of Qwen2.5-7B, in proportion."""
        return 57344 * self.parameters / 7.6e9

    def decode(self, sequences: int, context: float) -> float:
        """Return the time of one step of an engine, for sequences of `context` tokens in all."""
        memory = (2 * self.parameters + self.kv_bytes * context) / (BANDWIDTH * self.bandwidth_share)
        return max(memory, self.compute(sequences))

    def compute(self, tokens: float) -> float:
        """Return the time of a forward pass over tokens."""
        return 2 * self.parameters * tokens / (PEAK_FLOPS * self.mfu)


class Engine:
    """Writes responses of given lengths side by side; each belongs to a step."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.time = machine, 0.0
        self.left = np.empty(0)
        self.written = np.empty(0)
        self.steps = np.empty(0, dtype=int)

    def add(self, step: int, lengths: np.ndarray) -> None:
        """Begin with the responses of a step."""
        self.time += self.machine.compute(PROMPT * len(lengths) / GROUP)
        self.left = np.concatenate([self.left, lengths])
        self.written = np.concatenate([self.written, np.zeros(len(lengths))])
        self.steps = np.concatenate([self.steps, np.full(len(lengths), step)])

    def interrupt(self) -> None:
        """Compute the caches of all sequences again."""
        self.time += self.machine.compute(float((self.written + PROMPT).sum()))

    def run(self, until: Callable[["Engine"], float]) -> None:
        """Write until the clock is at `until`, which is asked again whenever a response ends."""
        while len(self.left) and self.time < (end := until(self)):
            count = float(self.left.min())
            middle = float((self.written + PROMPT).sum()) + count * len(self.left) / 2
            each = self.machine.decode(len(self.left), middle)
            count = min(count, np.ceil((end - self.time) / each))
            self.time += count * each
            self.left, self.written = self.left - count, self.written + count
            going = self.left > 0
            self.left, self.written, self.steps = self.left[going], self.written[going], self.steps[going]

    def finish(self, step: int) -> None:
        """Write until the step's responses have ended."""
        self.run(lambda engine: np.inf if (engine.steps <= step).any() else -np.inf)


def lengths_of(step: int, limit: int, count: int) -> np.ndarray:
    """Draw the lengths of a step's responses."""
    drawn = np.random.default_rng([step, limit]).lognormal(np.log(limit / 4) - 0.5, 1.0, count)
    return np.clip(np.ceil(drawn), 1, limit)


def step_seconds(
    machine: Machine, devices: int, limit: int, steps: int, k: int, partial: bool, share: float
) -> float:
    """Simulate a run, and return the time of a step; `share` of the devices generate, all of them if `k` is 0."""
    count = round(devices * share) if k else devices
    engines = [Engine(machine) for _ in range(count)]
    trainers = devices - count if k else devices
    responses = PER_DEVICE * devices

    def start(step: int) -> None:
        if step <= steps:
            parts = np.array_split(lengths_of(step, limit, responses), count)
            for engine, part in zip(engines, parts, strict=True):
                engine.add(step, part)

    trained = 0.0  # when the last step was
    for step in range(1, (k + 1 if partial else 1) + 1):
        start(step)
    ends: list[float] = []
    for step in range(1, steps + 1):
        for engine in engines:
            engine.finish(step)
        generated = max(engine.time for engine in engines)
        tokens = lengths_of(step, limit, responses).sum() + PROMPT * responses / GROUP
        seconds = 3 * machine.compute(tokens) / trainers
        began = max(trained, generated)
        before, trained = trained, began + seconds
        ends.append(trained)
        if partial:
            for engine in engines:
                engine.run(lambda _, end=trained: end)
                engine.time = max(engine.time, trained)
                engine.interrupt()
            start(step + 1 + k)
        else:  # beside training, the next step's responses come from the weights after the step before
            for engine in engines:
                engine.time = max(generated, before) if k else trained
            start(step + 1)
    warm = steps // 4
    return (ends[-1] - ends[warm - 1]) / (steps - warm)


def main() -> int:
    """Simulate both sizes and both limits, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=7.6e9)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak FLOP/s, 0 to 1")
    parser.add_argument(
        "--bandwidth-share", type=float, default=0.6, help="of the memory's bandwidth, 0 to 1"
    )
    parser.add_argument("--devices", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    machine, rows = Machine(given.parameters, given.mfu, given.bandwidth_share), []
    print("| GPUs | limit | | max_staleness | generating | step | gain |\n|---|---|---|---|---|---|---|")
    for devices in given.devices:
        for limit in (4096, 32768):
            in_turn = 0.0
            for name, k, partial in MODES:
                found = {
                    share: step_seconds(machine, devices, limit, given.steps, k, partial, share)
                    for share in (SHARES if k else (1.0,))
                }
                share = min(found, key=found.__getitem__)
                in_turn = in_turn or found[share]
                row = {
                    "devices": devices,
                    "limit": limit,
                    "mode": name,
                    "max_staleness": k,
                    "generating": round(devices * share),
                    "step_s": round(found[share], 2),
                    "gain": round(in_turn / found[share], 2),
                }
                rows.append(row)
                print(
                    f"| {devices} | {limit} | {name} | {k} | {row['generating']} | {row['step_s']:.1f} s | {row['gain']:.2f} |",
                    flush=True,
                )
    if given.json:
        given.json.write_text(
            json.dumps({"arguments": vars(given) | {"json": None}, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a process that trains on images, over 300 steps of examples/name_the_colour.

    .venv/bin/python benchmarks/vision_memory.py [--json FILE]

One process generates and trains, so it holds everything that a step leaves behind: encoded images, pixels, and token
sequences. Its resident memory is read after every step; images are twice as large as the example's, so that a leak shows.
"""

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path

import psutil

from iiverl_core.config import load
from iiverl_core.controller import train

EXAMPLE = Path(__file__).parents[1] / "examples" / "name_the_colour"
STEPS, FIRST = 300, 30
MB = 2**20


def resident(folder: Path, done: threading.Event) -> dict[int, float]:
    """Return the resident memory in MB at the first look after each step, by step."""
    found: dict[int, float] = {}
    process = psutil.Process()
    while not done.wait(0.05):
        file = folder / "metrics.jsonl"
        step = file.read_bytes().count(b"\n") if file.exists() else 0
        if step:
            found.setdefault(step, process.memory_info().rss / MB)
    return found


def main() -> None:
    """Train, and print the memory after some steps and its growth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(EXAMPLE))
    import make_inputs  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs.SIDE *= 2
        make_inputs.make_data(folder)
        make_inputs.make_model(folder / "model")
        overrides = {
            "data.train_files": folder / "train.parquet",
            "data.val_files": "null",
            "data.max_prompt_length": 48,
            "data.train_batch_size": 8,
            "actor_rollout_ref.model.path": folder / "model",
            "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
            "custom_reward_function.path": EXAMPLE / "reward.py",
            "trainer.runtime": "local",
            "trainer.n_gpus_per_node": 1,
            "trainer.total_training_steps": STEPS,
            "trainer.total_epochs": 10,
            "trainer.save_freq": -1,
            "trainer.test_freq": -1,
            "trainer.val_before_train": "false",
            "trainer.logger": "[jsonl]",
            "trainer.default_local_dir": folder / "run",
            "trainer.rollout_data_dir": "null",
        }
        loaded = load(
            EXAMPLE / "name_the_colour.yaml", [f"{key}={value}" for key, value in overrides.items()]
        )
        done, found = threading.Event(), {}
        watcher = threading.Thread(target=lambda: found.update(resident(folder / "run", done)))
        watcher.start()
        try:
            train(loaded)
        finally:
            done.set()
            watcher.join()
    early = found[min(step for step in found if step >= FIRST)]
    late = found[max(found)]
    growth = late / early - 1
    for step in sorted(found)[:: len(found) // 10]:
        print(f"step {step:3}: {found[step]:.0f} MB")
    print(f"after step {FIRST}: {early:.0f} MB, after the last: {late:.0f} MB, {growth:+.1%}")
    if arguments.json:
        result = {"steps": max(found), "early_mb": early, "late_mb": late, "growth": growth}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

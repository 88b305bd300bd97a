"""Does a run with LoRA adapters reach the reward of one that trains all weights?

    python benchmarks/lora_vs_full.py [--seeds 3] [--start 40] [--steps 80] [--lr 5e-3] [--json FILE]

Both go on from the same model: the quickstart's, after `--start` steps of all weights (`examples/grpo_lora`). Adapters
change a function that is there already; with random weights (`--start 0`), embeddings, norms and head, which adapters
leave as they are, would stay random. For each seed, which decides the order of the
prompts and the sampling, one run of each kind follows the other, so that both see the same machine. `first` and `last`
are the mean reward of sampled responses (`critic/score/mean`) over the first and the last five steps, `greedy` is the
reward of greedy responses to words that no run was trained on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from learning import QUICKSTART, ends, spread

FULL, ADAPTERS = "all weights", "adapters"
GREEDY = "val/test_score/echo"
RANK = 16


def train(inputs: Path, model: Path, folder: Path, *, seed: int, steps: int, more: tuple[str, ...]) -> Path:
    """Run the quickstart on one process without Ray, and return its folder."""
    overrides = [
        f"data.train_files={inputs}/train.jsonl",
        f"data.val_files={inputs}/val.jsonl",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"custom_reward_function.path={QUICKSTART}/reward.py",
        "trainer.runtime=local",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=false",
        f"trainer.test_freq={steps}",
        "trainer.logger=[jsonl]",
        "trainer.rollout_data_dir=null",
        f"trainer.default_local_dir={folder}",
        *more,
    ]
    command = [Path(sys.executable).with_name("iiverl"), "train-ppo", QUICKSTART / "quickstart.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return folder


def compare(
    inputs: Path, start: Path, folder: Path, *, kind: str, seed: int, arguments: argparse.Namespace
) -> dict:
    """Train one kind from one seed."""
    more = ["trainer.save_freq=-1", f"actor_rollout_ref.actor.optim.lr={arguments.full_lr}"]
    if kind == ADAPTERS:
        more = [
            "trainer.save_freq=-1",
            f"actor_rollout_ref.model.lora_rank={RANK}",
            f"actor_rollout_ref.model.lora_alpha={2 * RANK}",
            f"actor_rollout_ref.actor.optim.lr={arguments.lr}",
            "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        ]
    started = time.perf_counter()
    train(inputs, start, folder, seed=seed, steps=arguments.steps, more=tuple(more))
    first, last = ends(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    greedy = next(line[GREEDY] for line in reversed(lines) if GREEDY in line)
    found = {"kind": kind, "seed": seed, "first": first, "last": last, "greedy": greedy}
    found["seconds"] = time.perf_counter() - started
    print(
        f"seed {seed}, {kind}: {first:.3f} -> {last:.3f}, greedy {greedy:.3f}, in {found['seconds']:.0f} s",
        flush=True,
    )
    return found


def table(runs: list[dict]) -> str:
    """Lay the runs out by kind: mean and standard deviation over seeds, and the ratio of the means."""
    columns = ("first", "last", "greedy")
    lines = [f"| trained | {' | '.join(columns)} |", "|---|---|---|---|"]
    means = {}
    for kind in (FULL, ADAPTERS):
        mine = [run for run in runs if run["kind"] == kind]
        means[kind] = [statistics.fmean(run[key] for run in mine) for key in columns]
        lines.append(f"| {kind} | {' | '.join(spread([run[key] for run in mine]) for key in columns)} |")
    ratios = [adapters / full for adapters, full in zip(means[ADAPTERS], means[FULL], strict=True)]
    return "\n".join(
        [*lines, f"| adapters / all weights | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |"]
    )


def main() -> None:
    """Train the start, then both kinds from each seed in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start", type=int, default=40, help="steps of all weights before both")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the adapters")
    parser.add_argument("--full-lr", type=float, default=2e-3, help="learning rate of all weights")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        sys.path.insert(0, str(QUICKSTART))
        import make_inputs

        make_inputs.make_data(inputs)
        start = inputs / "model"
        make_inputs.make_model(start)
        if arguments.start:
            more = (f"trainer.save_freq={arguments.start}",)
            base = train(inputs, start, inputs / "base", seed=0, steps=arguments.start, more=more)
            start = base / f"global_step_{arguments.start}" / "actor" / "huggingface"
        runs = [
            compare(inputs, start, inputs / f"{kind}-{seed}", kind=kind, seed=seed, arguments=arguments)
            for seed in range(1, arguments.seeds + 1)
            for kind in (FULL, ADAPTERS)
        ]
    print(f"\n{table(runs)}")
    if arguments.json:
        settings = {"python": platform.python_version(), "cpus": os.cpu_count(), "rank": RANK}
        settings |= {name: getattr(arguments, name) for name in ("start", "steps", "lr", "full_lr")}
        arguments.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Does every algorithm learn? The quickstart's task under each, from several seeds.

    python benchmarks/learning.py [--seeds 3] [--steps 120] [--jobs 2] [--only NAME …] [--json FILE]
    python benchmarks/learning.py --staleness [--jobs 8] [--json FILE]

A transformer of 80 000 random weights is to say a word of four letters back; the reward is the share of letters that
are right and in their place (`examples/quickstart`). A seed decides the order of the prompts and the sampling. Each run
is `iiverl train-ppo` on the CPU, on one process without Ray. `first` and `last` are the mean reward (`critic/score/mean`, without
DAPO's penalty for length) of the first and the last five steps; what counts is their ratio.

With `--staleness`, GRPO trains beside an engine under Ray, with responses of older and older weights; the same without a
correction for their age is beside it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
AT_THE_ENDS = 5

CRITIC = (
    "critic.model.path={inputs}/model",
    "critic.model.enable_gradient_checkpointing=false",
    "critic.model.fsdp_config.mixed_precision={{param_dtype: fp32}}",
    "critic.optim.lr=2.0e-3",
)
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "PPO + GAE": ("algorithm.adv_estimator=gae", "algorithm.lam=0.95", *CRITIC),
    "GRPO": ("algorithm.adv_estimator=grpo",),
    "RLOO": ("algorithm.adv_estimator=rloo",),
    "REINFORCE++": ("algorithm.adv_estimator=reinforce_plus_plus",),
    "ReMax": ("algorithm.adv_estimator=remax",),
    "DAPO": (
        "algorithm.adv_estimator=grpo",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=3",
        "actor_rollout_ref.actor.clip_ratio_low=0.2",
        "actor_rollout_ref.actor.clip_ratio_high=0.28",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "reward_model.overlong_buffer={{enable: true, len: 2, penalty_factor: 0.1}}",
    ),
}

# Ray starts a process per CPU that it may use, and every run has a Ray of its own.
BESIDE = (
    "algorithm.adv_estimator=grpo",
    "trainer.runtime=ray",
    "trainer.rollout_devices=1",
    "ray_kwargs.ray_init.num_cpus=2",
)
PARTIAL = "actor_rollout_ref.rollout.partial=true"
UNCORRECTED = "algorithm.rollout_correction.bypass_old_log_prob=false"
STALENESS: dict[str, tuple[str, ...]] = {
    "GRPO in turn": BESIDE,
    **{f"GRPO, max_staleness {k}": (*BESIDE, f"trainer.max_staleness={k}") for k in (1, 2, 4)},
    **{
        f"GRPO, max_staleness {k}, partial": (*BESIDE, f"trainer.max_staleness={k}", PARTIAL)
        for k in (1, 2, 4)
    },
    "GRPO, max_staleness 4, uncorrected": (*BESIDE, "trainer.max_staleness=4", UNCORRECTED),
}


def overrides(name: str, inputs: Path, folder: Path, seed: int, steps: int) -> list[str]:
    """Make the overrides of the quickstart's file that train by one algorithm, with inputs and results where said."""
    return [
        f"data.train_files={inputs}/train.jsonl",
        f"data.val_files={inputs}/val.jsonl",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={inputs}/model",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"custom_reward_function.path={QUICKSTART}/reward.py",
        "trainer.runtime=local",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.logger=[jsonl]",
        "trainer.rollout_data_dir=null",
        f"trainer.default_local_dir={folder}",
        *(override.format(inputs=inputs) for override in (ALGORITHMS | STALENESS)[name]),
    ]


def ends(folder: Path) -> tuple[float, float]:
    """Read the mean reward of a run's first and last steps, before any penalty for length."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [step["critic/score/mean"] - step.get("reward/overlong_penalty/mean", 0.0) for step in steps]
    return statistics.fmean(scores[:AT_THE_ENDS]), statistics.fmean(scores[-AT_THE_ENDS:])


def run(name: str, inputs: Path, folder: Path, seed: int, steps: int) -> dict:
    """Train by one algorithm from one seed; raises RuntimeError with what the run printed if it fails."""
    command = [Path(sys.executable).with_name("iiverl"), "train-ppo", QUICKSTART / "quickstart.yaml"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *overrides(name, inputs, folder, seed, steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        printed = f"{done.stdout}\n{done.stderr}"
        raise RuntimeError(f"{name}, seed {seed}, ended with {done.returncode}:\n{printed}")
    first, last = ends(folder)
    seconds = time.perf_counter() - started
    return {"algorithm": name, "seed": seed, "first": first, "last": last, "seconds": seconds}


def table(runs: list[dict]) -> str:
    """Lay the runs out by algorithm: mean and standard deviation over seeds, and the least ratio."""
    lines = ["| algorithm | first | last | ratio, least |", "|---|---|---|---|"]
    for name in dict.fromkeys(run["algorithm"] for run in runs):
        mine = [run for run in runs if run["algorithm"] == name]
        columns = [spread([run[key] for run in mine]) for key in ("first", "last")]
        ratio = spread([run["last"] / run["first"] for run in mine], digits=1)
        least = min(run["last"] / run["first"] for run in mine)
        lines.append(f"| {name} | {columns[0]} | {columns[1]} | {ratio}, {least:.1f} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Write mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> int:
    """Run all algorithms from all seeds, a few at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", nargs="*", choices=ALGORITHMS)
    parser.add_argument(
        "--staleness", action="store_true", help="GRPO with responses of older weights instead"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        sys.path.insert(0, str(QUICKSTART))
        import make_inputs

        make_inputs.make_data(inputs)
        make_inputs.make_model(inputs / "model")
        wanted = [
            (name, inputs, inputs / f"{name}-{seed}", seed, arguments.steps)
            for name in (STALENESS if arguments.staleness else arguments.only or ALGORITHMS)
            for seed in range(1, arguments.seeds + 1)
        ]
        print(f"{len(wanted)} runs of {arguments.steps} steps, {arguments.jobs} at a time", flush=True)
        runs, failures = run_all(wanted, arguments.jobs, arguments.json)
    if runs:
        print(f"\n{table(runs)}")
    return 1 if failures else 0


def run_all(wanted: list[tuple], jobs: int, file: Path | None) -> tuple[list[dict], int]:
    """Train `jobs` runs at a time, and write those that have ended to a file whenever one does.

    Returns them in the order in which they were wanted, and how many failed.
    """
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "jobs": jobs}
    ended: dict[int, dict] = {}
    failures = 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, *each): position for position, each in enumerate(wanted)}
        for count, future in enumerate(as_completed(futures), 1):
            try:
                done = ended[futures[future]] = future.result()
            except RuntimeError as error:
                failures += 1
                print(f"[{count}/{len(wanted)}] {error}", flush=True)
                continue
            rewards = f"{done['first']:.3f} -> {done['last']:.3f} (x{done['last'] / done['first']:.1f})"
            print(
                f"[{count}/{len(wanted)}] {done['algorithm']}, seed {done['seed']}: {rewards} in {done['seconds']:.0f} s",
                flush=True,
            )
            if file:
                runs = [ended[position] for position in sorted(ended)]
                file.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")
    return [ended[position] for position in sorted(ended)], failures


if __name__ == "__main__":
    sys.exit(main())

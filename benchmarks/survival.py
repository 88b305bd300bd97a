"""Does a run that is killed, or stopped, again and again end as one that was left alone?

    python benchmarks/survival.py [--kills 30] [--stalls 0] [--engines] [--steps 120] [--save-freq 10] [--json FILE]
    python benchmarks/survival.py --kills 0 --stalls 5 --rewards
    python benchmarks/survival.py --soak [--engines] [--kills 30]
    python benchmarks/survival.py --save-cost

The quickstart trains once undisturbed. Then it trains again and again, and at random moments SIGKILL goes to the whole
process group, to the driver alone, or (under Ray) to one of its workers, until `--kills` have been sent; a run that
ended before its last step is started again by the same command. With `--stalls`, SIGSTOP goes to a worker that many
times, and the run itself has to name it within `stall_timeout` + 10 s and go on. With `--rewards`, it goes to a process
of the reward function, which then never returns; that has to be named, too, and the run ends with an error, after which
the same command goes on. With `--engines`, the rollout engine
is a process of its own, and may be the one that is hit. With `--soak`, only workers and engines are killed, one every
20 s on average, and the run has to go on by itself.

At the end of each run metrics (times apart), the samples of every step and the tensors of the last checkpoint have to
be equal to the last bit, and no start may repeat more finished steps than `save_freq`. How long a restart takes is
counted from the command to the end of its first step.

`--save-cost` measures how much longer a step with a save takes than one without.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from tempfile import TemporaryDirectory

import psutil

from iiverl_core.controller.run_diff import diff_runs
from iiverl_core.telemetry import read_history

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
STALL_TIMEOUT_S = 20
SOAK_RESTARTS = 10  # without a checkpoint in between: a start takes most of the interval
SOAK_INTERVAL_S = 20.0  # on average, between two kills


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the quickstart, or continue it, in `folder`."""
    ray = options.runtime == "ray"
    command = [
        *(str(Path(sys.executable).with_name("iiverl")), "train-ppo", str(QUICKSTART / "quickstart.yaml")),
        f"trainer.total_training_steps={options.steps}",
        f"trainer.save_freq={options.save_freq}",
        *("trainer.resume_mode=auto", "trainer.max_actor_ckpt_to_keep=2", "trainer.logger=[jsonl]"),
        f"trainer.runtime={options.runtime}",
        f"trainer.n_gpus_per_node={2 if ray and not options.engines else 1}",
        *(["trainer.rollout_devices=1"] if options.engines else []),
        *([f"trainer.stall_timeout={STALL_TIMEOUT_S}"] if options.stalls else []),
        # Calls have a limit of their own, below the watchdog's, which would give the sample a typed failure.
        *(["custom_reward_function.timeout=3600"] if options.rewards else []),
        *([f"trainer.max_restarts={SOAK_RESTARTS}"] if options.soak else []),
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/samples",
        *options.overrides,
    ]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def find_workers(run: subprocess.Popen[bytes]) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """List all processes that the run has started, and those that train or generate."""
    family = psutil.Process(run.pid).children(recursive=True)
    return family, _named(family, "ray::WorkerActor")


def _named(family: list[psutil.Process], name: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for each in family:
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(each.cmdline()):
                found.append(each)
    return found


def kill_something(
    run: subprocess.Popen[bytes], options: argparse.Namespace, chance: random.Random
) -> str | None:
    """Send SIGKILL to a part of the run, and return which; None if there is no such part now."""
    family, workers = find_workers(run)
    victims = [] if options.soak else ["group", "driver"]
    victims += ["worker"] if workers else []
    if not victims:
        return None
    victim = chance.choice(victims)
    if victim == "worker":
        chance.choice(workers).kill()
        return "worker or engine" if options.engines else victim
    os.kill(run.pid, signal.SIGKILL) if victim == "driver" else os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for process in family:  # without its driver, Ray ends by itself, which takes a while
        if process.is_running():
            process.kill()
    return victim


def reached(folder: Path) -> int:
    """Return the last step that the run has reported."""
    return max((record["step"] for record in read_history(folder)), default=0)


def differences(folder: Path, other: Path) -> list[str]:
    """List where results of two runs that ended with the same step begin to differ; other checkpoints may be kept."""
    return [
        f"{each.kind} {each.place}: {'; '.join([*each.different, *each.only])}"
        for each in diff_runs(folder, other).results
        if not each.equal or not each.count or (each.only and each.kind != "checkpoints")
    ]


def first_steps(folder: Path, started: list[float]) -> list[float]:
    """Return the seconds from each start to its first step, of those starts whose steps were not repeated later."""
    ended = [record["time"] for record in read_history(folder)]
    firsts = [
        next((time for time in ended if begin < time < end), None)
        for begin, end in pairwise([*started, math.inf])
    ]
    return [first - begin for begin, first in zip(started, firsts, strict=True) if first is not None]


def train_and_kill(
    folder: Path,
    options: argparse.Namespace,
    chance: random.Random,
    kills: Counter[str],
    alone: float,
    resumed: list[float],
) -> int:
    """Train in `folder` to the end, killing while kills are left; return the most finished steps that were repeated.

    The seconds that restarts took are added to `resumed`.
    """
    most, run, restarted = 0, start(folder, options), []
    longest = 2 * SOAK_INTERVAL_S if options.soak else 0.8 * alone
    while run.poll() != 0:
        if run.returncode is not None:
            if options.soak:
                raise RuntimeError((folder.parent / f"{folder.name}.log").read_text()[-3000:])
            restarted.append(time.time())
            run = start(folder, options)
        if kills.total() >= options.kills:
            run.wait()
            continue
        try:
            run.wait(timeout=chance.uniform(0.1, longest))
        except subprocess.TimeoutExpired:
            last = reached(folder)
            victim = kill_something(run, options, chance)
            if victim is None:  # it is starting again
                continue
            kills[victim] += 1
            saved = [int(path.name.rpartition("_")[2]) for path in folder.glob("global_step_[0-9]*")]
            repeated = last - max(saved, default=0)
            most = max(most, repeated)
            print(f"kill {kills.total()}: {victim} after step {last}, {repeated} to be repeated", flush=True)
    resumed += first_steps(folder, restarted)
    return most


def train_and_stall(
    folder: Path, options: argparse.Namespace, chance: random.Random, named_after: list[float], alone: float
) -> None:
    """Train in `folder` to the end, stopping processes while stalls are left; add the seconds until each was named.

    A worker is stopped once it has finished a step: one that has never reported is given longer.
    """
    run, log = start(folder, options), folder.parent / f"{folder.name}.log"
    while run.poll() is None:
        printed = log.stat().st_size
        while run.poll() is None and "\nstep " not in log.read_text()[printed:]:
            time.sleep(0.1)
        try:
            run.wait(timeout=chance.uniform(1.0, 0.4 * alone))
            break
        except subprocess.TimeoutExpired:
            family, workers = find_workers(run)
            victims = _named(family, "iiverl_core.reward_process") if options.rewards else workers
            if len(named_after) >= options.stalls or not victims:
                continue
        victim = chance.choice(victims)
        last = reached(folder)
        victim.suspend()
        began = time.monotonic()
        name = "iiverl-rewards in" if options.rewards else f"(process {victim.pid} on"
        known = log.read_text().count(name)
        while log.read_text().count(name) == known and run.poll() is None:
            time.sleep(0.1)
        if log.read_text().count(name) == known:
            raise RuntimeError(f"a stall was not named:\n{log.read_text()[-3000:]}")
        named_after.append(time.monotonic() - began)
        print(f"stall {len(named_after)}: after step {last}, named after {named_after[-1]:.1f} s", flush=True)
        with suppress(psutil.NoSuchProcess):
            victim.wait(timeout=60)  # the restart kills it
        if options.rewards:
            run.wait()
            run = start(folder, options)
    if run.returncode != 0:
        raise RuntimeError(log.read_text()[-3000:])


def save_cost(folder: Path, options: argparse.Namespace) -> None:
    """Print how much longer a step with a save takes, in one run in which every fourth step saves.

    A save is copied at the end of its step and written during the next one. The third and fourth step of each round
    have nothing to do with it, so the two sides alternate. All responses have the same length: each step is the same work.
    """
    options.save_freq = 4
    options.overrides = ["actor_rollout_ref.rollout.ignore_eos=true", *options.overrides]
    run = start(folder, options)
    if run.wait() != 0:
        raise RuntimeError((folder.parent / f"{folder.name}.log").read_text()[-3000:])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    took = {step: by_step[step]["time"] - by_step[step - 1]["time"] for step in range(2, options.steps + 1)}
    rounds = range(8, options.steps - 3, 4)
    # Each round is compared with itself, since a machine is not always as fast.
    plain = [(took[step + 2] + took[step + 3]) / 2 for step in rounds]
    longer = [took[step] + took[step + 1] - 2 * alone for step, alone in zip(rounds, plain, strict=True)]
    blocked = median(by_step[step]["timing_s/save_checkpoint"] for step in rounds)
    low, middle, high = (1 + each / mean(plain) for each in quantiles(longer, n=4))
    error = stdev(longer) / len(longer) ** 0.5
    print(
        f"{len(rounds)} saves: a step takes {mean(plain):.3f} s; one with a save, of which {blocked:.3f} s wait for the "
        f"copy, takes {mean(longer):.3f} s longer (standard error {error:.3f}), {1 + mean(longer) / mean(plain):.3f} as "
        f"long; median {middle:.3f}, half of the saves between {low:.3f} and {high:.3f}"
    )


def main() -> int:
    """Run both, compare them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stalls", type=int, default=0)
    parser.add_argument("--engines", action="store_true")
    parser.add_argument("--rewards", action="store_true", help="stop the reward function instead of workers")
    parser.add_argument("--soak", action="store_true", help="kill workers and engines alone, often")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-freq", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray")
    parser.add_argument("--save-cost", action="store_true", help="measure a step with a save, and end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    subprocess.run([sys.executable, QUICKSTART / "make_inputs.py"], check=True)
    kills: Counter[str] = Counter()
    different: list[str] = []
    named_after: list[float] = []
    resumed: list[float] = []
    runs = most = 0
    with TemporaryDirectory(prefix="iiverl-survival-") as name:
        if options.save_cost:
            save_cost(Path(name, "saving"), options)
            return 0
        whole = Path(name, "whole")
        began = time.monotonic()
        if start(whole, options).wait() != 0:
            print((Path(name) / "whole.log").read_text()[-3000:])
            return 1
        alone = time.monotonic() - began
        while kills.total() < options.kills:
            runs += 1
            killed = Path(name, f"killed-{runs}")
            most = max(most, train_and_kill(killed, options, chance, kills, alone, resumed))
            different += differences(killed, whole)
        while len(named_after) < options.stalls:
            runs += 1
            stalled = Path(name, f"stalled-{runs}")
            train_and_stall(stalled, options, chance, named_after, alone)
            different += differences(stalled, whole)
    print("| SIGKILL to | times |\n|---|---|")
    print("\n".join(f"| {victim} | {count} |" for victim, count in sorted(kills.items())))
    print(f"\n{runs} runs; at most {most} finished steps repeated (save_freq {options.save_freq})")
    print("equal to the undisturbed run to the last bit" if not different else f"different: {different[:10]}")
    if resumed:
        print(
            f"{len(resumed)} restarts: the first step was there after {median(resumed):.1f} s, at most {max(resumed):.1f} s"
        )
    slowest = max(named_after, default=0.0)
    if named_after:
        print(
            f"{len(named_after)} stalls, the slowest named after {slowest:.1f} s (limit {STALL_TIMEOUT_S} s + 10 s)"
        )
    if options.json:
        result = {
            "kills": dict(kills),
            "stalls_named_after_s": named_after,
            "restarts_s": resumed,
            "runs": runs,
            "most_steps_repeated": most,
            "different": different,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(different) or most > options.save_freq or slowest > STALL_TIMEOUT_S + 10)


if __name__ == "__main__":
    sys.exit(main())

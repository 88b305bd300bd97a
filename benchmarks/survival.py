"""Does a run that is killed again and again end as one that was left alone?

    python benchmarks/survival.py [--kills 30] [--steps 120] [--save-freq 10] [--seed 0] [--runtime ray] [--json FILE]

The quickstart trains once undisturbed. Then it trains again, and at random moments SIGKILL goes to the whole process
group, to the driver alone, or (under Ray) to one of its workers, until `--kills` are used up; a run that ended is
started again by the same command. Metrics (times apart), the samples of every step and the tensors of the last
checkpoint have to be equal to the last bit, and no start may repeat more finished steps than `save_freq`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
TIMES = ("time", "timing", "perf/", "reward/hidden_fraction")


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the quickstart, or continue it, in `folder`."""
    ray = options.runtime == "ray"
    command = [
        *(str(Path(sys.executable).with_name("iiverl")), "train-ppo", str(QUICKSTART / "quickstart.yaml")),
        f"trainer.total_training_steps={options.steps}",
        f"trainer.save_freq={options.save_freq}",
        *("trainer.resume_mode=auto", "trainer.max_actor_ckpt_to_keep=2", "trainer.logger=[jsonl]"),
        f"trainer.runtime={options.runtime}",
        f"trainer.n_gpus_per_node={2 if ray else 1}",
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/samples",
    ]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def kill_something(run: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Send SIGKILL to a part of the run, and return which."""
    family = psutil.Process(run.pid).children(recursive=True)
    workers = [each for each in family if "ray::WorkerActor" in " ".join(each.cmdline())]
    victim = chance.choice(["group", "driver", *(["worker"] if workers else [])])
    if victim == "worker":
        chance.choice(workers).kill()
        return victim
    os.kill(run.pid, signal.SIGKILL) if victim == "driver" else os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for process in family:  # without its driver, Ray ends by itself, which takes a while
        if process.is_running():
            process.kill()
    return victim


def records(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of each step, without times; half a line, which a kill leaves, is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(TIMES)}
        for line in lines
        if line.endswith("}")
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model's checkpoint: weights and optimizer."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    return state


def differences(folder: Path, other: Path, step: int) -> list[str]:
    """List what is not equal in two runs that ended with the same step."""
    found = [] if records(folder) == records(other) else ["metrics"]
    names = {path.name for each in (folder, other) for path in (each / "samples").glob("*.parquet")}
    for name in sorted(names):
        paths = [each / "samples" / name for each in (folder, other)]
        if not all(path.exists() for path in paths) or pq.read_table(paths[0]) != pq.read_table(paths[1]):
            found.append(f"samples/{name}")
    for role in sorted(path.name for path in (other / f"global_step_{step}").iterdir() if path.is_dir()):
        one, two = (tensors(each / f"global_step_{step}" / role) for each in (folder, other))
        found += [f"{role}: {name}" for name in one.keys() ^ two.keys()]
        found += [
            f"{role}: {name}" for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])
        ]
    return found


def main() -> int:
    """Run both, compare them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-freq", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    subprocess.run([sys.executable, QUICKSTART / "make_inputs.py"], check=True)
    with TemporaryDirectory(prefix="iiverl-survival-") as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        began = time.monotonic()
        if start(whole, options).wait() != 0:
            print((Path(name) / "whole.log").read_text()[-3000:])
            return 1
        alone = time.monotonic() - began
        kills: Counter[str] = Counter()
        repeated, starts = [], 1
        run, reached = start(killed, options), 0
        while run.poll() is None or run.returncode != 0:
            if run.poll() is not None:
                starts += 1
                run = start(killed, options)
            if sum(kills.values()) >= options.kills:
                run.wait()
                continue
            time.sleep(chance.uniform(0.1, alone))
            if run.poll() is not None:
                continue
            reached = max((record["step"] for record in records(killed)), default=0)
            victim = kill_something(run, chance)
            kills[victim] += 1
            saved = [int(path.name.rpartition("_")[2]) for path in killed.glob("global_step_[0-9]*")]
            repeated.append(reached - max(saved, default=0))
            print(
                f"kill {sum(kills.values())}: {victim} at step {reached}, {repeated[-1]} to repeat",
                flush=True,
            )
        different = differences(killed, whole, options.steps)
    result = {
        "kills": dict(kills),
        "starts": starts,
        "most_steps_repeated": max(repeated, default=0),
        "save_freq": options.save_freq,
        "different": different,
    }
    print("| SIGKILL to | times |\n|---|---|")
    print("\n".join(f"| {victim} | {count} |" for victim, count in sorted(kills.items())))
    print(
        f"\n{starts} starts; at most {result['most_steps_repeated']} finished steps repeated (save_freq {options.save_freq})"
    )
    print("equal to the undisturbed run to the last bit" if not different else f"different: {different[:10]}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(different) or result["most_steps_repeated"] > options.save_freq)


if __name__ == "__main__":
    sys.exit(main())

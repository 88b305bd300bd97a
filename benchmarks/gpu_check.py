"""What of iiverl works on this machine's GPU, and how fast: one table, nothing downloaded, nothing needed but torch.

    python benchmarks/gpu_check.py [--minutes 8] [--plan] [--sizes tiny 0.5b 1.5b] [--only PART …] [--json FILE]

On a GPU it runs the parts that fit in `--minutes` by their estimates, those that say most first, and starts none once that
time is over; `--plan` only prints them. With `--only` or `--sizes`, and on a CPU, there is no limit unless it is set.

Models have random weights and are made on the spot, in the shape of Qwen2.5 and in a tiny one. Ray, vLLM and
megatron-core are used where they are installed. For each size:

- `train …`: forward, backward and AdamW's step of the actor on FSDP, bf16 compute and fp32 master weights, gradient
  checkpointing, log-normal lengths in micro-batches of at most 8192 tokens; its log-probs alone; and the most memory that
  torch had allocated in training. `offload` keeps weights and optimizer in the host's memory; `megatron` is the same on
  the backend megatron, where that is installed; `lora` trains adapters of rank 32. Planned is what `iiverl plan` says.
- `train compiled`: training and log-probs with `compile_blocks` and without, in turn, and the time that compiling takes.
- `shared prompts`: training with one copy of the prompt of eight responses, and with one per response, in turn.
- `reference`: log-probs of a model whose weights are in bf16.
- `rollout …`: an engine's speed, the time of a weight update from trainer to engine, and how far their log-probs are
  apart on what the engine sampled (`rollout/kl`, in nats a token, and the largest ratio of probabilities).
- `head`: a forward and a backward pass of the policy's head for 32 k tokens, in tiles and with all logits at once: time,
  memory beyond inputs and gradients, and how far the gradients are apart.
- `save`: steps with and without a checkpoint that is copied and written in the background, in turn; what is loaded must
  be what was saved.

And with tiny models: gradients, values and scores against transformers by hand; an engine's log-probs of what it
answers to images; whole runs of examples, whose reward must rise: the quickstart's, one with images and one with several
turns. A run that is resumed, a step that is replayed and a run whose worker is killed must have the metrics of the
whole run. Numbers are medians of `--repeats` measurements after a warm-up, in this order and not in turn:
they say what this device did, and their ratios say little.

Each part runs in a process of its own. One that fails, or is not possible here, becomes a row that says why; the exit
code is 1 if one failed.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Where flash-attn is installed, transformers asks for devices when it is imported. CUDA initialized in the process from
# which parts are forked would be lost to them; NVML answers too.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from gpu_check_parts.correctness import gradients, value_models
from gpu_check_parts.head import head
from gpu_check_parts.plan import MODEL, ORDER, Planned, choose, estimate, lines
from gpu_check_parts.rollout import rollout
from gpu_check_parts.runs import learn, learn_example, replay, resume, survive
from gpu_check_parts.saving import save
from gpu_check_parts.setting import GIB, SIZES, NotPossibleError, Numbers, Setting, make_model
from gpu_check_parts.training import compiled, reference, shared_prompts, train
from gpu_check_parts.vision import vision
from transformers.utils.logging import disable_progress_bar

from iiverl_core.config.vllm import installed_version

PRELOADED = ["torch", "transformers.models.qwen2.modeling_qwen2", "datasets", "iiverl_fsdp"]
"""Modules that take long to import: the process from which those of the parts are forked has them, and no CUDA yet."""

PARTS: dict[str, Callable[[Setting], Numbers]] = {
    MODEL: make_model,
    "train packed": partial(train, packed=True),
    "train padded": partial(train, packed=False),
    "train offload": partial(train, packed=True, offload=True),
    "train megatron": partial(train, packed=True, backend="megatron"),
    "train lora": partial(train, packed=True, lora_rank=32),
    "train compiled": compiled,
    "shared prompts": shared_prompts,
    "reference": reference,
    "rollout hf": partial(rollout, engine="hf"),
    "rollout vllm": partial(rollout, engine="vllm"),
    "head": head,
    "save": save,
    "save megatron": partial(save, backend="megatron"),
    # Proved with the tiny model:
    "gradients": gradients,
    "value models": value_models,
    "gradients megatron": partial(gradients, backend="megatron"),
    "value models megatron": partial(value_models, backend="megatron"),
    "learn GRPO": partial(learn, algorithm="GRPO"),
    "learn PPO": partial(learn, algorithm="PPO + GAE"),
    "learn GRPO vllm": partial(learn, algorithm="GRPO", engine="vllm"),
    "learn GRPO megatron": partial(learn, algorithm="GRPO", backend="megatron"),
    "learn GRPO ray": partial(learn, algorithm="GRPO", runtime="ray"),
    "learn GRPO lora": partial(learn, algorithm="GRPO", lora=True),
    "learn GRPO megatron lora": partial(learn, algorithm="GRPO", backend="megatron", lora=True),
    "learn vision": partial(learn_example, task="vision"),
    "learn turns": partial(learn_example, task="turns"),
    "vision": partial(vision, engine="hf"),
    "vision vllm": partial(vision, engine="vllm"),
    "resume": resume,
    "replay": replay,
    "survive": survive,
}
"""The parts by name; `plan` has their order and the sizes of their models."""

MINUTES = 8.0


@dataclass
class Row:
    """What became of a part: `state` is `ok`, `failed`, `not possible` or `not run`; `reason` says why it is not `ok`."""

    part: str
    size: str
    state: str = "ok"
    reason: str = ""
    numbers: Numbers = field(default_factory=dict)
    seconds: float = 0.0

    def text(self) -> str:
        """Say in one line what became of it."""
        if self.state != "ok":
            return f"{self.state}: {self.reason}".replace("|", "/")
        return "; ".join(f"{name} {_number(value)}" for name, value in self.numbers.items())


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.3g}"


def versions(device: torch.device) -> dict[str, str]:
    """Name the device, and the versions of what the numbers depend on."""
    cuda = device.type == "cuda"
    properties: Any = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": properties.name if cuda else f"CPU, {os.cpu_count()} cores",
        "memory": f"{properties.total_memory / GIB:.1f} GiB" if cuda else "the host's",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        **{
            name: _version(name)
            for name in ("transformers", "ray", "flash-attn", "megatron-core", "transformer-engine")
        },
        "vllm": installed_version() or "not installed",
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def attempt(name: str, setting: Setting, sender: Any) -> None:
    """Run a part in this process and send its numbers, or the state and the reason. Standard output stays the table's."""
    os.setsid()
    os.dup2(2, 1)
    disable_progress_bar()
    try:
        sender.send(("ok", "", PARTS[name](setting)))
    except NotPossibleError as error:
        sender.send(("not possible", str(error), {}))
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        sender.send(("failed", f"{type(error).__name__}: {first}", {}))


def run(name: str, size: str, setting: Setting, timeout: float) -> Row:
    """Run a part in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(name, setting, sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    patience = 0.0
    try:
        state, reason, numbers = ("failed", f"no end after {timeout:.0f} s", {})
        if receiver.poll(timeout):
            patience = 10.0
            state, reason, numbers = receiver.recv()
    except EOFError:
        process.join()
        state, reason, numbers = "failed", f"its process ended with {process.exitcode}", {}
    finally:
        _end(process, patience)
    return Row(name, size, state, reason, numbers, time.perf_counter() - started)


def _end(process: Any, patience: float) -> None:
    """Wait for a part's process for some seconds, and kill it with those that it started if it stays."""
    process.join(patience)
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def rows(
    chosen: Sequence[Planned], arguments: argparse.Namespace, device: torch.device, folder: Path
) -> Iterator[Row]:
    """Run the chosen parts, one after another."""
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    over = "not run", f"the {arguments.minutes or 0:g} minutes are over"
    useless: dict[str, tuple[str, str]] = {}
    for part, size in ((each.part, each.size) for each in chosen):
        needed = SIZES[size].needed_bytes() if part == MODEL and device.type == "cuda" else 0
        if needed > memory:
            reason = f"training needs about {needed / GIB:.0f} GiB, and the device has {memory / GIB:.0f}"
            useless[size] = "not possible", reason
        left = end - time.monotonic()
        if size in useless:
            row = Row(part, size, *useless[size])
        elif left <= 0:
            row = Row(part, size, *over)
        else:
            print(f"{part}, {size} …", flush=True)
            setting = Setting(device, SIZES[size], folder / size, arguments.repeats)
            row = run(part, size, setting, min(arguments.timeout, left))
            if row.state == "failed" and row.seconds >= left:
                row = Row(part, size, *over, seconds=row.seconds)
        print(f"{part}, {size}: {row.text()} [{row.seconds:.0f} s]", flush=True)
        yield row
        if part == MODEL and row.state in ("failed", "not run"):
            useless[size] = "not run", "there is no model of this size"


def table(machine: dict[str, str], done: list[Row]) -> str:
    """Lay everything out as one table."""
    lines = ["| part | size | result |", "|---|---|---|"]
    lines += [f"| {name} | | {value} |" for name, value in machine.items()]
    lines += [f"| {row.part} | {row.size} | {row.text()} |" for row in done]
    return "\n".join(lines)


def main() -> int:
    """Run the parts and print the table; give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="by default all, on a CPU the tiny one")
    parts = [part for part in PARTS if part != MODEL]
    parser.add_argument("--only", nargs="+", metavar="PART", choices=parts, help=", ".join(parts))
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--minutes", type=float, help=f"time for everything, by default {MINUTES:g} on a GPU")
    parser.add_argument(
        "--plan", action="store_true", help="print the parts and the expected time, run nothing"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each number")
    parser.add_argument("--timeout", type=float, default=400, help="seconds that a part may take")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() if arguments.device == "auto" else arguments.device == "cuda"
    if cuda and arguments.minutes is None and not (arguments.only or arguments.sizes):
        arguments.minutes = MINUTES
    seconds = arguments.minutes and 60 * arguments.minutes
    missing = {each.needs for each in ORDER if each.needs and find_spec(each.needs) is None}
    sizes = arguments.sizes or (list(SIZES) if cuda else ["tiny"])
    chosen = choose(sizes, arguments.only, seconds, missing=missing)
    print("\n".join(lines(chosen)), flush=True)
    if arguments.plan:
        return 0
    if cuda and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    for number in (signal.SIGTERM, signal.SIGHUP):  # end the part that runs, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    device = torch.device("cuda" if cuda else "cpu")
    multiprocessing.set_forkserver_preload(PRELOADED)
    result: dict[str, Any] = {
        "machine": versions(device),
        "plan": [asdict(each) for each in chosen],
        "expected seconds": estimate(chosen),
    }
    with TemporaryDirectory(prefix="iiverl-gpu-check-") as folder:
        done: list[Row] = []
        for row in rows(chosen, arguments, device, Path(folder)):
            done.append(row)
            if arguments.json:  # after each part: what there is outlives whoever ends this
                result["parts"] = [asdict(row) for row in done]
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{table(result['machine'], done)}")
    return int(any(row.state == "failed" for row in done))


if __name__ == "__main__":
    sys.exit(main())

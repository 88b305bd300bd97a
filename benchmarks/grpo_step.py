"""Time of a whole GRPO step, generation and update, compared with TRL, over a grid of sizes.

    python benchmarks/grpo_step.py --trl ENVIRONMENT/bin/python [--cells 5M-p32-n128-g4-fp32,…]
        [--output FILE [--missing]] [--compare FILE] [--rounds 3] [--threads 2] [--device cuda]

Both train the same random Qwen2 on the CPU, or on one GPU with `--device cuda`, with the same prompts, micro-batches of at most `--tokens` tokens, no
reference, and responses of exactly the same length. They run as two processes of which one works at a time: a step of one,
then a step of the other, so that a busy machine is unfair to none. The first step of each is not counted, nor is the
last, in which a program also ends its run. A cell is named
model-prompt-new-group-dtype; without `--cells`, the whole grid runs, which takes hours. The grid is for CPUs: on a GPU, name
cells such as `0.5B-p512-n256-g8-bf16`. `--output` is written after each cell, and keeps the other cells of the file, so a
grid may be run in pieces; `--missing` runs only those cells that it does not have yet.

The floor is the time of the arithmetic alone: 2 FLOPs per parameter and generated token, and the forward and backward pass
of the update with each prompt once, at the speed of a large matrix product. TRL computes the prompt of every response: the
"work" is how many times as much arithmetic that is, and what is to be expected where nothing else takes time. The table
has the ratio of seconds, the geometric mean over the rounds, and that of CPU seconds. `--compare` exits with 1 if the ratio of a cell fell by more than
10 % compared with an earlier output.

TRL needs an environment of its own: `python -m venv trl-env && trl-env/bin/pip install trl`.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from string import ascii_letters
from typing import Any, NamedTuple

import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from iiverl_core.telemetry import training_flops
from iiverl_core.training.planning import SequenceSize, work_of

PARTS = Path(__file__).parent / "grpo_step_parts"
MARK = "STEP "


class Shape(NamedTuple):
    """The shape of a Qwen2."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int


SIZES = {
    "1M": Shape(128, 352, 3, 4096, 4, 1),
    "5M": Shape(256, 704, 5, 4096, 8, 2),
    "50M": Shape(512, 1408, 12, 16384, 16, 4),
    "0.5B": Shape(896, 4864, 24, 151936, 14, 2),
}
GRID = {
    "model": ("1M", "5M", "50M"),
    "prompt": (32, 512),
    "new": (128, 512),
    "group": (4, 16),
    "dtype": ("fp32", "bf16"),
}
REGRESSION = 0.9
REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) % 2\n"


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    model: str
    prompt: int
    new: int
    group: int
    dtype: str

    @classmethod
    def named(cls, name: str) -> "Cell":
        """Read a name.

        Raises:
            ValueError: it is not of the form that `name` returns, or there is no such model.
        """
        model, prompt, new, group, dtype = name.split("-")
        cell = cls(model, int(prompt[1:]), int(new[1:]), int(group[1:]), dtype)
        if cell.name != name or model not in SIZES or dtype not in GRID["dtype"]:
            raise ValueError(name)
        return cell

    @property
    def name(self) -> str:
        """How `--cells` and the results name it."""
        return f"{self.model}-p{self.prompt}-n{self.new}-g{self.group}-{self.dtype}"

    def micro_batch(self, samples: int, tokens: int) -> int:
        """Return the largest divisor of `samples` whose sequences have at most `tokens` tokens, for TRL."""
        most = max(tokens // (self.prompt + self.new), 1)
        return max(n for n in range(1, samples + 1) if samples % n == 0 and n <= most)


def grid() -> list[Cell]:
    """List all cells."""
    return [Cell(*values) for values in itertools.product(*GRID.values())]


def make_model(size: str, folder: Path) -> int:
    """Save a random model, and a tokenizer with a token per letter; return the number of parameters."""
    shape = SIZES[size]
    vocabulary = shape.vocabulary
    pieces = [*ascii_letters, *(f"{i}," for i in range(vocabulary - len(ascii_letters) - 1)), "<end>"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def configuration(
    cell: Cell, folder: Path, prompts: int, steps: int, tokens: int, device: str
) -> dict[str, Any]:
    """Configure iiverl."""
    computed = {"fp32": "float32", "bf16": "bfloat16"}[cell.dtype]
    return {
        "data": {
            "train_files": str(folder / "prompts.jsonl"),
            "max_prompt_length": cell.prompt,
            "max_response_length": cell.new,
            "train_batch_size": prompts,
            "shuffle": False,
        },
        "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
        "actor_rollout_ref": {
            "model": {"path": str(folder / "model"), "enable_gradient_checkpointing": False},
            "actor": {
                "ppo_mini_batch_size": prompts,
                "use_dynamic_bsz": True,
                "ppo_max_token_len_per_gpu": tokens,
                "entropy_coeff": 0.0,
                "use_kl_loss": False,
                "optim": {"lr": 1e-6},
                "fsdp_config": {"mixed_precision": {"param_dtype": cell.dtype}},
            },
            "rollout": {"name": "hf", "n": cell.group, "dtype": computed, "ignore_eos": True},
        },
        "custom_reward_function": {"path": str(folder / "reward.py")},
        "trainer": {
            "runtime": "local",
            "n_gpus_per_node": 1,
            "device": device,
            "total_training_steps": steps,
            "total_epochs": steps,
            "val_before_train": False,
            "test_freq": -1,
            "save_freq": -1,
            "logger": ["jsonl"],
            "default_local_dir": str(folder / "run"),
        },
    }


def write_inputs(cell: Cell, folder: Path, arguments: argparse.Namespace) -> int:
    """Write the inputs of both programs; return the parameters of the model."""
    prompts, steps = arguments.prompts, arguments.rounds + 2  # the first warms up, the last ends the run
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(len(ascii_letters), (prompts * steps, cell.prompt), generator=generator)
    texts = ["".join(ascii_letters[i] for i in row) for row in letters.tolist()]
    rows = [json.dumps({"prompt": text, "data_source": "made up", "ground_truth": "none"}) for text in texts]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARD)
    parameters = make_model(cell.model, folder / "model")
    (folder / "run.yaml").write_text(
        yaml.safe_dump(configuration(cell, folder, prompts, steps, arguments.tokens, arguments.device))
    )
    samples = prompts * cell.group
    setting = {
        "model": str(folder / "model"),
        "folder": str(folder / "trl"),
        "prompts": texts,
        "samples": samples,
        "micro_batch": cell.micro_batch(samples, arguments.tokens),
        "group": cell.group,
        "new": cell.new,
        "dtype": cell.dtype,
        "device": arguments.device,
        "steps": steps,
        "threads": arguments.threads,
    }
    (folder / "setting.json").write_text(json.dumps(setting))
    return parameters


@contextmanager
def program(command: Sequence[str], threads: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start one of the programs, which waits before its first step."""
    path = os.pathsep.join([str(PARTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def step(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """Let a program make a step, and return its report."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # the log says why
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise SystemExit(f"a program ended without a step:\n{log.read_text()[-3000:]}")


def matmul_flops(dtype: str, threads: int, device: str) -> float:
    """Measure the FLOP/s of a large matrix product."""
    torch.set_num_threads(threads)
    n, cuda = (8192, True) if device == "cuda" else (1024, False)
    x = torch.randn(n, n, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device=device)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        x @ x
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def step_flops(cell: Cell, parameters: int, prompts: int, *, shared: bool) -> float:
    """Count the FLOPs of a step, with each prompt computed once, or for each of its responses."""
    groups, copies = (prompts, cell.group) if shared else (prompts * cell.group, 1)
    sizes = [
        SequenceSize(cell.prompt + cell.new, cell.prompt, group)
        for group in range(groups)
        for _ in range(copies)
    ]
    shape = SIZES[cell.model]
    work = work_of(sizes, [range(len(sizes))])
    update = training_flops(parameters, shape.layers, shape.heads, shape.hidden // shape.heads, [work])
    return 2 * parameters * groups * (cell.prompt + copies * cell.new) + update


def less_work(found: Mapping[str, Any], prompts: int) -> float:
    """Return how many times as much arithmetic a step takes without shared prompts."""
    cell, parameters = Cell.named(found["cell"]), found["parameters"]
    whole, shared = (step_flops(cell, parameters, prompts, shared=shared) for shared in (False, True))
    return whole / shared


def run_cell(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate both programs, and summarize their reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_inputs(cell, folder, arguments)
        flops = matmul_flops(cell.dtype, arguments.threads, arguments.device)
        commands = {
            "iiverl": [sys.executable, PARTS / "ours.py", folder / "run.yaml", arguments.threads],
            "trl": [arguments.trl, PARTS / "theirs.py", folder / "setting.json"],
        }
        logs = {who: folder / f"{who}.log" for who in commands}
        reports: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
        with (
            program([*map(str, commands["iiverl"])], arguments.threads, logs["iiverl"]) as ours,
            program([*map(str, commands["trl"])], arguments.threads, logs["trl"]) as theirs,
        ):
            for _ in range(arguments.rounds + 1):
                reports["iiverl"].append(step(ours, logs["iiverl"]))
                reports["trl"].append(step(theirs, logs["trl"]))
    tokens = arguments.prompts * cell.group * (cell.prompt + cell.new)
    found: dict[str, Any] = {"cell": cell.name, "parameters": parameters, "tokens": tokens}
    floor = step_flops(cell, parameters, arguments.prompts, shared=True) / flops
    found["floor_s"] = round(floor, 3)
    found["work_ratio"] = round(less_work(found, arguments.prompts), 2)
    for who, (_, *counted) in reports.items():
        seconds = statistics.median(report["seconds"] for report in counted)
        found[who] = {
            "seconds": [round(report["seconds"], 3) for report in counted],
            "cpu_seconds": [round(report["cpu_seconds"], 3) for report in counted],
            "tokens_per_s": round(tokens / seconds),
            "gen_s": round(statistics.median(report["parts"]["gen"] for report in counted), 3),
            "update_s": round(statistics.median(report["parts"]["update_actor"] for report in counted), 3),
            "parts_s": counted[-1]["parts"],
            "peak_mb": max(report["peak_mb"] for report in counted),
            "peak_device_mb": max(report["peak_device_mb"] for report in counted),
        }
    for kind in ("seconds", "cpu_seconds"):
        ratios = [b / a for a, b in zip(found["iiverl"][kind], found["trl"][kind], strict=True)]
        found[f"ratio_{kind}"] = round(math.exp(statistics.fmean(map(math.log, ratios))), 3)
    return found


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Format results for benchmarks/README.md."""
    lines = [
        "| cell | iiverl | of it generation, update | TRL | of it generation, update | floor | work | TRL / iiverl | of CPU time | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in cells:
        ours, theirs = each["iiverl"], each["trl"]
        a, b = (statistics.median(who["seconds"]) for who in (ours, theirs))
        lines.append(
            f"| {each['cell']} | {a:.2f} s, {ours['tokens_per_s']} tok/s | {ours['gen_s']:.2f}, {ours['update_s']:.2f} s "
            f"| {b:.2f} s, {theirs['tokens_per_s']} tok/s | {theirs['gen_s']:.2f}, {theirs['update_s']:.2f} s "
            f"| {each['floor_s']:.2f} s | {each['work_ratio']:.2f} | {each['ratio_seconds']:.2f} | {each['ratio_cpu_seconds']:.2f} "
            f"| {_peak(ours)}, {_peak(theirs)} |"
        )
    return "\n".join(lines)


def _peak(report: Mapping[str, Any]) -> int:
    """Return the peak memory of the device in MB."""
    return report["peak_device_mb"] or report["peak_mb"]


def regressions(cells: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the cells whose ratio fell by more than a tenth."""
    before = {each["cell"]: each["ratio_seconds"] for each in earlier}
    return [
        f"{each['cell']}: the ratio fell from {before[each['cell']]} to {each['ratio_seconds']}"
        for each in cells
        if each["ratio_seconds"] < REGRESSION * before.get(each["cell"], 0)
    ]


def versions(python: str) -> dict[str, str]:
    """Read the versions of what is compared."""
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('trl', 'torch', 'transformers')}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {
        "trl": found["trl"],
        "trl's torch": found["torch"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    """Run the cells, print the table, and write or compare results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl", required=True, help="the interpreter of an environment with trl")
    parser.add_argument("--cells", help="names of cells, separated by commas; default: all")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--rounds", type=int, default=3, help="alternations that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="token budget of a micro-batch")
    parser.add_argument("--output", type=Path, help="JSON file to write; other cells in it are kept")
    parser.add_argument("--missing", action="store_true", help="run only cells that the output does not have")
    parser.add_argument("--compare", type=Path, help="JSON file of an earlier run")
    arguments = parser.parse_args()
    try:
        chosen = [Cell.named(name) for name in arguments.cells.split(",")] if arguments.cells else grid()
    except ValueError:
        parser.error(f"--cells {arguments.cells}: names are of the form {grid()[0].name}")
    output, there = arguments.output, {}
    if output and output.exists():
        there = {each["cell"]: each for each in json.loads(output.read_text())["cells"]}
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "versions": versions(arguments.trl),
        "prompts": arguments.prompts,
        "token_budget": arguments.tokens,
    }
    cells = []
    for cell in chosen:
        if arguments.missing and cell.name in there:
            continue
        load = os.getloadavg()[0]
        found = run_cell(cell, arguments)
        found |= {"date": date.today().isoformat(), "load_before": round(load, 1)}
        cells.append(found)
        there[cell.name] = found
        print(table([found]).splitlines()[-1], file=sys.stderr, flush=True)
        if output:
            names = [each.name for each in grid()]
            others = [name for name in there if name not in names]
            result["cells"] = [there[name] for name in (*names, *others) if name in there]
            result["not_run"] = [name for name in names if name not in there]
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells))
    fallen = (
        regressions(cells, json.loads(arguments.compare.read_text())["cells"]) if arguments.compare else []
    )
    print(*fallen, sep="\n")
    return 1 if fallen else 0


if __name__ == "__main__":
    raise SystemExit(main())

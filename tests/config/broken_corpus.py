"""The corpus of broken configurations, `broken.txt`, and the diagnostics of each, `wording.txt`.

A case of `broken.txt` begins with `==== name`. A line that begins with `$` has command-line arguments. With `!`, the case
runs as if no optional package were installed, and one package had a broken entry point; with `!cpu`, as if vLLM's CPU
build were installed. The YAML ends at `>>>>` and is followed by the location, severity, code and key of each diagnostic.
Messages are in `wording.txt`. `.venv/bin/python tests/config/broken_corpus.py` writes it and `docs/diagnostics.md`;
review the diff before committing it.
"""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from iiverl_core.config import Problem, load, render
from iiverl_core.config.diagnostics import DIAGNOSTICS
from iiverl_core.registry import REGISTRIES, TRACKERS

BROKEN = Path(__file__).with_name("broken.txt")
WORDING = Path(__file__).with_name("wording.txt")
REFERENCE = Path(__file__).parents[2] / "docs" / "diagnostics.md"
HEAD = """\
# Diagnostics

Each diagnostic of a configuration has a code, which stays the same in later versions while its wording may change:
`run.yaml:2: error[C012]: data.train_batch_sise: unknown key; did you mean data.train_batch_size?`. An error has to be fixed;
a warning does not prevent a run, unless it is about something that this version or this machine does not support.

| code | name | for example |
|---|---|---|
"""
DENSE = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
WORDS = {
    "version": "1.0",
    **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}
FILES = {
    "rewards.py": "def compute_score(**_):\n    return 1.0\n",
    "own.py": "def centred(batch, settings):\n    return batch.rewards_T, batch.rewards_T\n",
    "broken.py": "def compute_score(:\n",
    "answers.jsonl": '{"prompt": "1+1?", "answer": "2"}\n',
    "tools.jsonl": 8 * '{"prompt": "1+1?", "ground_truth": "2", "tools": [{"type": "function"}]}\n',
    "no_prompt.jsonl": '{"prompt": null, "ground_truth": "2"}\n',
    "nulls.jsonl": 101 * '{"prompt": "1+1?", "ground_truth": null}\n',
    "dense/config.json": json.dumps(DENSE),
    "experts/config.json": json.dumps(
        {**DENSE, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2}
    ),
    "words/tokenizer.json": json.dumps(WORDS),
    "story.jsonl": '{"prompt": "once upon a time", "ground_truth": "1"}\n' * 8,
    "short/config.json": json.dumps({**DENSE, "max_position_embeddings": 64}),
    "models/dense/config.json": json.dumps(DENSE),
    "mistral/config.json": json.dumps({**DENSE, "model_type": "mistral"}),
    "sees/config.json": json.dumps({"model_type": "qwen2_5_vl", "text_config": DENSE, "vision_config": {}}),
    "tiles/config.json": json.dumps({"model_type": "internvl", "text_config": DENSE, "vision_config": {}}),
}


@dataclass(frozen=True)
class Case:
    """A broken configuration, and the locations, severities, codes and keys of its diagnostics."""

    name: str
    arguments: tuple[str, ...]
    machine: str
    text: str
    expected: tuple[str, ...]

    def answer(self) -> list[Problem]:
        """Return all diagnostics except those of defaults that are missing on this machine."""
        Path("run.yaml").write_text(self.text, encoding="utf-8")
        backend = self.arguments[1] if self.arguments[:1] == ("--backend",) else None
        overrides = self.arguments[2 if backend else 0 :]
        with MACHINES[self.machine]():
            problems = load("run.yaml", overrides, backend).problems
        return [
            p for p in problems if p.severity not in ("input", "unsupported") or p.line or self.machine == "!"
        ]


@contextmanager
def _bare_machine() -> Iterator[None]:
    """Hide backends, engines and trackers, and install a package that is broken."""
    broken = EntryPoint("old", "no_such_module:TRACKER", TRACKERS.group)

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    with (
        mock.patch(
            "iiverl_core.registry.registry.entry_points",
            lambda group: [broken] if group == TRACKERS.group else [],
        ),
        mock.patch("iiverl_core.config.vllm.version", absent),
        mock.patch("importlib.util.find_spec", lambda *_: None),
    ):
        _read_entry_points()
        yield
    _read_entry_points()


def _read_entry_points() -> None:
    for registry in REGISTRIES:
        registry.reload()


@contextmanager
def _cpu_machine() -> Iterator[None]:
    """Show vLLM's build for CPUs."""
    with mock.patch("iiverl_core.config.vllm.version", lambda _: "0.32.0+cpu"):
        yield


MACHINES = {"": nullcontext, "!": _bare_machine, "!cpu": _cpu_machine}
"""What a case sees of the machine, by its line that begins with `!`."""


def cases() -> list[Case]:
    """Read the corpus."""
    return [_case(text) for text in BROKEN.read_text(encoding="utf-8").split("==== ")[1:]]


def _case(written: str) -> Case:
    given, _, expected = written.partition(">>>>\n")
    name, _, text = given.partition("\n")
    arguments, machine = (), ""
    if text.startswith("!"):
        machine, _, text = text.partition("\n")
    if text.startswith("$ "):
        line, _, text = text.partition("\n")
        arguments = tuple(line.split(" ")[1:])
    return Case(name, arguments, machine, text, tuple(expected.split("\n")[:-1]))


def make_files(folder: Path) -> None:
    """Make what cases name on disk."""
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    row = {"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}
    pq.write_table(pa.Table.from_pylist([row] * 1024), folder / "train.parquet")  # a default step
    (folder / "empty").mkdir()


def without_messages(problems: list[Problem]) -> tuple[str, ...]:
    """Render place, severity, code and key."""
    return tuple(
        line.removesuffix(f": {problem.message}")
        for problem, line in zip(problems, map(rendered, problems), strict=True)
    )


def rendered(problem: Problem) -> str:
    """Render a diagnostic, with the working folder as `/here`."""
    return render([problem]).replace(str(Path.cwd()), "/here")


def wording(corpus: list[Case]) -> str:
    """Render all answers."""
    return "".join(
        f"==== {case.name}\n" + "".join(f"{rendered(problem)}\n" for problem in case.answer())
        for case in corpus
    )


def reference(corpus: list[Case]) -> str:
    """Write a table of all diagnostics, each with the shortest message that the corpus has of it."""
    messages: dict[str, list[str]] = {code: [] for code in DIAGNOSTICS}
    for case in corpus:
        for problem in case.answer():
            key = f"`{problem.key}`: " if problem.key else ""
            messages[problem.code].append(key + problem.message.replace(str(Path.cwd()), "/here"))
    messages["C001"].append("the file does not exist")
    rows = (f"| {code} | {name} | {min(messages[code], key=len)} |\n" for code, name in DIAGNOSTICS.items())
    return HEAD + "".join(rows)


def main() -> None:
    """Write `wording.txt` and `docs/diagnostics.md`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["HOME"] = folder
        make_files(Path(folder))
        WORDING.write_text(wording(cases()), encoding="utf-8")
        REFERENCE.write_text(reference(cases()), encoding="utf-8")


if __name__ == "__main__":
    main()

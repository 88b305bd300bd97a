"""Broken configurations, and the exact words that each must be answered with."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iiverl_core.config import load, render

CORPUS = Path(__file__).with_name("broken.txt")


def _cases() -> Iterator[tuple[str, list[str], str, str]]:
    """Name, arguments, YAML and expected lines of each case.

    A case begins with `==== its name`; a line with `$` holds arguments; the YAML ends at `>>>>`, and the answer follows.
    """
    for case in CORPUS.read_text(encoding="utf-8").split("==== ")[1:]:
        given, _, expected = case.partition(">>>>\n")
        name, _, text = given.partition("\n")
        arguments = []
        if text.startswith("$ "):
            line, _, text = text.partition("\n")
            arguments = line.split(" ")[1:]
        yield name, arguments, text, expected.strip("\n")


CASES = list(_cases())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file with a row for each prompt of a default step."""
    path = tmp_path_factory.mktemp("dataset") / "train.parquet"
    row = {"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}
    pq.write_table(pa.Table.from_pylist([row] * 1024), path)
    return path


@pytest.fixture(autouse=True)
def folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a few files for the cases to name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("rewards.py").write_text("def compute_score(**_):\n    return 1.0\n")
    Path("own.py").write_text("def centred(batch, settings):\n    return batch.rewards_T, batch.rewards_T\n")
    Path("broken.py").write_text("def compute_score(:\n")
    Path("train.parquet").hardlink_to(dataset)
    Path("empty").mkdir()
    return tmp_path


def answer(text: str, arguments: list[str]) -> str:
    """All that is told, but for what the defaults name and this machine does not have."""
    Path("run.yaml").write_text(text, encoding="utf-8")
    backend = arguments[1] if arguments[:1] == ["--backend"] else None
    loaded = load("run.yaml", [] if backend else arguments, backend)
    told = [p for p in loaded.problems if p.severity not in ("input", "here") or p.line]
    return render(told).replace(str(Path.cwd()), "/here")


@pytest.mark.parametrize(("arguments", "text", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_broken_configuration_is_answered(arguments: list[str], text: str, expected: str) -> None:
    assert expected, "a case says what it must be answered with"
    assert answer(text, arguments) == expected


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 60
    assert len({name for name, *_ in CASES}) == len(CASES)

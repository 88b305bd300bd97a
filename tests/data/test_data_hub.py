"""Datasets of the Hugging Face Hub, loaded in a process of its own from a Hub on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.hub_server import HubServer

README = b"""---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train-*.parquet}
  - {split: test, path: main/test-*.parquet}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*.parquet}
---
# A dataset
"""

LOAD = """
import json, sys, time
time.sleep = lambda seconds: None  # the Hub's client waits longer and longer between its attempts
from iiverl_core.data import DataError, load_table, parse_dataset
answers = []
for name, split in json.load(sys.stdin):
    try:
        table = load_table(parse_dataset(name, split))
        answers.append({"name": table.name, "prompts": [table.row(i)["prompt"] for i in range(len(table))]})
    except DataError as error:
        answers.append({"error": str(error)})
json.dump(answers, sys.stdout)
"""

ONLINE = {
    "default": ("org/sums", "train"),
    "other split": ("org/sums", "test"),
    "slice": ("org/sums", "train[1:]+test[:1]"),
    "named config": ("org/sums:socratic", "train"),
    "revision": ("org/sums@v1", "train"),
    "config and revision": ("org/sums:socratic@v1", "train"),
    "no card": ("org/plain", "test"),
    "no dataset": ("org/nothing", "train"),
    "no split": ("org/sums", "tests"),
    "no split in config": ("org/sums:socratic", "test"),
    "no config": ("org/sums:platonic", "train"),
    "no default config": ("org/several", "train"),
    "no revision": ("org/sums@v7", "train"),
    "no data": ("org/nodata", "train"),
    "script": ("org/script", "train"),
    "broken file": ("org/broken", "train"),
    "refused": ("org/refused", "train"),
}
OFFLINE = {
    "uncached": ("org/uncached", "train"),
    "cached": ("org/plain", "test"),
    "cached config": ("org/sums:socratic@v1", "train"),
    "uncached config": ("org/sums:platonic", "train"),
    "uncached revision": ("org/sums:main@v9", "train"),
    "default config": ("org/sums", "train"),
    "revision that is not the cached one": ("org/sums:main@main", "train"),
}


def parquet(*prompts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": list(prompts)}), file)
    return file.getvalue()


def fill(hub: HubServer) -> None:
    part = "-00000-of-00001.parquet"
    sums = {
        "README.md": README,
        f"main/train{part}": parquet("1+1", "1+2"),
        f"main/test{part}": parquet("2+2"),
        f"socratic/train{part}": parquet("what is a sum?"),
    }
    hub.add("org/sums", sums)
    old = {f"main/train{part}": parquet("0+0"), f"socratic/train{part}": parquet("what was a sum?")}
    hub.add("org/sums", {**sums, **old}, revision="v1")
    lines = {"train.jsonl": b'{"prompt": "a"}\n', "test.jsonl": b'{"prompt": "b"}\n'}
    hub.add("org/plain", lines)
    hub.add("org/several", {**sums, "README.md": README.replace(b"  default: true\n", b"")})
    hub.add("org/nodata", {"README.md": b"# Nothing here"})
    hub.add("org/script", {"script.py": b"print()"})
    hub.add("org/broken", {"train.parquet": b"neither of the two"})
    hub.refuse("org/refused")


def load(cases: dict[str, tuple[str, str]], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """What each case comes to: a table's name and prompts, or an error's message."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps(list(cases.values())),
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(cases, json.loads(process.stdout), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(hub: HubServer, folder: Path) -> dict[str, Any]:
    fill(hub)
    return load(ONLINE, hub.environment(str(folder / "home")), folder)


@pytest.fixture(scope="module")
def offline(online: dict[str, Any], folder: Path) -> dict[str, Any]:
    """After `online`, with the same caches, and no server any more."""
    with HubServer() as gone:
        environment = gone.environment(str(folder / "home"))
    return load(OFFLINE, environment, folder)


@pytest.mark.parametrize(
    ("case", "prompts"),
    [
        ("default", ["1+1", "1+2"]),
        ("other split", ["2+2"]),
        ("slice", ["1+2", "2+2"]),
        ("named config", ["what is a sum?"]),
        ("revision", ["0+0"]),
        ("config and revision", ["what was a sum?"]),
        ("no card", ["b"]),
    ],
)
def test_a_dataset_is_loaded(online: dict[str, Any], case: str, prompts: list[str]) -> None:
    name, split = ONLINE[case]
    assert online[case] == {"name": f"{name} ({split})", "prompts": prompts}


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (
            "no dataset",
            ["no dataset org/nothing on {url}, and no such path in {folder}.", "Check the spelling"],
        ),
        ("no split", ["org/sums has no split 'tests'; did you mean 'test'?", "It has: train, test."]),
        ("no split in config", ["org/sums:socratic has no split 'test'", "It has: train."]),
        ("no config", ["org/sums has no configuration 'platonic'", "org/sums:main, org/sums:socratic"]),
        (
            "no default config",
            ["org/several has several configurations", "org/several:main, org/several:socratic"],
        ),
        ("no revision", ["org/sums has no revision 'v7' on {url}", "a branch, a tag or a commit"]),
        ("no data", ["org/nodata cannot be loaded from {url}", "doesn't contain any data files"]),
        ("script", ["org/script needs a loading script", "org/script@refs/convert/parquet"]),
        ("broken file", ["org/broken cannot be loaded", "Parquet"]),
        ("refused", ["org/refused on {url} is gated.", "hf auth login"]),
    ],
)
def test_what_is_not_there_is_told(
    online: dict[str, Any], hub: HubServer, folder: Path, case: str, parts: list[str]
) -> None:
    for part in parts:
        assert part.format(url=hub.url, folder=folder) in online[case]["error"]


def test_without_a_network_the_cache_answers(offline: dict[str, Any]) -> None:
    assert offline["cached"]["prompts"] == ["b"]
    assert offline["cached config"]["prompts"] == ["what was a sum?"]


@pytest.mark.parametrize("case", ["uncached", "uncached config", "default config"])
def test_a_hub_that_does_not_answer_is_told(offline: dict[str, Any], folder: Path, case: str) -> None:
    message = offline[case]["error"]
    assert f"cannot be reached for {OFFLINE[case][0]}, and the cache ({folder}" in message
    assert "HF_HOME" in message


@pytest.mark.parametrize("case", ["uncached revision", "revision that is not the cached one"])
def test_the_cache_never_answers_with_another_revision(offline: dict[str, Any], case: str) -> None:
    name = OFFLINE[case][0]
    assert (
        f"cannot be reached for {name}, and the copy in the cache is of another revision"
        in offline[case]["error"]
    )

"""The first difference of two runs is found and named, wherever it is."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_core.checkpoints import CONFIG_FILE, VERSIONS_FILE, write
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.run_diff import Compared, diff_runs
from iiverl_core.telemetry.samples import SCHEMA

STEPS, GROUPS, MEMBERS = 6, 3, 2
SAVED = (2, 4, 6)
METRICS = ("critic/score/mean", "actor/grad_norm", "actor/entropy_loss")
COLUMNS: dict[str, Any] = {"response": "other", "score": 0.125, "advantage": -7.0, "finish_reason": "length"}


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"model.layer{i}.weight": torch.randn(3, 4, generator=generator) for i in range(3)}


def save(folder: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    with write(folder, step) as files:
        state_dict_saver.save(state, checkpoint_id=files / "actor", no_dist=True)


def sample(step: int, group: int, member: int) -> dict[str, Any]:
    return {
        "step": step, "group": group, "member": member, "prompt": f"p{group}", "response": f"r{step}{group}{member}",
        "outcome": "scored", "score": 0.5, "advantage": 0.25, "finish_reason": "stop",
    }  # fmt: skip


def dump(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "samples" / f"{step}.parquet")


def rows_of(folder: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as one leaves it: metrics, samples, checkpoints, configuration."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    folder.mkdir()
    write_lines(
        folder,
        [
            {"step": step, "time": 1.5 * step, "timing_s/gen": 0.1} | {name: step / (i + 3) for i, name in enumerate(METRICS)}
            for step in range(1, STEPS + 1)
        ],
    )  # fmt: skip
    for step in range(1, STEPS + 1):
        dump(folder, step, [sample(step, g, m) for g in range(GROUPS) for m in range(MEMBERS)])
    for step in SAVED:
        save(folder, step, tensors(step))
    (folder / CONFIG_FILE).write_text(json.dumps({"trainer": {"nnodes": 1}, "data": {"seed": 1}}))
    (folder / VERSIONS_FILE).write_text(json.dumps({"torch": "2.11"}))
    return folder


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "other"))


def by_kind(one: Path, two: Path) -> dict[str, Compared]:
    return {each.kind: each for each in diff_runs(one, two).results}


def test_equal_runs(run: Path, other: Path) -> None:
    lines = lines_of(other)
    for line in lines:
        line["time"], line["timing_s/gen"] = 0.0, 9.0  # clocks do not count
    write_lines(other, lines)
    found = diff_runs(run, other)
    assert found.configuration == []
    assert [(each.kind, each.count, each.equal, each.only) for each in found.results] == [
        ("metrics", STEPS, True, []),
        ("samples", STEPS, True, []),
        ("checkpoints", len(SAVED), True, []),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_change_is_named(run: Path, other: Path, seed: int) -> None:
    """Change something from a random step on: the smallest change there is, of one number or text."""
    chance = random.Random(seed)
    kind = ("metrics", "samples", "checkpoints")[seed % 3]
    first = chance.choice(SAVED) if kind == "checkpoints" else chance.randint(1, STEPS)
    if kind == "metrics":
        name, lines = chance.choice(METRICS), lines_of(other)
        for line in lines[first - 1 :]:
            line[name] = float(
                torch.nextafter(torch.tensor(line[name], dtype=torch.float64), torch.tensor(9.0))
            )
        write_lines(other, lines)
        place, named = f"step {first}", name
    elif kind == "samples":
        column, group, member = (
            chance.choice(list(COLUMNS)),
            chance.randrange(GROUPS),
            chance.randrange(MEMBERS),
        )
        for step in range(first, STEPS + 1):
            rows = rows_of(other, step)
            rows[group * MEMBERS + member][column] = COLUMNS[column]
            dump(other, step, rows)
        place, named = f"step {first}", f"group {group}, response {member}: {column}"
    else:
        name = f"model.layer{chance.randrange(3)}.weight"
        for step in SAVED:
            if step >= first:
                state = tensors(step)
                state[name].view(-1)[chance.randrange(12)] += 1e-6
                save(other, step, state)
        place, named = f"global_step_{first}", f"actor: {name} differs by up to"
    for found in by_kind(run, other).values():
        if found.kind == kind:
            assert (found.place, found.others, len(found.different)) == (place, 0, 1)
            assert named in found.different[0]
        else:
            assert found.equal


def test_what_only_one_has(run: Path, other: Path) -> None:
    write_lines(other, lines_of(other)[:-1])
    (other / "samples" / "2.parquet").unlink()
    shutil.rmtree(other / "global_step_2")
    found = by_kind(run, other)
    assert [found[kind].only for kind in found] == [[f"step {STEPS}"], ["step 2"], ["global_step_2"]]
    dump(other, 1, rows_of(other, 1)[:-1])
    assert by_kind(run, other)["samples"].different == [
        f"group {GROUPS - 1}, response {MEMBERS - 1}: only in one of them"
    ]


def test_configurations_and_versions(run: Path, other: Path) -> None:
    (other / CONFIG_FILE).write_text(
        json.dumps({"trainer": {"nnodes": 2}, "data": {"seed": 1, "shuffle": True}})
    )
    (other / VERSIONS_FILE).write_text(json.dumps({"torch": "2.12"}))
    assert diff_runs(run, other).configuration == [
        "data.shuffle: (unknown) -> True",
        "trainer.nnodes: 1 -> 2",
        "torch: 2.11 -> 2.12",
    ]
    (other / CONFIG_FILE).unlink()
    assert diff_runs(run, other).configuration is None


def test_two_runs_of_the_trainer(quickstart: Callable[..., Loaded], tmp_path: Path) -> None:
    """One seed gives equal runs; another one differs from the first step on; and the command says so."""
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(
            quickstart(
                "trainer.total_training_steps=2", "trainer.save_freq=1", f"data.seed={seed}", folder=folder
            )
        )
    same = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert same.exit_code == 0 and "metrics: equal in 2 steps" in same.output, same.output
    assert "checkpoints: equal in" in same.output
    different = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "c")])
    assert different.exit_code == 1 and "data.seed: 1 -> 2" in different.output
    assert "metrics: different from step 1 on" in different.output
    assert (tmp_path / "a" / "report.html").stat().st_size > 20_000
    missing = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path)])
    assert missing.exit_code == 2 and "has no metrics.jsonl" in missing.output

"""Old checkpoints are deleted by number, but never the best and never the only one."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.checkpoints import (
    Checkpoint,
    best,
    checkpoints,
    keep_limit,
    latest,
    prune,
    superfluous,
    write,
)


def checkpoint(serial: int, step: int, score: float | None = None) -> Checkpoint:
    metrics = {} if score is None else {"score": score}
    return Checkpoint(Path(f"global_step_{step}"), step, serial, 0.0, metrics, {})


def save(root: Path, step: int, score: float | None = None) -> None:
    with write(root, step, metrics={} if score is None else {"score": score}) as folder:
        (folder / "weights").write_bytes(b"w")


@pytest.mark.parametrize(
    ("actor", "critic", "only_last", "limit"),
    [(None, None, False, None), (3, None, False, 3), (3, 2, False, 2), (None, 4, False, 4), (3, 2, True, 1)],
)
def test_checkpoints_are_whole_so_the_smaller_limit_counts(
    actor: int | None, critic: int | None, only_last: bool, limit: int | None
) -> None:
    assert keep_limit(actor, critic, only_last=only_last) == limit


@given(
    st.lists(st.tuples(st.integers(1, 50), st.none() | st.floats(-1, 1)), max_size=12),
    st.none() | st.integers(1, 5),
    st.sampled_from([None, "score"]),
)
def test_the_newest_and_the_best_are_kept(
    saved: list[tuple[int, float | None]], limit: int | None, metric: str | None
) -> None:
    known = [checkpoint(serial, step, score) for serial, (step, score) in enumerate(saved)]
    gone = superfluous(list(reversed(known)), limit, metric)
    kept = [each for each in known if each not in gone]
    assert kept[-1:] == known[-1:]
    if limit is None:
        assert not gone
    else:
        assert {each.serial for each in kept} >= {each.serial for each in known[-limit:]}
        assert len(kept) <= limit + (metric is not None)
    if metric:
        assert best(known, metric) == best(kept, metric)


def test_the_best_is_known_after_a_restart_and_the_newest_of_equals_wins(tmp_path: Path) -> None:
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, 0.9), (6, 0.1)):
        save(tmp_path, step, score)
        prune(tmp_path, 2, "score", warn=pytest.fail)
    assert [each.step for each in checkpoints(tmp_path)] == [5, 6]
    save(tmp_path, 7, float("nan"))
    assert [each.step for each in prune(tmp_path, 1, "score", warn=pytest.fail)] == [6]
    champion = best(checkpoints(tmp_path), "score")
    assert champion is not None and champion.step == 5


def test_after_going_back_those_of_the_earlier_life_go_first(tmp_path: Path) -> None:
    for step in (10, 20, 5):
        save(tmp_path, step)
    assert [each.step for each in prune(tmp_path, 2, warn=pytest.fail)] == [10]
    assert [each.step for each in checkpoints(tmp_path)] == [20, 5]


def test_what_is_broken_or_not_ours_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "global_step_3" / "manifest.json").write_text("{")
    (tmp_path / "global_step_9" / "actor").mkdir(parents=True)
    assert prune(tmp_path, 2, warn=pytest.fail) == []
    assert [each.step for each in prune(tmp_path, 1, warn=pytest.fail)] == [1]
    assert (tmp_path / "global_step_3").exists() and (tmp_path / "global_step_9").exists()


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:

        def refuse(path: Path, **options: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        patch.setattr(shutil, "rmtree", refuse)
        warnings: list[str] = []
        assert prune(tmp_path, 1, warn=warnings.append) == []
        assert len(warnings) == 1 and "global_step_1 could not be deleted" in warnings[0]
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 2

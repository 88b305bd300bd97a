"""Checkpoint folders: whole or absent after any fault, and never used unless they are as written."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.checkpoints import (
    MANIFEST,
    POINTER,
    check_space,
    check_writable,
    checkpoints,
    clean,
    delete,
    files_in,
    latest,
    read_json,
    to_json,
    verify,
    write,
)
from iiverl_core.errors import CheckpointError

CONTENT = {
    "actor/model.distcp": b"weights" * 40,
    "critic/model.distcp": b"values" * 30,
    "train_state.json": b'{"step": 1}',
}


def save(root: Path, step: int, mark: bytes = b"", **options: Any) -> Path:
    with write(root, step, **options) as folder:
        for name, content in CONTENT.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content + mark)
    return root / f"global_step_{step}"


def newest(root: Path) -> int | None:
    found = latest(root).checkpoint
    return found.step if found else None


def test_a_checkpoint_lists_its_files_and_is_pointed_to(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 5, metrics={"score": 0.5, "lost": float("nan")})
    checkpoint = verify(folder)
    assert (checkpoint.step, checkpoint.serial, checkpoint.metrics) == (5, 1, {"score": 0.5})
    assert checkpoint.roles == {"actor", "critic"}
    assert checkpoint.size == sum(map(len, CONTENT.values()))
    assert set(checkpoint.files) == set(CONTENT)
    assert (tmp_path / "run" / POINTER).read_text() == "5"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["global_step_5", POINTER]
    found = latest(tmp_path / "run")
    assert (found.checkpoint, found.passed_over, found.pointer_problem) == (checkpoint, (), None)


def test_there_is_nothing_in_a_folder_without_checkpoints(tmp_path: Path) -> None:
    found = latest(tmp_path / "nowhere")
    assert (found.checkpoint, found.passed_over, found.pointer_problem) == (None, (), None)
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / "global_step_3").write_text("a file")
    assert latest(tmp_path).checkpoint is None


def test_the_newest_is_the_one_published_last_whatever_its_step(tmp_path: Path) -> None:
    for step in (8, 10, 6):  # the run went back from step 10 to an earlier one
        save(tmp_path, step)
    assert newest(tmp_path) == 6
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [8, 10, 6]


def test_progress_ends_at_the_whole_size(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = save(tmp_path, 1, progress=lambda done, total: told.append((done, total)))
    size = verify(folder).size
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (size, size)


def test_json_keeps_the_bits_of_floats(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(to_json({"a": 0.1 + 0.2, "ü": [1e-323]}), "utf-8")
    assert read_json(tmp_path / "x.json") == {"a": 0.1 + 0.2, "ü": [1e-323]}
    with pytest.raises(CheckpointError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")


def test_a_file_that_only_its_writer_sees_is_a_file_system_that_is_not_shared(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with (
        pytest.raises(CheckpointError, match="all machines share"),
        write(tmp_path, 2, expected={"actor/rank1.pt": 4}) as folder,
    ):
        (folder / "rank0.pt").write_bytes(b"1234")
    assert newest(tmp_path) == 1
    expected: dict[str, int] = {}
    with write(tmp_path, 2, expected=expected) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "rank1.pt").write_bytes(b"1234")
        expected |= files_in(folder)
    assert newest(tmp_path) == 2


class Killed(BaseException):
    """The process is gone: nothing that it would do afterwards happens."""


CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "stat", "scandir")


@pytest.fixture
def fault() -> Iterator[Callable[[int, BaseException | None], list[str]]]:
    """Let the n-th call into the file system, and with Killed all later ones, fail; gives the calls made."""

    patch = pytest.MonkeyPatch()

    def arm(n: int, error: BaseException | None) -> list[str]:
        patch.undo()
        made: list[str] = []

        def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                made.append(name)
                if error is not None and (len(made) == n or (isinstance(error, Killed) and len(made) > n)):
                    raise error
                return real(*args, **kwargs)

            return call

        for name in CALLS if error is not None else ():
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        return made

    yield arm
    patch.undo()


@pytest.mark.parametrize("step", [2, 1], ids=["another step", "the same step again"])
def test_a_kill_between_any_two_calls_leaves_a_valid_checkpoint(
    tmp_path: Path, fault: Callable[[int, BaseException | None], list[str]], step: int
) -> None:
    ways = set()
    for n in range(1, 1000):
        root = tmp_path / str(n)
        save(root, 1)
        old = verify(root / "global_step_1").files
        fault(n, Killed())
        try:
            save(root, step, b"new")
        except Killed:
            pass
        else:
            break
        finally:
            fault(0, None)
        clean(root)
        found = latest(root)
        assert found.checkpoint is not None and found.passed_over == ()
        is_new = found.checkpoint.serial == 2
        assert is_new or found.checkpoint.files == old
        ways.add((is_new, found.pointer_problem is None))
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        if n % 8 == 0:
            save(root, 3)
            assert newest(root) == 3
        shutil.rmtree(root)
    assert n > 20
    assert ways >= {(False, True), (True, True)}
    assert step == 1 or (True, False) in ways  # published, and the pointer names the one before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_call_is_one_message_and_leaves_nothing_half_written(
    tmp_path: Path, fault: Callable[[int, BaseException | None], list[str]], code: int
) -> None:
    refused = 0
    for n in range(1, 1000):
        root = tmp_path / str(n)
        save(root, 1)
        made = fault(n, OSError(code, os.strerror(code)))
        try:
            save(root, 2)
        except CheckpointError as error:
            refused += 1
            assert str(root) in str(error)
        finally:
            reached = len(made) >= n
            fault(0, None)
        if not reached:
            break
        assert newest(root) in (1, 2)
        assert verify(root / "global_step_1")
        assert {path.name for path in root.iterdir()} <= {"global_step_1", "global_step_2", POINTER}
        shutil.rmtree(root)
    assert refused > 15


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renamed(source: Any, target: Any, **options: Any) -> None:
        events.append(("rename", str(source)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path, 4)
    temporary = tmp_path / ".global_step_4.tmp"
    before = {path for kind, path in events[: events.index(("rename", str(temporary)))] if kind == "sync"}
    wanted = [temporary, *(temporary / name for name in ("actor", "critic", MANIFEST, *CONTENT))]
    assert before >= set(map(str, wanted))
    after = [path for kind, path in events[events.index(("rename", str(temporary))) :] if kind == "sync"]
    assert after[0] == str(tmp_path)


def test_a_failure_of_the_writer_removes_what_it_wrote(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), write(tmp_path, 2) as folder:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="no space is left"), write(tmp_path, 2) as folder:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", POINTER]


def test_a_leftover_of_a_killed_save_is_no_checkpoint_and_goes_with_the_next(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "global_step_1", tmp_path / ".global_step_9.tmp")
    assert newest(tmp_path) == 1
    save(tmp_path, 2)
    assert not (tmp_path / ".global_step_9.tmp").exists()


def test_an_interrupted_deletion_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, fault: Callable[[int, BaseException | None], list[str]]
) -> None:
    for n in range(1, 100):
        for step in (1, 2):
            save(tmp_path, step)
        fault(n, Killed())
        try:
            delete(tmp_path / "global_step_1")
        except Killed:
            pass
        else:
            break
        finally:
            fault(0, None)
        whole = {checkpoint.step for checkpoint in checkpoints(tmp_path) if verify(checkpoint.folder)}
        assert whole in ({1, 2}, {2})
        clean(tmp_path)
        assert latest(tmp_path).passed_over == ()
    assert n > 5


def test_a_folder_that_iiverl_did_not_write_is_kept_when_its_name_is_needed(tmp_path: Path) -> None:
    shards = tmp_path / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt"
    shards.parent.mkdir(parents=True)
    shards.write_bytes(b"verl's")
    save(tmp_path, 2)
    assert newest(tmp_path) == 2
    assert (tmp_path / "global_step_2.kept-1" / "actor" / shards.name).read_bytes() == b"verl's"


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"default_local_dir"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    check_space(tmp_path / "to" / "come", 1)
    with pytest.raises(CheckpointError, match=r"takes about 1\.05e\+06 TiB, and .* left"):
        check_space(tmp_path / "to" / "come", 1 << 60)
    assert list(tmp_path.iterdir()) == []

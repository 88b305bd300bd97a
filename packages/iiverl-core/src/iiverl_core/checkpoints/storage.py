"""Checkpoint folders: written under a temporary name, published by one rename, and verified by their manifest.

A checkpoint is `{root}/global_step_N` with a `manifest.json` that lists size and SHA-256 of every other file; a folder
without a valid manifest is not a checkpoint. While it is written, the folder is called `.global_step_N.tmp`. Everything
is synced to disk before the rename, so a crash at any point leaves either the new checkpoint or the ones before it.

`.global_step_N.old` is a checkpoint that is being replaced by another of the same step, and `.global_step_N.deleted`
one that is being deleted. `.global_step_N.weights` has weights converted for another backend. `clean` completes or reverts the operations of a killed run.
"""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from iiverl_core.checkpoints.manifest import (
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    Report,
    describe_read_error,
    hash_files,
    manifest_bytes,
    read_manifest,
    verify,
)
from iiverl_core.errors import CheckpointError, join_names

POINTER = "latest_checkpointed_iteration.txt"

HIDDEN_FOLDER = re.compile(r"\.global_step_(\d+)\.(tmp|old|deleted|weights)")

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors of file systems that cannot sync a folder; they order renames by themselves."""


class PassedOver(NamedTuple):
    """A `global_step_N` folder that is not a valid checkpoint, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Latest:
    """The newest valid checkpoint, and all folders that look newer or cannot be ordered.

    `pointer_problem` describes what is wrong with `latest_checkpointed_iteration.txt`, which is never relied on.
    """

    checkpoint: Checkpoint | None
    passed_over: tuple[PassedOver, ...] = ()
    pointer_problem: str | None = None


@contextmanager
def write(
    root: Path,
    step: int,
    *,
    metrics: Mapping[str, float] | None = None,
    expected: Mapping[str, int] | None = None,
    progress: Report | None = None,
) -> Iterator[Path]:
    """Yield a folder for the files of a checkpoint; at the end of the block it becomes `{root}/global_step_{step}`.

    Any number of processes may write into the folder until the block ends. If the block or the publishing fails, the
    folder is removed and older checkpoints are untouched. A checkpoint of the same step is replaced.

    Args:
        root: the run's folder, `trainer.default_local_dir`.
        metrics: metrics of the step, to select the best checkpoint; may be filled until the block ends. Values that
            are not finite are dropped.
        expected: files that the processes have written, with their sizes (see `files_in`); may be filled until the
            block ends. A file that is missing here means that the machines do not share the file system.
        progress: called with the progress of hashing.

    Raises:
        CheckpointError: the folder cannot be written, or a file of `expected` is missing.
    """
    folder = root / f".global_step_{step}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean(root)
        folder.mkdir()
        yield folder
        _publish(folder, step, metrics or {}, expected or {}, progress)
    except OSError as error:
        _undo(root)
        raise write_failure(root, error) from error
    except BaseException:
        _undo(root)
        raise


def _undo(root: Path) -> None:
    """Remove the files of a failed save if possible; the next `clean` removes the rest."""
    with suppress(OSError):
        clean(root)


def _publish(
    folder: Path,
    step: int,
    metrics: Mapping[str, float],
    expected: Mapping[str, int],
    progress: Report | None,
) -> None:
    root, final = folder.parent, folder.with_name(f"global_step_{step}")
    replaced = folder.with_name(f".global_step_{step}.old")
    sizes = files_in(folder)
    _check_expected(folder, sizes, expected)
    checkpoint = Checkpoint(
        folder=folder,
        step=step,
        serial=1 + max((known.serial for known in checkpoints(root)), default=0),
        created=time.time(),
        metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
        files=hash_files(folder, sizes, progress, sync=True),
    )
    _write_file(folder / MANIFEST, manifest_bytes(checkpoint))
    for directory, _, _ in os.walk(folder, topdown=False):
        _sync_folder(Path(directory))
    if final.exists():
        final.rename(replaced if (final / MANIFEST).exists() else _free_name(final))
    folder.rename(final)
    _sync_folder(root)
    pointer = root / f".{POINTER}.tmp"
    _write_file(pointer, str(step).encode())
    pointer.replace(root / POINTER)
    _sync_folder(root)
    shutil.rmtree(replaced, ignore_errors=True)


def _free_name(folder: Path) -> Path:
    """Choose a new name for an existing folder that iiverl did not write and therefore keeps."""
    names = (folder.with_name(f"{folder.name}.kept-{i}") for i in count(1))
    return next(name for name in names if not name.exists())


def _check_expected(folder: Path, sizes: Mapping[str, int], expected: Mapping[str, int]) -> None:
    unseen = [name for name, size in expected.items() if sizes.get(name) != size]
    if unseen:
        raise CheckpointError(
            f"{join_names(unseen)} of {folder} cannot be seen whole from the process that leads the run.\n"
            "Set trainer.default_local_dir to a folder on a file system that all machines share."
        )


def clean(root: Path) -> None:
    """Clean up after a killed run: remove unfinished saves and deletions, restore replaced checkpoints.

    Call it only in the run that owns the folder, before it looks for a checkpoint.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if found := HIDDEN_FOLDER.fullmatch(path.name):
            final = root / f"global_step_{found[1]}"
            if found[2] == "old" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name == f".{POINTER}.tmp":
            path.unlink()


def delete(folder: Path) -> None:
    """Delete a checkpoint; if interrupted, nothing that looks like a checkpoint remains."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # left by an earlier deletion
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(root: Path) -> list[Checkpoint]:
    """Find the checkpoints of a run that have a valid manifest, oldest first. Their other files are not checked."""
    found = []
    for folder in step_folders(root):
        with suppress(CheckpointError):
            found.append(read_manifest(folder))
    return sorted(found, key=lambda checkpoint: checkpoint.serial)


def latest(root: Path, *, hashes: bool = True, progress: Report | None = None) -> Latest:
    """Find the newest valid checkpoint of a run. Changes nothing; a run calls `clean` first."""
    passed_over: list[PassedOver] = []
    readable: list[Checkpoint] = []
    for folder in reversed(step_folders(root)):
        try:
            readable.append(read_manifest(folder))
        except CheckpointError as error:
            passed_over.append(PassedOver(folder, str(error)))
    for checkpoint in sorted(readable, key=lambda known: known.serial, reverse=True):
        try:
            verify(checkpoint.folder, hashes=hashes, progress=progress)
        except CheckpointError as error:
            passed_over.append(PassedOver(checkpoint.folder, str(error)))
        else:
            return Latest(checkpoint, tuple(passed_over), _pointer_problem(root, checkpoint))
    return Latest(None, tuple(passed_over), _pointer_problem(root, None))


def step_folders(root: Path) -> list[Path]:
    """List the folders called `global_step_N`, sorted by N."""
    try:
        found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}") from error
    return sorted(found, key=lambda folder: int(folder.name.rpartition("_")[2]))


def _pointer_problem(root: Path, newest: Checkpoint | None) -> str | None:
    path = root / POINTER
    try:
        text = path.read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        return f"{path} is missing" if newest else None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not re.fullmatch(r"[0-9]{1,18}", text):
        return f"{path} holds no step, but {text[:40]!r}"
    if newest is None:
        return f"{path} names step {int(text)}, of which there is no valid checkpoint"
    if int(text) == newest.step:
        return None
    return f"{path} names step {int(text)}, and the newest valid checkpoint is that of step {newest.step}"


def check_writable(root: Path) -> None:
    """Check that checkpoints can be written to `root`, creating it if needed.

    Raises:
        CheckpointError: they cannot.
    """
    probe = root / f".writable-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write_file(probe, b"x")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise write_failure(root, error) from error


def check_space(root: Path, needed: int) -> None:
    """Check that `needed` bytes are free on the file system of `root`, which need not exist. Ignores quotas.

    Raises:
        CheckpointError: fewer bytes are free.
    """
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise write_failure(root, error) from error
    if free < needed:
        raise CheckpointError(
            f"A checkpoint takes about {format_size(needed)}, and {root} has {format_size(free)} left.\n"
            "Free some space, set trainer.default_local_dir to a larger disk, or keep fewer checkpoints "
            "(trainer.max_actor_ckpt_to_keep)."
        )


def write_failure(root: Path, error: OSError) -> CheckpointError:
    """Convert an error of the file system to a message for the user."""
    elsewhere = "set trainer.default_local_dir to another folder"
    match error.errno:
        case errno.ENOSPC:
            what, fix = "no space is left there", f"Free some space, or {elsewhere}."
        case errno.EDQUOT:
            what, fix = "the disk quota is used up", f"Free some space, or {elsewhere}."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            what, fix = error.strerror, f"Make the folder writable, or {elsewhere}."
        case _:
            what, fix = error, f"Repair that, or {elsewhere}."
    return CheckpointError(
        f"No checkpoint can be written to {root}: {what}. Earlier checkpoints are untouched.\n{fix}"
    )


def files_in(folder: Path) -> dict[str, int]:
    """Return the size of each file below `folder`, by relative path, sorted."""
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def to_json(value: Any) -> str:
    """Write a value as JSON with exact floats, as `read_json` reads it."""
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} {describe_read_error(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def format_size(size: float) -> str:
    """Format a number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _write_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)

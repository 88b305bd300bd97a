"""The manifest of a checkpoint: size and SHA-256 of every file, by which the checkpoint is verified."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeAlias

from iiverl_core.checkpoints.foreign import recognise
from iiverl_core.errors import CheckpointError, join_names

MANIFEST = "manifest.json"
STATE_FILE, CONFIG_FILE = "train_state.json", "config.json"
VERSIONS_FILE, DATASET_FILE = "versions.json", "dataset.json"

FORMAT = 1
FIELDS = {"format", "step", "serial", "created", "metrics", "files", "sha256"}
STEP_FOLDER = re.compile(r"global_step_(\d+)")

CHUNK = 4 << 20
THREADS = 8

Report: TypeAlias = Callable[[int, int], None]
"""Called with the bytes read so far and the total bytes, from one thread at a time."""


class FileEntry(NamedTuple):
    """The manifest's entry for a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as its manifest describes it.

    `serial` counts the checkpoints of a root in the order of publication. The newest is the one with the highest
    serial, not the highest step, because a run may have gone back to an earlier step. `created` is in Unix seconds.
    `metrics` are the step's metrics that were passed to `write`. `files` are paths relative to the folder, without the
    manifest.
    """

    folder: Path
    step: int
    serial: int
    created: float
    metrics: Mapping[str, float] = field(repr=False)
    files: Mapping[str, FileEntry] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def roles(self) -> frozenset[str]:
        """The folders within the checkpoint, one per trained model: `actor`, `critic`."""
        return frozenset(name.split("/")[0] for name in self.files if "/" in name)


def read_manifest(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest without checking the other files.

    Raises:
        CheckpointError: the manifest is missing, or is not as it was written.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        if not (folder / STATE_FILE).exists() and (foreign := recognise(folder)):
            raise CheckpointError(foreign.explain()) from error
        raise CheckpointError(
            f"{folder} is not a valid checkpoint: {MANIFEST} {describe_read_error(error)}"
        ) from error
    try:
        known = json.loads(content)
        if not isinstance(known, dict):
            raise ValueError
        if known.get("format") == FORMAT and (extra := known.keys() - FIELDS):
            raise CheckpointError(
                f"{folder} is not a valid checkpoint: {MANIFEST} has unknown fields: {join_names(sorted(extra))}"
            )
        if isinstance(known.get("format"), int) and known["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} was written by a later version of iiverl ({MANIFEST} has format {known['format']}, this "
                f"version reads {FORMAT}).\nUpgrade iiverl to use it."
            )
        files = {name: FileEntry(**entry) for name, entry in known["files"].items()}
        checkpoint = Checkpoint(
            folder, known["step"], known["serial"], known["created"], known["metrics"], files
        )
        if manifest_bytes(checkpoint) != content:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a valid checkpoint: {MANIFEST} is cut off or has changed since it was written"
        ) from error
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != checkpoint.step:
        raise CheckpointError(
            f"{folder} is not a valid checkpoint: {MANIFEST} is that of step {checkpoint.step}; was the folder renamed?"
        )
    return checkpoint


def verify(folder: Path, *, hashes: bool = True, progress: Report | None = None) -> Checkpoint:
    """Check that a checkpoint is as it was written; without `hashes`, check only the files' names and sizes.

    Files that the manifest does not list are ignored.

    Raises:
        CheckpointError: it is not; the message names the invalid files.
    """
    checkpoint = read_manifest(folder)
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for name, entry in checkpoint.files.items():
        try:
            sizes[name] = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{name} {describe_read_error(error)}")
            continue
        if sizes[name] != entry.size:
            problems.append(f"{name} has {sizes.pop(name)} bytes instead of {entry.size}")
    if hashes:
        found = hash_files(folder, sizes, progress, problems)
        problems += [
            f"{name} has changed since it was written (its SHA-256 differs)"
            for name, entry in found.items()
            if entry != checkpoint.files[name]
        ]
    if problems:
        raise CheckpointError(f"{folder} is not a valid checkpoint: {join_names(problems, '; ')}")
    return checkpoint


def manifest_bytes(checkpoint: Checkpoint) -> bytes:
    """Serialize a manifest. It ends with its own checksum and has a canonical form, so that any change is detected."""
    body = {
        "format": FORMAT,
        "step": checkpoint.step,
        "serial": checkpoint.serial,
        "created": checkpoint.created,
        "metrics": dict(checkpoint.metrics),
        "files": {name: entry._asdict() for name, entry in checkpoint.files.items()},
    }
    checksum = hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()
    return json.dumps({**body, "sha256": checksum}, allow_nan=False, indent=1).encode() + b"\n"


def hash_files(
    folder: Path,
    sizes: Mapping[str, int],
    progress: Report | None,
    problems: list[str] | None = None,
    *,
    sync: bool = False,
) -> dict[str, FileEntry]:
    """Hash files in threads, and with `sync` sync them to disk. Files that cannot be read are added to `problems`."""
    total, done, lock = sum(sizes.values()), 0, Lock()

    def report(size: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += size
                progress(done, total)

    def entry(name: str) -> FileEntry | None:
        try:
            return _hash_file(folder / name, report, sync=sync)
        except OSError as error:
            if problems is None:
                raise
            problems.append(f"{name} {describe_read_error(error)}")
            return None

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        entries = dict(zip(sizes, pool.map(entry, sizes), strict=True))
    return {name: found for name, found in entries.items() if found is not None}


def _hash_file(path: Path, report: Callable[[int], None], *, sync: bool) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while chunk := os.read(descriptor, CHUNK):
            digest.update(chunk)
            size += len(chunk)
            report(len(chunk))
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size, digest.hexdigest())


def describe_read_error(error: OSError) -> str:
    """Say why a file cannot be read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    return f"cannot be read: {error.strerror}"

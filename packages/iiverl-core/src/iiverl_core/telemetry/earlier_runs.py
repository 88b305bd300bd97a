"""Keep what earlier runs left in a run's folder under other names, so that no curve mixes two runs."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from iiverl_core.telemetry.history import GENERATIONS_FILE, METRICS_FILE


def set_aside(paths: Sequence[Path], log: Callable[[str], None]) -> None:
    """Rename what is there of these files and folders, with the time of its last change in the new name."""
    for path in paths:
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            continue
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        kept = _free(path.with_name(f"{path.stem}-{stamp}{path.suffix}"))
        path.rename(kept)
        log(f"an earlier run's {path.name} is kept as {kept}")


def set_aside_after(step: int, folder: Path, dumps: Sequence[Path], log: Callable[[str], None]) -> None:
    """Take the metrics and samples of later steps out of the files of a run that continues after `step`.

    Half a line at the end of a file, which a killed run leaves, goes with them.
    """
    for name in (METRICS_FILE, GENERATIONS_FILE):
        _cut(folder / name, step, log)
    for dump in dumps:
        later = [path for path in dump.glob("*.*") if path.stem.isdigit() and int(path.stem) > step]
        if later:
            kept = _free(dump / f"after-step-{step}-{time.strftime('%Y%m%d-%H%M%S')}")
            kept.mkdir()
            for path in later:
                path.rename(kept / path.name)
            log(f"samples of later steps are kept in {kept}")


def _cut(path: Path, step: int, log: Callable[[str], None]) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    earlier = [line for line in lines if _is_up_to(step, line)]
    if len(earlier) == len(lines):
        return
    kept = _free(path.with_name(f"{path.stem}-after-step-{step}{path.suffix}"))
    kept.write_bytes(b"".join(line for line in lines if not _is_up_to(step, line)))
    shorter = path.with_name(f".{path.name}.shorter")
    shorter.write_bytes(b"".join(earlier))
    shorter.replace(path)
    log(f"the lines of later steps in {path.name} are kept in {kept}")


def _is_up_to(step: int, line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _free(path: Path) -> Path:
    """Give the path, or one with a number in its name if there is something already."""
    if not path.exists():
        return path
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(2, 10**6))
    return next(each for each in numbered if not each.exists())

"""How much memory the processes of the sandbox hold together, read from `/proc`."""

import resource
from pathlib import Path

_SHARED = "/dev/zero (deleted)"  # how the kernel names anonymous memory that processes share
_KIB = 1024


def used(enough: int) -> int:
    """Add up the memory of all processes but process 1, in bytes: roughly, and exactly where that is over `enough`.

    Shared anonymous memory counts in its whole length, and once: pages that no process has in its tables any more
    belong to it still. Scratch files do not count, whether mapped or not.
    """
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != "1"]
    try:
        shared = _shared(processes)
        rough = shared + _resident(processes)
        return rough if rough <= enough else shared + _own(processes)
    except PermissionError:  # without rights of its own, as in bubblewrap, a process may hide all but this
        return _resident(processes)


def _resident(processes: list[Path]) -> int:
    """Count what is in memory, for each process as if it shared nothing."""
    pages = sum(int(line.split()[1]) for process in processes for line in _lines(process / "statm"))
    return pages * resource.getpagesize()


def _shared(processes: list[Path]) -> int:
    """Count shared anonymous memory: by its inode the longest mapping."""
    lengths: dict[str, int] = {}
    for process in processes:
        for line in _lines(process / "maps"):
            if not line.endswith(_SHARED):
                continue
            addresses, _, offset, _, inode, _ = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            lengths[inode] = max(lengths.get(inode, 0), int(offset, 16) + end - start)
    return sum(lengths.values())


def _own(processes: list[Path]) -> int:
    """Count private memory and files, each page divided by how many processes have it."""
    kinds = ("Pss_Anon:", "Pss_File:")
    lines = [line for process in processes for line in _lines(process / "smaps_rollup")]
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * _KIB


def _lines(path: Path) -> list[str]:
    """Read a file of a process; no line when the process has gone meanwhile."""
    try:
        return path.read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []

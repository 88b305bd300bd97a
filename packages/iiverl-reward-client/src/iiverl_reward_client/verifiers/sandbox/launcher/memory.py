"""Read the total memory of the sandbox's processes from `/proc`."""

import resource
from pathlib import Path

_SHARED = "/dev/zero (deleted)"  # the kernel's name of shared anonymous memory
_KIB = 1024


def used(enough: int) -> int:
    """Sum the memory of all processes but process 1, in bytes: an upper bound, or exactly if that exceeds `enough`.

    Shared anonymous memory counts once, with its whole length, since it includes pages that no process has mapped any
    more. Scratch files do not count, mapped or not.
    """
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != "1"]
    try:
        shared = _shared(processes)
        rough = shared + _resident(processes)
        return rough if rough <= enough else shared + _proportional(processes)
    except PermissionError:  # without rights, as in bubblewrap, a process may hide everything else
        return _resident(processes)


def _resident(processes: list[Path]) -> int:
    """Sum the resident memory of each process, shared pages included."""
    pages = sum(int(line.split()[1]) for process in processes for line in _lines(process / "statm"))
    return pages * resource.getpagesize()


def _shared(processes: list[Path]) -> int:
    """Sum shared anonymous memory: the longest mapping per inode."""
    lengths: dict[str, int] = {}
    for process in processes:
        for line in _lines(process / "maps"):
            if not line.endswith(_SHARED):
                continue
            addresses, _, offset, _, inode, _ = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            lengths[inode] = max(lengths.get(inode, 0), int(offset, 16) + end - start)
    return sum(lengths.values())


def _proportional(processes: list[Path]) -> int:
    """Sum private memory and files, each page divided by the number of processes that map it."""
    kinds = ("Pss_Anon:", "Pss_File:")
    lines = [line for process in processes for line in _lines(process / "smaps_rollup")]
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * _KIB


def _lines(path: Path) -> list[str]:
    """Read a file of a process; no lines if the process has ended."""
    try:
        return path.read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []

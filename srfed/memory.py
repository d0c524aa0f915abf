"""What this process and all that it has started take of the machine's memory."""

import os
from pathlib import Path


def memory_of_processes(process: int | None = None, proc: Path = Path("/proc")) -> tuple[int, int]:
    """Bytes of a process and of its descendants together, and how many they are; pages that several
    of them share are counted once.

    Args:
        process: its number; None is this one.
        proc: where the system tells of its processes; where it does not, both numbers are 0.
    """
    children: dict[int, list[int]] = {}
    for entry in proc.glob("[0-9]*"):
        try:
            # The name, in brackets, may itself have some.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [os.getpid() if process is None else process]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        if taken := _bytes_of(proc / str(one)):
            found.append(taken)
    return sum(found), len(found)


def _bytes_of(entry: Path) -> int:
    """The process's share of the pages that it uses; 0 where that is not told, as of one that has
    just ended.
    """
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        try:
            lines = (entry / name).read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
        except (OSError, ValueError, StopIteration):
            continue
    return 0

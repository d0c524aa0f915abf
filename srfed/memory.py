"""What this process and all that it has started take of the machine's memory, and whether that was
too much; and whether a GPU is gone."""

import os
import re
from pathlib import Path

_SHORT = re.compile(
    "can't allocate memory|bad_alloc|_ALLOC_FAILED|CUDA error: out of memory"
    # oneDNN's compiler and what it has compiled, whatever they lack; what cannot be done at all is
    # a "descriptor".
    "|could not (create|execute) a primitive(?! desc)"
    # cuDNN tries one algorithm after another, and says only that none of them went; cuBLAS, that
    # there was no room for its workspace.
    "|unable to find an engine to execute this computation|CUBLAS_STATUS_NOT_INITIALIZED"
)
_LOST = re.compile("CUDA error|_STATUS_(EXECUTION_FAILED|MAPPING_ERROR)")


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


def is_short_of_memory(error: BaseException) -> bool:
    """Whether Python, or PyTorch on a processor or a GPU, has got no more memory."""
    seen: BaseException | None = error
    while seen is not None:
        # PyTorch says so in words on a processor, and by a class that is not imported here on a
        # GPU, whose libraries have words of their own.
        if (
            isinstance(seen, MemoryError)
            or type(seen).__name__ == "OutOfMemoryError"
            or _SHORT.search(str(seen))
        ):
            return True
        # The end of a capture that ran out of memory says only that the capture has failed.
        seen = seen.__context__
    return False


def failure_of_gpu(error: BaseException) -> str:
    """The first line of what CUDA says of a GPU on which nothing can be done any more (it has
    fallen off its bus, an Xid error, an assertion of a kernel's): the process has to end. Empty
    where it is no such failure.
    """
    lost = type(error).__name__ == "AcceleratorError" or _LOST.search(str(error))
    if not lost or is_short_of_memory(error):
        return ""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""How much work is done, counted where it is done, in forward passes of one image each.

A process counts for itself. Under :func:`counted_together` the processes that are started meanwhile
write their counts into files, which :func:`passes_done` adds up. Nothing but what is shown depends
on a count.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

COUNTS_VARIABLE = "SRFED_WORK_COUNTS"
"""The folder of the counts."""
STEP_TO_PASS = 3
"""A training step on an image (forward, backward) against a forward pass."""

_BYTES = 8
_own = 0


def count_passes(passes: int) -> None:
    """So many more are done in this process; a count that cannot be written is no error."""
    global _own
    _own += passes
    if folder := os.environ.get(COUNTS_VARIABLE):
        with suppress(OSError):
            os.pwrite(_file(folder, os.getpid()), _own.to_bytes(_BYTES, "little"), 0)


def passes_done() -> int:
    """By this process, and by those whose counts lie beside its own."""
    others = 0
    if folder := os.environ.get(COUNTS_VARIABLE):
        with suppress(OSError):
            for path in Path(folder).iterdir():
                if path.name != str(os.getpid()):
                    others += int.from_bytes(path.read_bytes()[:_BYTES], "little")
    return _own + others


@contextmanager
def counted_together(folder: str | None = None) -> Iterator[None]:
    """Give the processes that are started meanwhile, and are told :data:`COUNTS_VARIABLE`, a place
    for their counts, in a folder or where temporary files are; where none can be made, they are not
    counted.
    """
    try:
        made = tempfile.TemporaryDirectory(
            prefix="srfed-work-", dir=folder, ignore_cleanup_errors=True
        )
    except OSError:
        yield
        return
    before = os.environ.get(COUNTS_VARIABLE)
    with made as name:
        os.environ[COUNTS_VARIABLE] = name
        try:
            yield
        finally:
            os.environ.pop(COUNTS_VARIABLE, None)
            if before is not None:
                os.environ[COUNTS_VARIABLE] = before


@lru_cache(maxsize=1)
def _file(folder: str, process: int) -> int:
    return os.open(Path(folder) / str(process), os.O_WRONLY | os.O_CREAT, 0o600)

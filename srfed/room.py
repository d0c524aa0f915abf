"""Where memory is short: how much at once would fit, found by trying."""

import gc
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from threading import Thread
from typing import TypeVar

import torch

from srfed.memory import is_short_of_memory

Result = TypeVar("Result")


def largest_that_fits(asked: int, trial: Callable[[int], object]) -> int | None:
    """The largest of asked / 2, asked / 4 and so on down to 1 (each rounded down) that can be tried
    without running out of memory; None where not even 1 can.

    To be called when the exception of what has failed is gone: it holds the tensors that it was
    raised over.

    Args:
        asked: what was too much.
        trial: (size) -> anything; raises what its work raises.
    """
    for size in _halves(asked):
        try:
            aside(partial(trial, size))
        except (MemoryError, RuntimeError) as error:
            if not is_short_of_memory(error):
                raise
        else:
            return size
    return None


def in_words(fits: int | None, what: str) -> str:
    """What :func:`largest_that_fits` has found: ``64 images fit``."""
    return f"not even 1 of the {what} fits" if fits is None else f"{fits} {what} fit"


def aside(work: Callable[[], Result]) -> Result:
    """Do work in a thread of its own, once what nobody holds any more is given back; raises what
    it raises. For what is done where memory has been short.

    What oneDNN's compiler could not do once for want of memory, it refuses ever after to the thread
    that asked.
    """
    release()
    results: list[Result] = []
    failures: list[BaseException] = []
    threads = torch.get_num_threads()

    def run() -> None:
        # OpenMP counts them for each thread that asks.
        torch.set_num_threads(threads)
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=copy_context().run, args=(run,), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # There is not even room for a thread.
        return work()
    thread.join()
    if failures:
        raise failures.pop()
    return results.pop()


def _halves(asked: int) -> Iterator[int]:
    while asked := asked // 2:
        yield asked


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

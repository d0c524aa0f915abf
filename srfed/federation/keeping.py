"""What a handler wants to keep is kept when its reply has been found in order, and not before.

So the order is one for every message: the whole request is checked, the work done, the reply
checked, then stored what lasts, then answered. What is refused anywhere on the way leaves each of
the owner's files as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Act = Callable[[], object]
_waiting: ContextVar[list[Act] | None] = ContextVar("waiting", default=None)


def keep(act: Act) -> None:
    """Do what writes into the owner's store as soon as the reply has been checked; at once where
    nobody checks it.
    """
    waiting = _waiting.get()
    if waiting is None:
        act()
    else:
        waiting.append(act)


@contextmanager
def checked_first() -> Iterator[Act]:
    """What the block wants to keep waits for the call of what this yields; without one it is
    dropped.
    """
    acts: list[Act] = []
    token = _waiting.set(acts)

    def store() -> None:
        for act in acts:
            act()

    try:
        yield store
    finally:
        _waiting.reset(token)

"""What a handler wants to keep is kept when its reply has been found in order, and not before.

So the order is one for every message: the whole request is checked, the work done, the reply
checked, then stored what lasts, then answered. What is refused anywhere on the way leaves each of
the owner's files as it was. So does an attempt for which there is no room: it is stored first, and
what can be made again comes last.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter

Act = Callable[[], object]
_waiting: ContextVar[list[tuple[bool, Act]] | None] = ContextVar("waiting", default=None)


def keep(act: Act, *, last: bool = False) -> None:
    """Do what writes into the owner's store as soon as the reply has been checked, in the order in
    which it is kept, or after all that is not ``last``; at once where nobody checks it.
    """
    waiting = _waiting.get()
    if waiting is None:
        act()
    else:
        waiting.append((last, act))


@contextmanager
def checked_first() -> Iterator[Act]:
    """What the block wants to keep waits for the call of what this yields; without one it is
    dropped.
    """
    acts: list[tuple[bool, Act]] = []
    token = _waiting.set(acts)

    def store() -> None:
        for _, act in sorted(acts, key=itemgetter(0)):
            act()

    try:
        yield store
    finally:
        _waiting.reset(token)

"""What code at a client raises to end the process fails that client's answer instead: a mod or a
network of one's own that calls ``sys.exit`` would leave the server waiting until its time is up.
"""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from srfed.federation.together import AbandonedError


class ExitError(Exception):
    """Something other than an exception was raised where nobody has asked the process to end."""


@contextmanager
def exits_are_failures() -> Iterator[None]:
    """Whatever the block raises that is no exception is one, :class:`ExitError`, unless the process
    is to end: at Ctrl-C, where a signal's handler raises it, where a client is abandoned.

    Raises:
        ExitError: in place of SystemExit, or another BaseException, that the block's code raised.
    """
    # Taken before, as Flower's handlers of signals put others in their place before they exit.
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers}
    try:
        yield
    except (Exception, KeyboardInterrupt, AbandonedError):
        raise
    except BaseException as error:
        if any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise ExitError(f"{type(error).__name__} was raised: {error}") from error

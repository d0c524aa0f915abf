"""What every command has in common: its output, the signals that end it, its exit status.

0 done; 2 after one line about what the user can mend; 3 when the time given was over; 129, 130
or 143 on SIGHUP, SIGINT or SIGTERM; 141 where nobody reads the output any more.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from srfed.errors import UserError
from srfed.memory import failure_of_gpu, is_short_of_memory
from srfed.units import escaped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a command: Ctrl-C, a service manager or a scheduler, a terminal that closes."""
CLOSED_PIPE = 128 + signal.SIGPIPE
Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS has come."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class OutOfTime(KeyboardInterrupt):
    """The time that a command was given is over."""

    status = 3


def run_command(command: Callable[[], None], minutes: float | None = None) -> int:
    """Run a command, for so long at most; returns its exit status."""
    mend_streams()
    try:
        with signals_to(_interrupt), _ends_after(minutes):
            command()
            sys.stdout.flush()
    except UserError as error:
        tell(f"error: {error}")
        return 2
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        tell(
            str(stop)
            if isinstance(stop, OutOfTime)
            else "interrupted"
            if isinstance(stop, KeyboardInterrupt)
            else "interrupted: nobody reads the output"
        )
        return status_of(stop)
    except (MemoryError, RuntimeError) as error:
        if failure := failure_of_gpu(error):
            tell(
                f"error: the GPU has failed ({escaped(failure)}); what was stored before is as it "
                "was, and once there is a sound one, or on another machine, the same command or "
                "--resume goes on"
            )
            return 2
        if not is_short_of_memory(error):
            raise
        tell(
            "error: there is not enough memory; allowed: fewer images at once (--batch-size where "
            "images are drawn, sampling.batch_size, training.batch_size), smaller images, or a "
            "smaller network"
        )
        return 2
    except OSError as error:
        # A full disk under a redirected output has no file's name; all files of ours are written by
        # name.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        tell(f"error: cannot write the output: {error.strerror}")
        return 2
    finally:
        flushed()
    return 0


def status_of(stop: BaseException) -> int:
    """The exit status of a command that a signal or a closed pipe has stopped."""
    if isinstance(stop, BrokenPipeError):
        return CLOSED_PIPE
    return stop.status if isinstance(stop, Interrupted | OutOfTime) else 128 + signal.SIGINT


@contextmanager
def _ends_after(minutes: float | None) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the main thread when that is over, once."""
    if minutes is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {minutes:g} minutes: the same command goes on")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def signals_to(handler: Handler) -> Iterator[None]:
    """Let ``handler`` have SIGNALS; outside of the main thread, where Python hears none, nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # nohup ignores SIGHUP, and what it starts is to go on when the terminal closes.
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stopping_gently(stop: threading.Event, stopped: type[Exception]) -> Iterator[None]:
    """The first of SIGNALS sets ``stop``, and the work ends where it can, with ``stopped``; the
    second ends it at once.

    Raises:
        Interrupted: instead of ``stopped``.
    """
    numbers: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        numbers.append(number)
        if stop.is_set():
            raise Interrupted(number)
        stop.set()
        tell("\nstopping (again to stop at once)")

    stop.clear()
    with signals_to(handle):
        try:
            yield
        except stopped:
            raise Interrupted(numbers[0] if numbers else signal.SIGINT) from None


def tell(text: str) -> None:
    """Say something on standard error; where nobody can hear it, that changes nothing."""
    # RuntimeError: a signal's handler speaks while the interrupted code does.
    with suppress(OSError, ValueError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


def mend_streams() -> None:
    """Make the standard streams usable as they are found.

    What is closed becomes the null device, before a file of ours gets its number; what a terminal
    cannot show (a φ in ASCII, the bytes of a file's name) is written as an escape.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115  it stays open
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def flushed() -> bool:
    """Whether all output is out; what cannot be written goes to the null device, lest Python
    complains at its end.
    """
    sound = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            sound = False
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return sound

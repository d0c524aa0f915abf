"""Several clients' requests answered in one process at once, so that what they train, or sample, is
one program.

Each client is answered by itself, as if there were no other, in a thread of its own, and only one
thread runs at a time. Where a client comes to train or to sample it waits until every other one has
come so far, or has ended; then the jobs of all are done in the thread that asked. So nothing that a
client does before and after knows of stacks, and its failure is its own.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from threading import Semaphore, Thread
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")
Job = TypeVar("Job")
Result = TypeVar("Result")


class AbandonedError(BaseException):
    """The process is to end while a client waits. No handler is to take it for a failure."""


class _Client(Generic[Answer]):
    """A client at work in a thread of its own, which runs only between two calls of
    :meth:`go_on`.
    """

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self._answer = answer
        self._may_run, self._has_stopped = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._work, daemon=True)
        self._running = False
        self._given: object = None
        self.ended = False
        self.waits_for: object = None
        self.outcome: Answer | BaseException

    def go_on(self, given: object = None) -> None:
        """Let it run until it wants a job done, or ends; ``given`` is what it has waited
        for, an exception where that failed.
        """
        self._given = given
        if self._thread.ident is None:
            self._thread.start()
        self._running = True
        self._may_run.release()
        self._wait()

    def abandon(self) -> None:
        """Make it end, wherever it is."""
        if self._running:
            self._wait()
        if self._thread.ident is not None and not self.ended:
            self.go_on(AbandonedError())

    def wait_for(self, job: object) -> object:
        """In its own thread: wait until the job is done."""
        self.waits_for = job
        self._has_stopped.release()
        self._may_run.acquire()
        if isinstance(self._given, BaseException):
            raise self._given
        return self._given

    def _wait(self) -> None:
        self._has_stopped.acquire()
        self._running = False

    def _work(self) -> None:
        self._may_run.acquire()
        _at_work.set(self)
        try:
            self.outcome = self._answer()
        except BaseException as error:  # whatever it is, it is told to who asked
            self.outcome = error
        finally:
            self.ended = True
            self._has_stopped.release()


_at_work: ContextVar[_Client[Any] | None] = ContextVar("_at_work", default=None)


def waits_in_turn() -> bool:
    """Whether this is a client that is answered together with others."""
    return _at_work.get() is not None


def done_in_turn(job: Job) -> object:
    """What comes of a job, by a client that is answered together with others; raises what the job
    raised.
    """
    client = _at_work.get()
    assert client is not None
    return client.wait_for(job)


def answer_together(
    answers: Sequence[Callable[[], Answer]], do: Callable[[list[Job]], Sequence[Result]]
) -> list[Answer | BaseException]:
    """Answer several clients.

    Args:
        answers: what makes each one's answer, which calls :func:`done_in_turn`, any number of
            times.
        do: (jobs) -> what comes of each, or the exception that it failed with.

    Returns:
        Each one's answer, or what it raised.
    """
    clients = [_Client(answer) for answer in answers]
    try:
        for client in clients:
            client.go_on()
        while waiting := [client for client in clients if not client.ended]:
            results = do([client.waits_for for client in waiting])  # type: ignore[misc]
            for client, result in zip(waiting, results, strict=True):
                client.go_on(result)
    except BaseException:
        for client in clients:
            client.abandon()
        raise
    return [client.outcome for client in clients]

"""Who is told what happens in a run: the terminal, TensorBoard, a notebook, a test."""

from collections.abc import Iterable, Sequence
from typing import Literal

from srfed.records import EvaluationRecord, Place, RoundRecord, TaskInfo

Stage = Literal["round", "evaluation"]


class Observer:
    """Told what happens, in the run's own thread; every method may be left as it is.

    What a method raises ends the run, between two replies of clients, with all finished rounds on
    disk: that is also how a run is stopped on purpose.
    """

    def on_place(self, place: Place) -> None:
        """Where the run is about to train; not called where its owners' sites alone know."""

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        """The run begins, or goes on after ``last_round``, with these tasks, in their order."""

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        """A round of this number begins, or an evaluation after it; ``final`` is the evaluation
        that ends the run.
        """

    def on_progress(self, what: str, done: int, total: int) -> None:
        """So many clients have answered in a round or an evaluation; called with each answer."""

    def on_join(self, task: TaskInfo) -> None:
        """A client has come that was not there when the run began."""

    def on_round(self, record: RoundRecord) -> None:
        """A round has ended, and is on record."""

    def on_judged(self, record: EvaluationRecord) -> None:
        """An evaluation has ended, and is about to be put on record: what must be there with it is
        written now, since whatever ends the process before that has the evaluation made again.
        """

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation has ended, and is on record."""

    def on_notice(self, text: str) -> None:
        """Something that a person should know, in a sentence."""

    def on_end(self) -> None:
        """The run has ended or was stopped; called once, whatever happened."""


class Observers(Observer):
    """Several observers as one: each is told in turn."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)

    def on_place(self, place: Place) -> None:
        for observer in self._observers:
            observer.on_place(place)

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        for observer in self._observers:
            observer.on_begin(tasks, last_round)

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        for observer in self._observers:
            observer.on_start(what, number, final=final)

    def on_progress(self, what: str, done: int, total: int) -> None:
        for observer in self._observers:
            observer.on_progress(what, done, total)

    def on_join(self, task: TaskInfo) -> None:
        for observer in self._observers:
            observer.on_join(task)

    def on_round(self, record: RoundRecord) -> None:
        for observer in self._observers:
            observer.on_round(record)

    def on_judged(self, record: EvaluationRecord) -> None:
        for observer in self._observers:
            observer.on_judged(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        for observer in self._observers:
            observer.on_evaluation(record)

    def on_notice(self, text: str) -> None:
        for observer in self._observers:
            observer.on_notice(text)

    def on_end(self) -> None:
        for observer in self._observers:
            observer.on_end()

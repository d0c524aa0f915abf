"""A run's numbers at a service that keeps them: what such observers have in common."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

from srfed.errors import UserError
from srfed.observer import Observer
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.pictures import Images, draw_grid
from srfed.reporting.values import evaluation_values, round_values


class Tracker(Observer):
    """Hands on every number of a run, and its samples if asked to. Where that fails once the run
    has begun, it is told by a warning, once, and the run goes on.

    Args:
        pictures: whether samples are handed on too.
    """

    def __init__(self, *, pictures: bool) -> None:
        self._pictures = pictures
        self._open = self._finished = False

    @abstractmethod
    def begin(self, last_round: int) -> None:
        """Open the service's record of a run."""

    @abstractmethod
    def add_numbers(self, values: Mapping[str, float], step: int) -> None:
        """Hand on numbers by tag."""

    @abstractmethod
    def add_picture(self, picture: Images, step: int) -> None:
        """Hand on samples, a row an owner: uint8 H x W x 3."""

    @abstractmethod
    def end(self, *, finished: bool) -> None:
        """Close the record of a run that is finished, or was stopped."""

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        """Raises UserError where the service cannot be reached."""
        try:
            self.begin(last_round)
        except UserError:
            raise
        except Exception as error:
            # Of somebody else's client, which may raise anything.
            raise UserError(f"{type(self).__name__} cannot begin: {_words(error)}") from error
        self._open = True

    def on_round(self, record: RoundRecord) -> None:
        self._try(lambda: self.add_numbers(round_values(record), record.round))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._finished = record.final
        self._try(lambda: self.add_numbers(evaluation_values(record), record.round))
        if self._pictures and record.grids:
            self._try(lambda: self.add_picture(draw_grid(record.grids), record.round))

    def on_end(self) -> None:
        self._try(lambda: self.end(finished=self._finished))
        self._open = False

    def _try(self, work: Callable[[], None]) -> None:
        if not self._open:
            return
        try:
            work()
        except Exception as error:
            self._open = False
            warnings.warn(
                f"{type(self).__name__}: {_words(error)}; its numbers end here, and the run goes "
                "on",
                stacklevel=2,
            )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

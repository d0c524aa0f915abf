"""What the loop asks of whoever trains: a federation, or one party with all images."""

from collections.abc import Sequence
from typing import Protocol

from srfed.observer import Observer
from srfed.records import EvaluationRecord, Place, RoundRecord, TaskInfo
from srfed.storage.server_checkpoints import RunState


class Trainer(Protocol):
    """Takes a run from one state to the next; what a state names is on disk when it is returned."""

    @property
    def tasks(self) -> Sequence[TaskInfo]:
        """The tasks that are there, in the order of display; known once the run has begun."""

    @property
    def place(self) -> Place | None:
        """Where it trains, known once the run has begun; None where the owners' sites alone
        know.
        """

    def begin(self, found: RunState | None, tell: Observer) -> RunState:
        """Meet the owners, and check what was found or make φ_0 where nothing was.

        Args:
            found: the state of the last checkpoint.
            tell: told of everything that a person should know.

        Raises:
            UserError: data or clients do not fit, or too few came.
        """

    def train_round(self, state: RunState, tell: Observer) -> tuple[RunState, RoundRecord]:
        """The round that follows; raises UserError where it cannot be finished."""

    def evaluate(self, state: RunState, tell: Observer, *, final: bool) -> EvaluationRecord | None:
        """Judge the averaged weights of a state; None where nobody took part."""

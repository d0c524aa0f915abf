"""Training that has diverged: what it is called, at whom and since when, and what mends it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from srfed.config import TrainingConfig

DIVERGED = "it has diverged"
"""How the reason begins for which a client's update is refused."""
FIRST_ROUNDS = 5
"""After so many rounds a loss above 1 is told."""
TRIVIAL = 1.0
"""The loss of a network that predicts nothing: a loss above it is worse than that."""
MUCH = 2.0
"""A loss above this is told from the second round on."""


def remedy(training: TrainingConfig) -> str:
    """What to do, with the settings as they are."""
    clip = "null" if training.gradient_clip is None else f"{training.gradient_clip:g}"
    return (
        f"go on with --resume and a lower training.learning_rate (it is "
        f"{training.learning_rate:g}) or training.gradient_clip (it is {clip}), by --set"
    )


class Divergence:
    """Watches the losses of a run.

    Args:
        training: the run's settings.
        rounds: the lines of the rounds before.
    """

    def __init__(self, training: TrainingConfig, rounds: Iterable[Mapping[str, Any]] = ()) -> None:
        self._training = training
        self._since: dict[str, int] = {}
        self._told: set[str] = set()
        for line in rounds:
            self._take(line["round"], line["loss_by_client"], line.get("refused", {}))

    def add(
        self, number: int, losses: Mapping[str, float], refused: Mapping[str, str]
    ) -> str | None:
        """The sentence, if any, that a round's losses call for; each client is told of once."""
        self._take(number, losses, refused)
        limit = TRIVIAL if number > FIRST_ROUNDS else MUCH if number > 1 else math.inf
        worse = {client: loss for client, loss in losses.items() if not loss <= limit}
        gone = [client for client, reason in refused.items() if reason.startswith(DIVERGED)]
        new = [client for client in (*gone, *worse) if client not in self._told]
        self._told = {*self._told, *new} & {*gone, *worse, *(self._told - {*losses})}
        if not new:
            return None
        return (
            f"round {number}: training diverges at {self.in_words(new)}: a loss above 1 is worse "
            f"than predicting nothing; {remedy(self._training)}"
        )

    def in_words(self, clients: Iterable[str]) -> str:
        """Clients, each with the round since which its loss is above 1, or it has no numbers."""
        return ", ".join(
            f"{client} (since round {self._since[client]})" if client in self._since else client
            for client in clients
        )

    def _take(
        self, number: int, losses: Mapping[str, float | None], refused: Mapping[str, str]
    ) -> None:
        for client, loss in losses.items():
            # A loss that is no number stands in the log as null.
            if loss is not None and loss <= TRIVIAL:
                self._since.pop(client, None)
            else:
                self._since.setdefault(client, number)
        for client, reason in refused.items():
            if reason.startswith(DIVERGED):
                self._since.setdefault(client, number)

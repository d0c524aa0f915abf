"""An aggregator of one's own around srfed's: the median of the clients' changes, value by value
(Yin et al. 2018), which a single client cannot carry away.

In the ``pyproject.toml`` of a Flower app, whose coordinator has this file on Python's path:

    [tool.flwr.app.components]
    serverapp = "own_aggregator:app"
    clientapp = "srfed.federation.flower.client_app:app"
"""

from dataclasses import replace

import torch

from srfed.config import FederationConfig
from srfed.federation.aggregation import Tensors, UpdateMean, UpdateSum
from srfed.federation.flower.server_app import server_app


class Median:
    """The sum of a round that keeps every change, where srfed's lets go of each.

    Args:
        settings: how clients are weighed; the median weighs them all alike.
        start: what came to the clients; what their φ_i is the change of.
    """

    def __init__(self, settings: FederationConfig, start: Tensors) -> None:
        self._sum, self._start = UpdateSum(settings, start), start
        self._changes: list[dict[str, torch.Tensor]] = []

    def add(
        self, client: str, update: Tensors, examples: int, control: Tensors | None = None
    ) -> None:
        """Add a client's φ_i, and what comes with it."""
        self._sum.add(client, update, examples, control)
        self._changes.append(
            {name: update[name].double() - start.double() for name, start in self._start.items()}
        )

    def mean(self) -> UpdateMean:
        """srfed's mean of the round, but for the change of φ."""
        middle = {
            name: torch.stack([change[name] for change in self._changes]).quantile(0.5, dim=0)
            for name in self._start
        }
        return replace(self._sum.mean(), change=middle)


app = server_app(aggregator=Median)

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

SLICE = 2**22
"""Values of all clients together that are looked at at once, 32 MB in float64."""


class Median:
    """The sum of a round that keeps every φ_i, where srfed's lets go of each: four bytes for each
    client and each value of φ, 3 GB for a thousand clients of the digits' network. What it needs
    beside them does not grow with the clients, as it looks at slices of φ.

    Args:
        settings: how clients are weighed; the median weighs them all alike.
        start: what came to the clients; what their φ_i is the change of.
    """

    def __init__(self, settings: FederationConfig, start: Tensors) -> None:
        self._sum, self._start = UpdateSum(settings, start), start
        self._updates: list[Tensors] = []

    def add(
        self, client: str, update: Tensors, examples: int, control: Tensors | None = None
    ) -> None:
        """Add a client's φ_i, and what comes with it."""
        self._sum.add(client, update, examples, control)
        self._updates.append(dict(update))

    def mean(self) -> UpdateMean:
        """srfed's mean of the round, but for the change of φ."""
        middle = {name: self._middle(name) for name in self._start}
        return replace(self._sum.mean(), change=middle)

    def _middle(self, name: str) -> torch.Tensor:
        start, count = self._start[name], max(1, SLICE // len(self._updates))
        clients = [update[name].reshape(-1).split(count) for update in self._updates]
        slices = [
            (torch.stack(own).double() - before.double()).quantile(0.5, dim=0)
            for before, *own in zip(start.reshape(-1).split(count), *clients, strict=True)
        ]
        return torch.cat(slices).reshape(start.shape)


app = server_app(aggregator=Median)

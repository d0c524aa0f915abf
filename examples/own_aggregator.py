"""An aggregator of one's own around srfed's: the median of the clients' updates, value by value
(Yin et al. 2018), which a single client cannot carry away.

In the ``pyproject.toml`` of a Flower app, whose coordinator has this file on Python's path:

    [tool.flwr.app.components]
    serverapp = "own_aggregator:app"
    clientapp = "srfed.federation.flower.client_app:app"
"""

from collections.abc import Mapping

import torch

from srfed.config import FederationConfig
from srfed.federation.aggregation import Aggregate, Tensors, aggregate
from srfed.federation.flower.server_app import server_app


def median(
    settings: FederationConfig,
    shared: Tensors,
    updates: Mapping[str, Tensors],
    weights: Mapping[str, float],
    optimizer: Tensors,
    start: Tensors | None = None,
) -> Aggregate:
    """φ^{r+1} as the server optimizer makes it of one update, the clients' median."""
    middle = {
        name: torch.stack([updates[client][name].double() for client in sorted(updates)]).quantile(
            0.5, dim=0
        )
        for name in shared
    }
    return aggregate(settings, shared, {"median": middle}, {"median": 1.0}, optimizer, start)


app = server_app(aggregator=median)

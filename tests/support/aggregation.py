"""A round at the server, from all updates at once."""

from collections.abc import Mapping

from torch import Tensor

from srfed.config import FederationConfig
from srfed.federation.aggregation import Aggregate, UpdateMean, UpdateSum, aggregate


def mean_of(
    updates: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    start: Mapping[str, Tensor],
) -> UpdateMean:
    """The mean of clients' changes, with these weights."""
    total = UpdateSum(FederationConfig(weights="examples", largest_weight=1.0), start)
    for client in sorted(updates):
        total.add(client, updates[client], weights[client])  # type: ignore[arg-type]
    return total.mean()


def aggregated(
    settings: FederationConfig,
    shared: Mapping[str, Tensor],
    updates: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    optimizer: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
) -> Aggregate:
    """A round in which the clients began at ``start``, or at φ itself."""
    mean = mean_of(updates, weights, shared if start is None else start)
    return aggregate(settings, shared, mean, optimizer)

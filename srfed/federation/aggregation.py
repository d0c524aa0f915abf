"""What the server does with the clients' φ_i: weights, mean update, server optimizer, disagreement.

Everything is summed in float64 and in the order of the clients' ids, so that the order in which
replies arrive changes no bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from srfed.config import FederationConfig

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Aggregate:
    """The outcome of one round at the server.

    Attributes:
        shared: φ^{r+1}, of φ^r's dtypes.
        optimizer: the server optimizer's state, float64, "momentum.<name>" and
            "second_moment.<name>".
        update_norm: ‖φ^{r+1} - φ^r‖.
        disagreement: between 0 (all clients moved alike) and 1 (their moves cancel): the root of
            Σ p_i ‖Δ_i - Δ̄‖² / Σ p_i ‖Δ_i‖², with Δ_i the client's change of what came to it.
    """

    shared: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    update_norm: float
    disagreement: float


class Aggregator(Protocol):
    """Forms φ^{r+1}: :func:`aggregate`, or one of one's own around it."""

    def __call__(
        self,
        settings: FederationConfig,
        shared: Tensors,
        updates: Mapping[str, Tensors],
        weights: Mapping[str, float],
        optimizer: Tensors,
        start: Tensors | None = None,
    ) -> Aggregate:
        """As :func:`aggregate`."""


def client_weights(
    rule: Literal["uniform", "examples"], examples: Mapping[str, int], largest: float = 1.0
) -> dict[str, float]:
    """Weights p_i by client, in the order of their ids; they sum to 1.

    Args:
        rule: equal weights, or by number of training images.
        examples: m_i by client.
        largest: what one client may have of them by ``examples``, or an equal share where that is
            more; what is above it goes to the others, by their own numbers.
    """
    if rule == "uniform":
        return {client: 1 / len(examples) for client in sorted(examples)}
    total = sum(examples.values())
    weights = {client: examples[client] / total for client in sorted(examples)}
    cap = max(largest, 1 / len(weights))
    capped: set[str] = set()
    while above := {
        client for client, weight in weights.items() if weight > cap and client not in capped
    }:
        capped |= above
        others = sum(examples[client] for client in weights if client not in capped)
        left = 1 - cap * len(capped)
        weights = {c: cap if c in capped else left * examples[c] / others for c in weights}
    return weights


def weighted_mean(
    members: Mapping[str, Tensors], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Σ p_i x_i for every tensor, float64, over the clients in sorted order."""
    mean: dict[str, Tensor] = {}
    for client in sorted(members):
        for name, tensor in members[client].items():
            term = weights[client] * tensor.double()
            mean[name] = mean[name] + term if name in mean else term
    return mean


def aggregate(
    settings: FederationConfig,
    shared: Tensors,
    updates: Mapping[str, Tensors],
    weights: Mapping[str, float],
    optimizer: Tensors,
    start: Tensors | None = None,
) -> Aggregate:
    """φ^{r+1} = φ^r + ServerOptimizer(Σ p_i (φ_i - φ^r)), or φ_i - φ̂ where the clients began at
    φ̂.

    Args:
        settings: which server optimizer, and its constants.
        shared: φ^r.
        updates: φ_i by client, at least one.
        weights: p_i by client.
        optimizer: the optimizer's state after the last round; empty at first.
        start: φ̂, what came to the clients in place of φ^r; None where that is φ^r itself.

    FedAvgM is Hsu et al. (2019): m ← β m + Δ, φ ← φ + η m. FedAdam is Reddi et al. (2021),
    Algorithm 2: m ← β1 m + (1 - β1) Δ, v ← β2 v + (1 - β2) Δ², φ ← φ + η m / (√v + τ). FedExP is
    Jhunjhunwala et al. (2023): φ ← φ + η max(1, r / 2) Δ̄ with r = Σ p_i ‖Δ_i‖² / ‖Δ̄‖², a longer
    step the less the clients agree. Where theirs has an ε below the line, ours bounds r by 1 / Σ
    p_i², what it is where clients move at right angles; updates that cancel each other are not
    stretched beyond.
    """
    began = shared if start is None else start
    deltas = {
        client: {name: update[name].double() - began[name].double() for name in shared}
        for client, update in updates.items()
    }
    mean = weighted_mean(deltas, weights)
    total = sum(weights[client] * _squared_norm(deltas[client]) for client in sorted(deltas))
    rate = settings.server_learning_rate
    if settings.server_optimizer == "extrapolate":
        right_angles = 1 / sum(weight**2 for weight in weights.values())
        rate *= max(1.0, min(total / (_squared_norm(mean) or math.inf), right_angles) / 2)
    steps, state = _server_step(settings, mean, rate, optimizer)
    moved = {name: (shared[name].double() + steps[name]).to(shared[name].dtype) for name in shared}
    changes = {name: moved[name].double() - shared[name].double() for name in shared}
    spread = sum(
        weights[client] * _squared_norm({name: deltas[client][name] - mean[name] for name in mean})
        for client in sorted(deltas)
    )
    return Aggregate(
        shared=moved,
        optimizer=state,
        update_norm=_squared_norm(changes) ** 0.5,
        disagreement=(spread / total) ** 0.5 if total else 0.0,
    )


def _server_step(
    settings: FederationConfig, mean: Tensors, rate: float, optimizer: Tensors
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what to add to φ, the optimizer's new state)."""
    beta = settings.server_momentum
    if settings.server_optimizer in ("average", "extrapolate"):
        return {name: rate * delta for name, delta in mean.items()}, {}
    own_part = 1.0 if settings.server_optimizer == "momentum" else 1 - beta
    momentum = {
        name: beta * optimizer.get(f"momentum.{name}", torch.zeros_like(delta)) + own_part * delta
        for name, delta in mean.items()
    }
    state = {f"momentum.{name}": tensor for name, tensor in momentum.items()}
    if settings.server_optimizer == "momentum":
        return {name: rate * tensor for name, tensor in momentum.items()}, state
    keep = settings.server_second_moment
    steps = {}
    for name, delta in mean.items():
        second = (
            keep * optimizer.get(f"second_moment.{name}", torch.zeros_like(delta))
            + (1 - keep) * delta**2
        )
        state[f"second_moment.{name}"] = second
        steps[name] = rate * momentum[name] / (second.sqrt() + settings.server_epsilon)
    return steps, state


def _squared_norm(tensors: Tensors) -> float:
    return float(sum(tensor.square().sum() for tensor in tensors.values()))

"""What the server does with the clients' φ_i: weights, mean update, server optimizer, disagreement.

Everything is summed in float64 and in the order of the clients' ids, so that the order in which
replies arrive changes no bit; each update is added when its turn comes and then let go, so that the
server needs as much memory for a thousand clients as for ten.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from srfed.config import FederationConfig
from srfed.flat import joined, parts

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


def believed_counts(
    claimed: Mapping[str, int], sure: Collection[str], largest: float
) -> dict[str, int]:
    """The numbers of images that weigh the clients' statistics in one score.

    They are what the clients say, but for those that would give one more than its share of the
    weights by ``examples`` (:func:`client_weights`): it counts as so many that it has just that. So
    no claim makes the reference of everybody its own.

    Args:
        claimed: by client, at least 1 each.
        sure: the clients whose number the server knows by itself.
        largest: what one client may have.
    """
    weights = client_weights("examples", claimed, largest)
    # Those that are held back have less weight for each image than the others, who have the most.
    each = max(weights[client] / count for client, count in claimed.items())
    return {
        client: count if client in sure else min(count, round(weights[client] / each))
        for client, count in claimed.items()
    }


class UpdateSum:
    """Σ p_i Δ_i, Σ p_i ‖Δ_i‖² and Σ p_i c_i of a round, of which one client after another is added.

    p_i are known when all clients are: what is summed is n_i Δ_i, with n_i = 1 or m_i, and divided
    at the end. The few that ``federation.largest_weight`` may hold back are kept apart until then.

    Args:
        settings: how clients are weighed.
        start: φ̂, what came to the clients; what their φ_i is the change of.
    """

    def __init__(self, settings: FederationConfig, start: Tensors) -> None:
        self._settings = settings
        self._shapes = {name: tensor.shape for name, tensor in start.items()}
        self._start = self._flat(start)
        self._sum = _Term(torch.zeros_like(self._start), None, 0.0)
        self._change, self._room = torch.empty_like(self._start), torch.empty_like(self._start)
        self._apart: dict[str, _Term] = {}
        self._most_apart = 0
        if settings.weights == "examples" and settings.largest_weight < 1:
            self._most_apart = int(1 / settings.largest_weight)
        self._examples: dict[str, int] = {}

    def add(
        self, client: str, update: Tensors, examples: int, control: Tensors | None = None
    ) -> None:
        """Add a client; it is the last one by id.

        Args:
            client: its id, later than those of all clients before.
            update: φ_i; nothing of it is kept.
            examples: m_i.
            control: c_i of control variates; of all clients or of none.
        """
        # Where a client is not kept apart, its change need not have memory of its own.
        change = torch.empty_like(self._start) if self._most_apart else self._change
        torch.sub(self._joined(update), self._start, out=change)
        # numpy sums in pairs, whatever the number of threads.
        squares = np.add.reduce(np.square(change.numpy(), out=self._room.numpy()))
        term = _Term(change, self._flat(control) if control else None, float(squares))
        self._examples[client] = examples
        if not self._most_apart:
            self._sum.add(term, 1.0 if self._settings.weights == "uniform" else examples)
            return
        self._apart[client] = term
        if len(self._apart) > self._most_apart:
            least = min(self._apart, key=lambda one: (self._examples[one], one))
            self._sum.add(self._apart.pop(least), self._examples[least])

    @property
    def weights(self) -> dict[str, float]:
        """p_i of the clients added so far."""
        settings = self._settings
        return client_weights(settings.weights, self._examples, settings.largest_weight)

    def mean(self) -> "UpdateMean":
        """The sums over the clients added so far, of which there is at least one."""
        weights, whole = self.weights, self._sum
        scale = 0.0
        if rest := [client for client in weights if client not in self._apart]:
            number = 1 if self._settings.weights == "uniform" else self._examples[rest[0]]
            scale = weights[rest[0]] / number
        control = None if whole.control is None else whole.control * scale
        mean = _Term(whole.change * scale, control, whole.squares * scale)
        for client, term in self._apart.items():
            mean.add(term, weights[client])
        return UpdateMean(
            change=self._members(mean.change),
            squares=mean.squares,
            control={} if mean.control is None else self._members(mean.control),
            weights=weights,
        )

    def _joined(self, tensors: Tensors) -> Tensor:
        ordered = [tensors[name] for name in self._shapes]
        if len({tensor.dtype for tensor in ordered}) > 1:
            ordered = [tensor.double() for tensor in ordered]
        return joined(ordered)

    def _flat(self, tensors: Tensors) -> Tensor:
        return self._joined(tensors).to(torch.float64, copy=True)

    def _members(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._shapes, parts(flat, list(self._shapes.values())), strict=True))


class Sum(Protocol):
    """What a round's updates are added to, one client after another: :class:`UpdateSum`, or one of
    one's own around it.
    """

    def add(
        self, client: str, update: Tensors, examples: int, control: Tensors | None = None
    ) -> None:
        """As :meth:`UpdateSum.add`."""

    def mean(self) -> "UpdateMean":
        """As :meth:`UpdateSum.mean`."""


Aggregator = Callable[[FederationConfig, Tensors], Sum]
"""Makes the sum of a round, as :class:`UpdateSum` is made."""


@dataclass
class _Term:
    """Flat Δ_i, c_i and ‖Δ_i‖², or sums of them."""

    change: Tensor
    control: Tensor | None
    squares: float

    def add(self, other: "_Term", weight: float) -> None:
        self.change.add_(other.change, alpha=weight)
        self.squares += weight * other.squares
        if other.control is not None:
            if self.control is None:
                self.control = torch.zeros_like(other.control)
            self.control.add_(other.control, alpha=weight)


@dataclass(frozen=True)
class UpdateMean:
    """What the clients of a round have sent, in the mean.

    Attributes:
        change: Σ p_i Δ_i, float64, by φ's names.
        squares: Σ p_i ‖Δ_i‖².
        control: Σ p_i c_i, float64; empty without control variates.
        weights: p_i by client.
    """

    change: dict[str, Tensor]
    squares: float
    control: dict[str, Tensor]
    weights: dict[str, float]


def aggregate(
    settings: FederationConfig, shared: Tensors, mean: UpdateMean, optimizer: Tensors
) -> Aggregate:
    """φ^{r+1} = φ^r + ServerOptimizer(Σ p_i Δ_i), with Δ_i = φ_i - φ^r, or φ_i - φ̂ where the
    clients began at φ̂.

    Args:
        settings: which server optimizer, and its constants.
        shared: φ^r.
        mean: of the clients' changes.
        optimizer: the optimizer's state after the last round; empty at first.

    FedAvgM is Hsu et al. (2019): m ← β m + Δ, φ ← φ + η m. FedAdam is Reddi et al. (2021),
    Algorithm 2: m ← β1 m + (1 - β1) Δ, v ← β2 v + (1 - β2) Δ², φ ← φ + η m / (√v + τ). FedExP is
    Jhunjhunwala et al. (2023): φ ← φ + η max(1, r / 2) Δ̄ with r = Σ p_i ‖Δ_i‖² / ‖Δ̄‖², a longer
    step the less the clients agree. Where theirs has an ε below the line, ours bounds r by 1 / Σ
    p_i², what it is where clients move at right angles; updates that cancel each other are not
    stretched beyond.
    """
    rate, together = settings.server_learning_rate, _squared_norm(mean.change)
    if settings.server_optimizer == "extrapolate":
        right_angles = 1 / sum(weight**2 for weight in mean.weights.values())
        rate *= max(1.0, min(mean.squares / (together or math.inf), right_angles) / 2)
    steps, state = _server_step(settings, mean.change, rate, optimizer)
    moved = {name: (shared[name].double() + steps[name]).to(shared[name].dtype) for name in shared}
    changes = {name: moved[name].double() - shared[name].double() for name in shared}
    # Σ p_i ‖Δ_i - Δ̄‖² = Σ p_i ‖Δ_i‖² - ‖Δ̄‖², as Σ p_i = 1.
    spread = max(0.0, mean.squares - together)
    return Aggregate(
        shared=moved,
        optimizer=state,
        update_norm=_squared_norm(changes) ** 0.5,
        disagreement=(spread / mean.squares) ** 0.5 if mean.squares else 0.0,
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
    return sum(float(np.add.reduce(np.square(t.numpy()), axis=None)) for t in tensors.values())

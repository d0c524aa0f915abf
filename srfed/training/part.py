"""One side of a model, φ or θ_i: between rounds, and while it is trained."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from srfed.config import TrainingConfig
from srfed.flat import copies, sent
from srfed.networks.network import Network
from srfed.networks.partition import Exclusive, Partition, Shared
from srfed.training.ema import step_decay, update_average
from srfed.training.optimizer import PartOptimizer

Side = TypeVar("Side", Shared, Exclusive)


@dataclass(frozen=True)
class Part(Generic[Side]):
    """One side between rounds (CPU tensors by name).

    Attributes:
        weights: φ or θ_i.
        average: its moving average.
        moments: Adam's; empty at first, and where they are kept elsewhere or not at all.
        steps: optimizer steps so far; the place in the average's warm-up.
    """

    weights: Side
    average: Side
    moments: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class ClientState:
    """All that a client keeps from one round to the next (CPU tensors by name).

    Attributes:
        exclusive: θ_i.
        shared_moments: Adam's moments of φ, under ``training.shared_moments: keep`` only.
        minibatches: how many it has seen so far; the place in their order.
        memory: what the steps on the update have kept, by step, and c_i of control variates; of φ's
            names.
    """

    exclusive: Part[Exclusive]
    shared_moments: dict[str, Tensor] = field(default_factory=dict)
    minibatches: int = 0
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class LivePart:
    """One side while it is trained. Its tensors stay where they are in memory, whatever part it
    goes on from, so that a captured step goes on working.

    Args:
        training: the run's settings.
        weights: parameters by name; may be empty.
        owned: names of those that may be trained at a rate of their own.

    Attributes:
        weights: the same.
        average: their moving average; empty where somebody else keeps it.
        steps: optimizer steps so far.
    """

    def __init__(
        self,
        training: TrainingConfig,
        weights: Mapping[str, nn.Parameter],
        owned: Collection[str] = (),
    ) -> None:
        self._decay, self._warmup = training.ema_decay, training.ema_warmup
        self.weights = dict(weights)
        self.average: dict[str, Tensor] = {}
        self.steps = 0
        self._optimizer = PartOptimizer(training, self.weights, 0.0, owned=owned)

    @torch.no_grad()
    def begin(self, part: Part[Side], rate: float, owned_rate: float | None = None) -> None:
        """Go on from a part, at this learning rate; an average that it has not is not kept.

        Args:
            part: weights, average, moments, steps.
            rate: the learning rate.
            owned_rate: that of the owned parameters; None takes ``rate``.
        """
        load_tensors(self.weights, part.weights)
        if self.average.keys() != part.average.keys():
            self.average = {
                name: torch.empty_like(self.weights[name], requires_grad=False)
                for name in part.average
            }
        load_tensors(self.average, part.average)
        self.steps = part.steps
        self._optimizer.begin(rate, part.moments, owned_rate)

    def clear_gradients(self) -> None:
        """Set every gradient of the part to None."""
        self._optimizer.clear_gradients()

    def divide_gradients(self, count: int) -> None:
        """Make the sum of so many gradients their mean."""
        gradients = [p.grad for p in self.weights.values() if p.grad is not None]
        if count > 1 and gradients:
            torch._foreach_div_(gradients, count)

    def step(self) -> None:
        """An optimizer step on the weights that have a gradient."""
        self._optimizer.step()

    def count_step(self, *, captured: bool = False) -> None:
        """Say that there has been a step, and take the weights into the average: apart from
        :meth:`step`, which may have been captured, and then can say nothing for itself.
        """
        if captured:
            self._optimizer.mark_started(self.weights)
        update_average(
            self.average, self.weights, step_decay(self._decay, self._warmup, self.steps)
        )
        self.steps += 1

    def export_moments(self, *, lend: bool = False) -> dict[str, Tensor]:
        """Adam's moments; see :meth:`PartOptimizer.export_moments`."""
        return self._optimizer.export_moments(lend=lend)


def initial_state(model: Network, partition: Partition) -> ClientState:
    """The state before a client's first round: θ_i as the model was initialised, no moments."""
    exclusive = partition.take_exclusive(model.state_dict())
    return ClientState(Part(Exclusive(copies(exclusive)), Exclusive(copies(exclusive))))


@torch.no_grad()
def load_tensors(target: nn.Module | Mapping[str, Tensor], *parts: Mapping[str, Tensor]) -> None:
    """Copy tensors in place into a model, or into tensors, by name; to a GPU each part as one."""
    places = target.state_dict() if isinstance(target, nn.Module) else target
    for part in parts:
        if part:
            there = [places[name] for name in part]
            torch._foreach_copy_(there, sent(list(part.values()), there[0].device))

"""One side of a model, φ or θ_i: between rounds, and while it is trained."""

from collections.abc import Collection, Mapping, Sequence
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

    That of several owners at once has their weights with the owner as first dimension, and each
    owner's is a part of it, :meth:`of_owner`: that begins, and is read; a step may be taken by each
    owner, or by all as one where their :attr:`history` is the same.

    Args:
        training: the run's settings.
        weights: parameters by name; may be empty.
        owned: names of those that may be trained at a rate of their own.
        owners: how many are the first dimension; None: these are one owner's.

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
        owners: int | None = None,
    ) -> None:
        self._training = training
        self.weights = dict(weights)
        self.average: dict[str, Tensor] = {}
        self.steps = 0
        self._whole: tuple[LivePart, int] | None = None
        self._optimizer = PartOptimizer(training, self.weights, 0.0, owned=owned, owners=owners)

    def of_owner(self, place: int) -> "LivePart":
        """That of one of the owners; what either does to it is done to both."""
        one = LivePart(self._training, parameters_of_owner(self.weights, place))
        one._whole = self, place
        one._optimizer = self._optimizer.of_owner(place, one.weights)
        return one

    @property
    def history(self) -> tuple[object, ...]:
        """Equal for owners of a stack who can take their steps as one."""
        return self.steps, *self.average, *self._optimizer.history

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
            self.average = {name: self._place_of_average(name) for name in part.average}
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
        self._take_average(self.average, self.steps)
        self.steps += 1

    def count_step_of(self, owners: Sequence["LivePart"]) -> None:
        """Say that there has been a step of all these owners as one, by this part, and take
        everybody's weights into everybody's average.
        """
        first = owners[0]
        self._take_average({name: self.average[name] for name in first.average}, first.steps)
        for owner in owners:
            owner._optimizer.mark_started(self._optimizer.started)
            owner.steps += 1

    def _take_average(self, average: Mapping[str, Tensor], steps: int) -> None:
        decay = step_decay(self._training.ema_decay, self._training.ema_warmup, steps)
        update_average(average, self.weights, decay)

    def _place_of_average(self, name: str) -> Tensor:
        if self._whole is None:
            return torch.empty_like(self.weights[name], requires_grad=False)
        whole, place = self._whole
        if name not in whole.average:
            whole.average[name] = whole._place_of_average(name)
        return whole.average[name][place]

    @property
    def moments(self) -> dict[str, Tensor]:
        """Adam's moments where they are; see :attr:`PartOptimizer.moments`."""
        return self._optimizer.moments

    def export_moments(self) -> dict[str, Tensor]:
        """Copies of Adam's moments on the CPU."""
        return self._optimizer.export_moments()


def parameters_of_owner(weights: Mapping[str, Tensor], place: int) -> dict[str, nn.Parameter]:
    """One owner's parameters, of weights with the owner as first dimension, whose memory they
    share.
    """
    return {name: nn.Parameter(tensor.detach()[place]) for name, tensor in weights.items()}


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

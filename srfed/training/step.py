"""One optimizer step, of one task or of several at once, and what it says of its losses."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srfed.config import RunConfig, TrainingConfig
from srfed.device import Captured, autocast
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import QUARTERS, Forward, Process
from srfed.model import stacked_forward
from srfed.networks.network import Network
from srfed.networks.partition import Control, Exclusive, Partition, Shared
from srfed.training.gradient_terms import GradientTerms
from srfed.training.minibatches import Minibatch
from srfed.training.optimizer import Rates
from srfed.training.part import LivePart, Part


class Share(NamedTuple):
    """What one task, or a pool of tasks, brings to a training step.

    Attributes:
        forward: the network with φ and this task's θ_i.
        exclusive: θ_i; without weights where all is shared.
        batch: its minibatch.
        drawing: the context that its forward pass draws in.
    """

    forward: Forward
    exclusive: LivePart
    batch: Minibatch
    drawing: AbstractContextManager[None] = nullcontext()


def training_step(
    config: RunConfig,
    objective: Objective,
    shared: LivePart,
    shares: Sequence[Share],
    *,
    clip_together: bool = False,
    terms: GradientTerms | None = None,
) -> list[Tensor]:
    """One optimizer step: φ descends the mean of the shares' losses, eq. (8), each θ_i its own
    share's, eq. (7).

    Only what requires a gradient moves. A share goes through the network by itself, which changes
    nothing: no layer mixes images.

    Args:
        config: the run's configuration.
        objective: what the network learns to predict.
        shared: φ.
        shares: at least one, of different tasks.
        clip_together: clip all gradients by their common norm, and not each part's by its own.
        terms: what is added to φ's gradient, if anything.

    Returns:
        (N,) losses of each share, on the device.
    """
    found = []
    shared.clear_gradients()
    for share in shares:
        share.exclusive.clear_gradients()
        device = share.batch.images.device
        with autocast(config.resources, device), share.drawing:
            losses = objective.loss(share.forward, *share.batch)
        losses.mean().backward()
        found.append(losses.detach())
    _descend(
        config.training,
        shared,
        [share.exclusive for share in shares],
        clip_together=clip_together,
        terms=terms,
    )
    return found


Clip = Callable[[Sequence[Tensor], float], object]
"""(weights, the longest that their gradients may be together) -> None."""
CLIP_ONE: Clip = partial(nn.utils.clip_grad_norm_, foreach=True)


def _descend(
    training: TrainingConfig,
    shared: LivePart,
    exclusive: Sequence[LivePart],
    clip: Clip = CLIP_ONE,
    *,
    clip_together: bool,
    terms: GradientTerms | None,
) -> None:
    """What comes of the gradients of φ, which are so far the sum over the parts of θ, and of
    those.
    """
    shared.divide_gradients(len(exclusive))
    if terms is not None:
        terms.before_clipping()
    parts = [*exclusive, shared]
    if training.gradient_clip is not None:
        groups = (
            [[p for part in parts for p in part.weights.values()]]
            if clip_together
            else [list(part.weights.values()) for part in parts]
        )
        for group in groups:
            clip(group, training.gradient_clip)
    if terms is not None:
        terms.after_clipping()
    for part in parts:
        part.step()


def clip_each_owner(weights: Sequence[Tensor], most: float) -> None:
    """Clip the gradients of weights with the owner as first dimension, each owner's by its own
    norm, as :func:`torch.nn.utils.clip_grad_norm_` clips one's.
    """
    gradients = [tensor.grad for tensor in weights if tensor.grad is not None]
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    factors = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


class Owner:
    """One owner's side of a step: its φ and θ_i while they are trained, and what is added to φ's
    gradient; or that of several owners, of whom each has a part of it.

    Args:
        shared, exclusive: φ and θ_i.
        terms: what is added to φ's gradient.

    Attributes:
        shared, exclusive, terms: the same.
        parts: φ and θ_i by name.
    """

    def __init__(self, shared: LivePart, exclusive: LivePart, terms: GradientTerms) -> None:
        self.shared, self.exclusive, self.terms = shared, exclusive, terms
        self.parts = {"shared": shared, "exclusive": exclusive}

    @classmethod
    def of(
        cls,
        training: TrainingConfig,
        parameters: Mapping[str, nn.Parameter],
        partition: Partition,
        owners: int | None = None,
    ) -> "Owner":
        """That of the network's parameters; or of those of so many owners, of the same shapes but
        for a first dimension that is the owner.
        """
        shared, exclusive = (
            LivePart(training, {name: parameters[name] for name in names}, partition.owned, owners)
            for names in (partition.shared, partition.exclusive)
        )
        return cls(shared, exclusive, GradientTerms(training, shared.weights))

    def of_owner(self, place: int) -> "Owner":
        """That of one of the owners; what is done to it is done to this one's part of it."""
        shared, exclusive = self.shared.of_owner(place), self.exclusive.of_owner(place)
        return Owner(shared, exclusive, self.terms.of_owner(place, shared.weights))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All of them by name."""
        return {**self.shared.weights, **self.exclusive.weights}

    @property
    def history(self) -> tuple[object, ...]:
        """Equal for owners of a stack who can take their steps as one."""
        return self.shared.history, self.exclusive.history

    @torch.no_grad()
    def begin(
        self,
        shared: Part[Shared],
        exclusive: Part[Exclusive],
        rates: Rates,
        correction: Control | None = None,
    ) -> None:
        """Begin a round from these parts, at these rates; ``correction`` as of
        :meth:`GradientTerms.begin`.
        """
        self.shared.begin(shared, rates.shared)
        self.exclusive.begin(exclusive, rates.exclusive, rates.owned)
        self.terms.begin(correction)


class Beginning(NamedTuple):
    """What an owner's round begins with; see :meth:`Owner.begin`."""

    shared: Part[Shared]
    exclusive: Part[Exclusive]
    rates: Rates
    correction: Control | None = None


class LocalStep:
    """A client's training step on a network's own parameters, or that of several clients at once on
    weights with the owner as first dimension; captured as a CUDA graph where there is CUDA.

    One for each model, whichever clients train it: weights and moments are overwritten in place
    between clients. In a stack the owners go through the network together; each has clipping,
    moments and averages of its own, whether its step is taken by itself or with everybody's as one.
    Its sums are of another order than those of one owner by itself, and so are its last bits; on a
    CPU they do not depend on who else is in the stack.

    Args:
        config: the run's configuration.
        model: a network of the run's shape, on the device to train on.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.
        stack: how many owners are trained at once, at least 2; None: one, on the model's own
            parameters.
        as_one: whether the owners of a stack take their steps as one where they have taken as many
            before; None: on a GPU, where the kernels of each would be many and small. A CPU's Adam
            rounds the last values of a tensor otherwise, and with them an owner's bits would depend
            on who else is there.

    Attributes:
        model, objective, device: the same, and where they are.
        captures: whether steps are captured, and so have to be prepared.
        owners: who is trained.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Network,
        partition: Partition,
        objective: Objective,
        stack: int | None = None,
        as_one: bool | None = None,
    ) -> None:
        self._config, self.model, self.objective = config, model, objective
        self._partition, self._as_one = partition, as_one
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        self._everybody: Owner | None = None
        if stack is None:
            self.owners = [Owner.of(config.training, parameters, partition)]
        else:
            stacked = {
                name: nn.Parameter(torch.empty(stack, *parameter.shape, device=self.device))
                for name, parameter in parameters.items()
            }
            self._everybody = Owner.of(config.training, stacked, partition, stack)
            self.owners = [self._everybody.of_owner(place) for place in range(stack)]
        self._moves_as_one = False
        self._captured: dict[tuple[object, ...], Captured] = {}
        self._prepared: set[object] = set()
        # A captured step of SGD would keep the rate that it was captured with.
        self.captures = self.device.type == "cuda" and config.training.optimizer == "adam"

    def of_fewer(self, owners: int) -> "LocalStep":
        """The same for so many owners. This one is given up, with what it has taken of the
        device's memory.
        """
        config, model, partition = self._config, self.model, self._partition
        self.release()
        self._everybody, self.owners = None, []
        stack = owners if owners > 1 else None
        return LocalStep(config, model, partition, self.objective, stack, self._as_one)

    def release(self) -> None:
        """Give back what captured steps have taken of the device's memory; they are captured anew
        when they are prepared again.
        """
        self._captured = {}
        self._prepared.clear()

    def begin(self, beginnings: Sequence[Beginning]) -> None:
        """Begin a round of each owner."""
        for owner, beginning in zip(self.owners, beginnings, strict=True):
            owner.begin(*beginning)
        if self._everybody is not None:
            wanted = self.device.type == "cuda" if self._as_one is None else self._as_one
            self._moves_as_one = wanted and len({owner.history for owner in self.owners}) == 1

    def is_prepared(self, parts: tuple[str, ...], shape: tuple[int, ...]) -> bool:
        """Whether there is nothing to be captured for steps of these parts on minibatches of this
        shape of each owner, by owners as they have begun.
        """
        return not self.captures or (parts, shape, self._moves_as_one) in self._prepared

    def prepare(self, parts: tuple[str, ...], batch: Minibatch, *tasks: Tensor) -> None:
        """Capture the step for minibatches like this, of all owners; it spoils the weights and the
        moments, so that the round has to begin again.
        """
        self._set_trained(parts)
        self._of(parts).prepare(*batch, *tasks)
        images = batch.images
        shape = (len(images) // len(self.owners), *images.shape[1:])
        self._prepared.add((parts, shape, self._moves_as_one))

    def run(self, parts: tuple[str, ...], batch: Minibatch, *tasks: Tensor) -> list[Tensor]:
        """Train these parts on a minibatch of each owner, all of one size.

        Args:
            parts: which of φ and θ_i.
            batch: one owner's after the other's, in the order of ``owners``.
            tasks: the places of the images' tasks, for a network with a table of them.

        Returns:
            (N,) losses of each owner, eq. (7), on the device.
        """
        if self.captures:
            losses = self._of(parts)(*batch, *tasks).clone()
        else:
            self._set_trained(parts)
            losses = self._step(parts, *batch, *tasks)
        for part in parts:
            of_owners = [owner.parts[part] for owner in self.owners]
            if self._moves_as_one:
                assert self._everybody is not None
                self._everybody.parts[part].count_step_of(of_owners)
            else:
                for one in of_owners:
                    one.count_step(captured=self.captures)
        return list(losses.chunk(len(self.owners)))

    def _step(
        self,
        parts: tuple[str, ...],
        images: Tensor,
        times: Tensor,
        noise: Tensor,
        *tasks: Tensor,
    ) -> Tensor:
        batch = Minibatch(images, times, noise)
        if self._everybody is not None:
            return self._step_together(self._everybody, parts, batch, *tasks)
        forward = (lambda x, t: self.model(x, t, *tasks)) if tasks else self.model
        (owner,) = self.owners
        share = Share(forward, owner.exclusive, batch)
        (losses,) = training_step(
            self._config,
            self.objective,
            owner.shared,
            [share],
            clip_together=True,
            terms=owner.terms if "shared" in parts else None,
        )
        return losses

    def _step_together(
        self, everybody: Owner, parts: tuple[str, ...], batch: Minibatch, *tasks: Tensor
    ) -> Tensor:
        """One forward and one backward pass for all owners, then each one's step."""
        count, stacked = len(self.owners), everybody.weights
        trained = [name for part in parts for name in everybody.parts[part].weights]
        for name, tensor in stacked.items():
            tensor.requires_grad_(name in trained)
        forward = stacked_forward(self._config, self.model, stacked)
        with autocast(self._config.resources, self.device):
            losses = self.objective.loss(lambda x, t: forward(x, t, *tasks), *batch)
        # No owner's weights are in another's loss, so the gradient of the sum is each one's own.
        total = losses.unflatten(0, (count, -1)).mean(dim=1).sum()
        found = torch.autograd.grad(total, [stacked[name] for name in trained], allow_unused=True)
        # In the weights' own layout: the fused optimizer pairs elements by their place in memory.
        gradients = {
            name: gradient.contiguous()
            for name, gradient in zip(trained, found, strict=True)
            if gradient is not None
        }
        if self._moves_as_one:
            self._move(parts, everybody, gradients, clip_each_owner)
            return losses.detach()
        of_owners = {name: gradient.unbind() for name, gradient in gradients.items()}
        for place, owner in enumerate(self.owners):
            self._move(parts, owner, {name: each[place] for name, each in of_owners.items()})
        return losses.detach()

    def _move(
        self,
        parts: tuple[str, ...],
        owner: Owner,
        gradients: Mapping[str, Tensor],
        clip: Clip = CLIP_ONE,
    ) -> None:
        for name, weight in owner.weights.items():
            weight.grad = gradients.get(name)
        _descend(
            self._config.training,
            owner.shared,
            [owner.exclusive],
            clip,
            clip_together=True,
            terms=owner.terms if "shared" in parts else None,
        )

    def _of(self, parts: tuple[str, ...]) -> Captured:
        form = (parts, self._moves_as_one)
        if form not in self._captured:
            self._captured[form] = Captured(
                lambda *tensors: self._step(parts, *tensors), self.device
            )
        return self._captured[form]

    def _set_trained(self, parts: Collection[str]) -> None:
        for owner in self.owners:
            for name, part in owner.parts.items():
                for parameter in part.weights.values():
                    parameter.requires_grad_(name in parts)


class LossMeter:
    """Collects losses on the device, in all and by quarter of the way from image to noise; read
    once, at the end.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._losses: list[Tensor] = []
        self._drawn: list[Tensor] = []

    @property
    def images(self) -> int:
        """Images seen, with repetition."""
        return sum(len(losses) for losses in self._losses)

    def add(self, losses: Tensor, times: Tensor) -> None:
        """Take in (N,) losses of images at these times."""
        self._losses.append(losses)
        self._drawn.append(times)

    def read(self) -> tuple[float, tuple[float, ...], tuple[int, ...]]:
        """Mean loss, mean loss of each quarter, images behind each of these."""
        # On the CPU, which adds in a fixed order.
        losses = torch.cat(self._losses).cpu().double()
        quarters = self._process.quarter(torch.cat(self._drawn).cpu())
        sums = torch.zeros(QUARTERS, dtype=torch.float64).index_add_(0, quarters, losses)
        counts = torch.bincount(quarters, minlength=QUARTERS)
        return (
            float(sums.sum() / len(losses)),
            tuple((sums / counts).tolist()),
            tuple(counts.tolist()),
        )

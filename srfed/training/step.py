"""One optimizer step, of one task or of several at once, and what it says of its losses."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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


def _descend(
    training: TrainingConfig,
    shared: LivePart,
    exclusive: Sequence[LivePart],
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
            nn.utils.clip_grad_norm_(group, training.gradient_clip, foreach=True)
    if terms is not None:
        terms.after_clipping()
    for part in parts:
        part.step()


class Owner:
    """One owner's side of a step: its φ and θ_i while they are trained, and what is added to φ's
    gradient.

    Args:
        training: the run's settings.
        parameters: the network's, by name, or the owner's own of the same shapes.
        partition: the run's partition of them.

    Attributes:
        shared, exclusive: φ and θ_i.
        terms: what is added to φ's gradient.
    """

    def __init__(
        self,
        training: TrainingConfig,
        parameters: Mapping[str, nn.Parameter],
        partition: Partition,
    ) -> None:
        self.shared, self.exclusive = (
            LivePart(training, {name: parameters[name] for name in names}, partition.owned)
            for names in (partition.shared, partition.exclusive)
        )
        self.parts = {"shared": self.shared, "exclusive": self.exclusive}
        self.terms = GradientTerms(training, self.shared.weights)

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


class LocalStep:
    """A client's training step on a network's own parameters, or that of several clients at once on
    weights with the owner as first dimension; captured as a CUDA graph where there is CUDA.

    One for each model, whichever clients train it: weights and moments are overwritten in place
    between clients. In a stack the owners go through the network together, and only there: each has
    its own clipping, optimizer and averages. Its sums are of another order than those of one owner
    by itself, and so are its last bits; on a CPU they do not depend on who else is in the stack.

    Args:
        config: the run's configuration.
        model: a network of the run's shape, on the device to train on.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.
        stack: how many owners are trained at once, at least 2; None: one, on the model's own
            parameters.

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
    ) -> None:
        self._config, self.model, self.objective = config, model, objective
        self._partition = partition
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        if stack is None:
            self._stacked: dict[str, Tensor] = {}
            self.owners = [Owner(config.training, parameters, partition)]
        else:
            self._stacked = {
                name: torch.empty(stack, *parameter.shape, device=self.device)
                for name, parameter in parameters.items()
            }
            self.owners = [
                Owner(
                    config.training,
                    {name: nn.Parameter(tensor[place]) for name, tensor in self._stacked.items()},
                    partition,
                )
                for place in range(stack)
            ]
        self._captured: dict[tuple[str, ...], Captured] = {}
        # A captured step of SGD would keep the rate that it was captured with.
        self.captures = self.device.type == "cuda" and config.training.optimizer == "adam"

    def of_fewer(self, owners: int) -> "LocalStep":
        """The same for so many owners. This one is given up, with what it has taken of the
        device's memory.
        """
        config, model, partition = self._config, self.model, self._partition
        self.release()
        self._stacked, self.owners = {}, []
        return LocalStep(config, model, partition, self.objective, owners if owners > 1 else None)

    def release(self) -> None:
        """Give back what captured steps have taken of the device's memory; they are captured anew
        when they are prepared again.
        """
        self._captured = {}

    def prepare(
        self, parts: tuple[str, ...], batches: Sequence[Minibatch], tasks: Sequence[Tensor]
    ) -> None:
        """Capture the step for minibatches of this shape, if not done yet; it spoils the weights
        and the moments.

        To be called before :meth:`Owner.begin`, where ``captures`` is true.
        """
        self._set_trained(parts)
        self._of(parts).prepare(*_joined(batches, tasks))

    def run(
        self, parts: tuple[str, ...], batches: Sequence[Minibatch], tasks: Sequence[Tensor]
    ) -> list[Tensor]:
        """Train these parts on a minibatch of each owner, all of one size.

        Args:
            parts: which of φ and θ_i.
            batches: in the order of ``owners``.
            tasks: the places of each batch's tasks, for a network with a table of them; otherwise
                empty.

        Returns:
            (N,) losses of each owner, eq. (7), on the device.
        """
        arguments = _joined(batches, tasks)
        if self.captures:
            losses = self._of(parts)(*arguments).clone()
        else:
            self._set_trained(parts)
            losses = self._step(parts, *arguments)
        for owner in self.owners:
            for part in parts:
                owner.parts[part].count_step(captured=self.captures)
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
        if self._stacked:
            return self._step_together(parts, batch, *tasks)
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

    def _step_together(self, parts: tuple[str, ...], batch: Minibatch, *tasks: Tensor) -> Tensor:
        """One forward and one backward pass for all owners, then each one's own step."""
        count = len(self.owners)
        trained = {name for part in parts for name in self.owners[0].parts[part].weights}
        for name, tensor in self._stacked.items():
            tensor.requires_grad_(name in trained)
        forward = stacked_forward(self._config, self.model, self._stacked)
        with autocast(self._config.resources, self.device):
            losses = self.objective.loss(lambda x, t: forward(x, t, *tasks), *batch)
        # No owner's weights are in another's loss, so the gradient of the sum is each one's own.
        leaves = [tensor for tensor in self._stacked.values() if tensor.requires_grad]
        total = losses.unflatten(0, (count, -1)).mean(dim=1).sum()
        # In the weights' own layout: the fused optimizer pairs elements by their place in memory.
        gradients = [
            (None,) * count if gradient is None else gradient.contiguous().unbind()
            for gradient in torch.autograd.grad(total, leaves, allow_unused=True)
        ]
        names = [name for name in self._stacked if name in trained]
        for place, owner in enumerate(self.owners):
            weights = {**owner.shared.weights, **owner.exclusive.weights}
            owner.shared.clear_gradients()
            owner.exclusive.clear_gradients()
            for name, of_owners in zip(names, gradients, strict=True):
                weights[name].grad = of_owners[place]
            _descend(
                self._config.training,
                owner.shared,
                [owner.exclusive],
                clip_together=True,
                terms=owner.terms if "shared" in parts else None,
            )
        return losses.detach()

    def _of(self, parts: tuple[str, ...]) -> Captured:
        if parts not in self._captured:
            self._captured[parts] = Captured(
                lambda *tensors: self._step(parts, *tensors), self.device
            )
        return self._captured[parts]

    def _set_trained(self, parts: Collection[str]) -> None:
        for owner in self.owners:
            for name, part in owner.parts.items():
                for parameter in part.weights.values():
                    parameter.requires_grad_(name in parts)


def _joined(batches: Sequence[Minibatch], tasks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The owners' minibatches as one; one owner's as it is."""
    if len(batches) == 1:
        return (*batches[0], *tasks)
    columns = [list(column) for column in zip(*batches, strict=True)]
    return tuple(torch.cat(column) for column in [*columns, *([list(tasks)] if tasks else [])])


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

"""One optimizer step, of one task or of several at once, and what it says of its losses."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srfed.config import RunConfig
from srfed.device import Captured, autocast
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import QUARTERS, Forward, Process
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
    training, found = config.training, []
    shared.clear_gradients()
    for share in shares:
        share.exclusive.clear_gradients()
        device = share.batch.images.device
        with autocast(config.resources, device), share.drawing:
            losses = objective.loss(share.forward, *share.batch)
        losses.mean().backward()
        found.append(losses.detach())
    shared.divide_gradients(len(shares))
    if terms is not None:
        terms.before_clipping()
    parts = [*(share.exclusive for share in shares), shared]
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
    return found


class LocalStep:
    """A client's training step on a network's own parameters; captured as a CUDA graph where there
    is CUDA.

    One for each model, whichever client trains it: weights and moments are overwritten in place
    between clients.

    Args:
        config: the run's configuration.
        model: a network of the run's shape, on the device to train on.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.

    Attributes:
        captures: whether steps are captured, and so have to be prepared.
        shared, exclusive: φ and θ_i.
        terms: what is added to φ's gradient.
    """

    def __init__(
        self, config: RunConfig, model: Network, partition: Partition, objective: Objective
    ) -> None:
        self._config, self._model, self._objective = config, model, objective
        self._device = next(model.parameters()).device
        parameters = dict(model.named_parameters())
        self.shared, self.exclusive = (
            LivePart(config.training, {name: parameters[name] for name in names}, partition.owned)
            for names in (partition.shared, partition.exclusive)
        )
        self._parts = {"shared": self.shared, "exclusive": self.exclusive}
        self.terms = GradientTerms(config.training, self.shared.weights)
        self._captured: dict[tuple[str, ...], Captured] = {}
        # A captured step of SGD would keep the rate that it was captured with.
        self.captures = self._device.type == "cuda" and config.training.optimizer == "adam"

    def prepare(self, parts: tuple[str, ...], batch: Minibatch, tasks: Tensor | None) -> None:
        """Capture the step for a minibatch of this shape, if not done yet; it spoils the weights
        and the moments.

        To be called before :meth:`begin`, where ``captures`` is true.
        """
        self._set_trained(parts)
        self._of(parts).prepare(*batch, *(() if tasks is None else (tasks,)))

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

    def run(self, parts: tuple[str, ...], batch: Minibatch, tasks: Tensor | None) -> Tensor:
        """Train these parts on a minibatch; (N,) losses, eq. (7), on the device."""
        arguments = (*batch, *(() if tasks is None else (tasks,)))
        self._set_trained(parts)
        losses = (
            self._of(parts)(*arguments).clone() if self.captures else self._step(parts, *arguments)
        )
        for part in parts:
            self._parts[part].count_step(captured=self.captures)
        return losses

    def _step(
        self,
        parts: tuple[str, ...],
        images: Tensor,
        times: Tensor,
        noise: Tensor,
        *tasks: Tensor,
    ) -> Tensor:
        forward = (lambda x, t: self._model(x, t, *tasks)) if tasks else self._model
        share = Share(forward, self.exclusive, Minibatch(images, times, noise))
        (losses,) = training_step(
            self._config,
            self._objective,
            self.shared,
            [share],
            clip_together=True,
            terms=self.terms if "shared" in parts else None,
        )
        return losses

    def _of(self, parts: tuple[str, ...]) -> Captured:
        if parts not in self._captured:
            self._captured[parts] = Captured(
                lambda *tensors: self._step(parts, *tensors), self._device
            )
        return self._captured[parts]

    def _set_trained(self, parts: Collection[str]) -> None:
        for name, part in self._parts.items():
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

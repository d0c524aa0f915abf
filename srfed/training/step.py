"""One optimizer step of local training, and what it says of its losses."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from srfed.config import RunConfig
from srfed.device import Captured, autocast
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import QUARTERS, Process
from srfed.networks.network import Network
from srfed.networks.partition import Partition
from srfed.training.minibatches import Minibatch
from srfed.training.optimizer import PartOptimizer


class LocalStep:
    """A minibatch's loss, its gradient and one step of the optimizers; captured as a CUDA graph
    where there is CUDA.

    One for each model, whichever client trains it: weights and moments are overwritten in place
    between clients.

    Args:
        config: the run's configuration.
        model: a network of the run's shape, on the device to train on.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.

    Attributes:
        captures: whether steps are captured, and so have to be prepared.
        shared, exclusive: the model's parameters of φ and of θ_i, by name.
    """

    def __init__(
        self, config: RunConfig, model: Network, partition: Partition, objective: Objective
    ) -> None:
        self._config, self._model, self._objective = config, model, objective
        self._device = next(model.parameters()).device
        parameters = dict(model.named_parameters())
        self.shared = {name: parameters[name] for name in partition.shared}
        self.exclusive = {name: parameters[name] for name in partition.exclusive}
        self._optimizers = {
            "shared": PartOptimizer(config.training, self.shared, 0.0),
            "exclusive": PartOptimizer(config.training, self.exclusive, 0.0),
        }
        proximal = config.training.proximal
        self._anchor = (
            {name: tensor.detach().clone() for name, tensor in self.shared.items()}
            if proximal
            else {}
        )
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
        shared: tuple[float, Mapping[str, Tensor] | None],
        exclusive: tuple[float, Mapping[str, Tensor] | None],
    ) -> None:
        """Begin a round from the weights that the model has now; each part with its rate and Adam's
        moments.
        """
        self._optimizers["shared"].begin(*shared)
        self._optimizers["exclusive"].begin(*exclusive)
        for name, tensor in self._anchor.items():
            tensor.copy_(self.shared[name])

    def run(self, parts: tuple[str, ...], batch: Minibatch, tasks: Tensor | None) -> Tensor:
        """Train these parts on a minibatch; (N,) losses, eq. (7), on the device."""
        arguments = (*batch, *(() if tasks is None else (tasks,)))
        self._set_trained(parts)
        if not self.captures:
            return self._step(parts, *arguments)
        losses = self._of(parts)(*arguments).clone()
        for part in parts:
            self._optimizers[part].mark_started(self._tensors(part))
        return losses

    def export_moments(self, part: str) -> dict[str, Tensor]:
        """Adam's moments of a part; see :meth:`PartOptimizer.export_moments`."""
        return self._optimizers[part].export_moments()

    def _step(
        self,
        parts: tuple[str, ...],
        images: Tensor,
        times: Tensor,
        noise: Tensor,
        *tasks: Tensor,
    ) -> Tensor:
        training = self._config.training
        forward = (lambda x, t: self._model(x, t, *tasks)) if tasks else self._model
        with autocast(self._config.resources, self._device):
            losses = self._objective.loss(forward, images, times, noise)
        for optimizer in self._optimizers.values():
            optimizer.clear_gradients()
        losses.mean().backward()
        if training.proximal and "shared" in parts:
            _pull_towards(self.shared, self._anchor, training.proximal)
        if training.gradient_clip is not None:
            active = [parameter for part in parts for parameter in self._tensors(part).values()]
            nn.utils.clip_grad_norm_(active, training.gradient_clip, foreach=True)
        for optimizer in self._optimizers.values():
            optimizer.step()
        return losses.detach()

    def _of(self, parts: tuple[str, ...]) -> Captured:
        if parts not in self._captured:
            self._captured[parts] = Captured(
                lambda *tensors: self._step(parts, *tensors), self._device
            )
        return self._captured[parts]

    def _tensors(self, part: str) -> Mapping[str, nn.Parameter]:
        return self.shared if part == "shared" else self.exclusive

    def _set_trained(self, parts: Collection[str]) -> None:
        for part in self._optimizers:
            for parameter in self._tensors(part).values():
                parameter.requires_grad_(part in parts)


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


@torch.no_grad()
def _pull_towards(
    parameters: Mapping[str, nn.Parameter], anchor: Mapping[str, Tensor], strength: float
) -> None:
    """Add the gradient of FedProx's term, strength / 2 · ‖φ - anchor‖² (Li et al. 2020, eq. 2)."""
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        parameter.grad.add_(parameter - anchor[name], alpha=strength)

"""One client's local training: θ_i and φ on the client's own images, for one round."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from srfed.config import RunConfig, TrainingConfig
from srfed.data import to_model_range
from srfed.diffusion.process import Diffusion
from srfed.models.partition import Partition
from srfed.models.unet import UNet
from srfed.training.batches import MinibatchOrder, draw_minibatch, seeded_dropout
from srfed.training.ema import step_decay, update_average
from srfed.training.optimizers import PartOptimizer, learning_rate_factor
from srfed.training.setup import autocast, noise_of_task

LOSS_QUARTERS = 4


@dataclass(frozen=True)
class ClientState:
    """All that a client keeps from one round to the next (CPU tensors by name).

    Attributes:
        exclusive: θ_i.
        exclusive_average: the moving average of θ_i.
        exclusive_moments: Adam's moments of θ_i.
        shared_moments: Adam's moments of φ, under ``training.shared_moments: keep`` only.
        steps: minibatches seen so far; the place in the minibatch order.
        exclusive_steps: optimizer steps of θ_i so far; the place in the average's warm-up.
    """

    exclusive: dict[str, Tensor]
    exclusive_average: dict[str, Tensor]
    exclusive_moments: dict[str, Tensor] = field(default_factory=dict)
    shared_moments: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    exclusive_steps: int = 0


@dataclass(frozen=True)
class LocalResult:
    """What one round of local training gives.

    Attributes:
        shared: φ_i, the client's φ after its local steps.
        shared_moments: Adam's moments of φ after them.
        state: what the client keeps.
        loss: mean over the images seen of the loss, eq. (7).
        loss_by_quarter: the same for timesteps in each quarter of 1..T; NaN where none was drawn.
        images_by_quarter: images behind each of these, with repetition.
        shared_steps: optimizer steps taken on φ.
        images: images seen, with repetition.
        seconds: wall time of the steps.
    """

    shared: dict[str, Tensor]
    shared_moments: dict[str, Tensor]
    state: ClientState
    loss: float
    loss_by_quarter: tuple[float, ...]
    images_by_quarter: tuple[int, ...]
    shared_steps: int
    images: int
    seconds: float


def initial_state(model: UNet, partition: Partition) -> ClientState:
    """The state before a client's first round: θ_i as the model was initialised, no moments."""
    exclusive = {
        name: tensor.detach().cpu().clone() for name, tensor in partition.take_exclusive(model.state_dict()).items()
    }
    return ClientState(exclusive, {name: tensor.clone() for name, tensor in exclusive.items()})


@torch.no_grad()
def load_tensors(model: nn.Module, *parts: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model in place, by name."""
    target = model.state_dict()
    for part in parts:
        for name, tensor in part.items():
            target[name].copy_(tensor)


class LocalTrainer:
    """Trains one task's model round by round; holds nothing that a round's result depends on.

    Args:
        config: the run's configuration.
        model: any UNet of the run's shape, on the device to train on; its weights are overwritten.
        partition: the run's partition of it.
        diffusion: the forward process, on the same device.
        task: the task's name, part of every seed.
        images: the task's training images, uint8 N x H x W x C.
        index: the task's position, which a model with a table of tasks is told.

    Raises:
        UserError: the batch size does not fit the images, or the model's table has no such task.
    """

    def __init__(
        self,
        config: RunConfig,
        model: UNet,
        partition: Partition,
        diffusion: Diffusion,
        task: str,
        images: np.ndarray,
        index: int = 0,
    ) -> None:
        self._config = config
        self._model = model
        self._predict_noise = noise_of_task(model, index)
        self._diffusion = diffusion
        self._task = task
        self._device = next(model.parameters()).device
        parameters = dict(model.named_parameters())
        self._shared = {name: parameters[name] for name in partition.shared}
        self._exclusive = {name: parameters[name] for name in partition.exclusive}
        layout = torch.channels_last if config.resources.channels_last else torch.contiguous_format
        self._images = to_model_range(images).to(self._device).contiguous(memory_format=layout)
        training = config.training
        self._order = MinibatchOrder.of(training, len(images), training.batch_size, config.seed, task)

    def train(
        self,
        round_number: int,
        shared: Mapping[str, Tensor],
        state: ClientState,
        shared_moments: Mapping[str, Tensor] | None = None,
    ) -> LocalResult:
        """Train for one round from (φ, θ_i).

        Args:
            round_number: part of the seeds of noise and timesteps; the place in the rates' schedule.
            shared: φ as the server sent it.
            state: the client's state after its last accepted round.
            shared_moments: φ's averaged moments, under ``training.shared_moments: average``.
        """
        training = self._config.training
        load_tensors(self._model, shared, state.exclusive)
        self._model.train()
        factor = learning_rate_factor(self._config, round_number)
        shared_rate = factor * training.learning_rate
        exclusive_rate = factor * (training.exclusive_learning_rate or training.learning_rate)
        kept = state.shared_moments if training.shared_moments == "keep" else shared_moments
        on_exclusive = PartOptimizer(training, self._exclusive, exclusive_rate, state.exclusive_moments)
        on_shared = PartOptimizer(training, self._shared, shared_rate, kept)

        first_shared = {name: shared[name].to(self._device) for name in self._shared}
        average = {name: t.to(self._device, copy=True) for name, t in state.exclusive_average.items()}
        exclusive_step = state.exclusive_steps
        meter = LossMeter(self._diffusion.timesteps, self._device)
        planned = phases(training, self._order.steps_per_pass, self._exclusive, self._shared)
        shared_steps = sum(count for count, parts in planned if "shared" in parts)
        start = time.perf_counter()
        step = 0
        for count, parts in planned:
            active = [*(self._exclusive.values() if "exclusive" in parts else ()),
                      *(self._shared.values() if "shared" in parts else ())]  # fmt: skip
            for parameter in self._model.parameters():
                parameter.requires_grad_(False)
            for parameter in active:
                parameter.requires_grad_(True)
            for _ in range(count):
                indices = self._order.indices(state.steps + step).to(self._device, non_blocking=True)
                batch = draw_minibatch(
                    self._config, self._diffusion, self._images[indices], self._task, round_number, step
                )
                dropout = seeded_dropout(self._config, self._device, self._task, round_number, step)
                with autocast(self._config.resources, self._device), dropout:
                    losses = self._diffusion.loss_per_image(self._predict_noise, *batch)
                on_exclusive.clear_gradients()
                on_shared.clear_gradients()
                losses.mean().backward()
                if training.proximal and "shared" in parts:
                    _pull_towards(self._shared, first_shared, training.proximal)
                if training.gradient_clip is not None:
                    nn.utils.clip_grad_norm_(active, training.gradient_clip, foreach=True)
                on_exclusive.step()
                on_shared.step()
                if "exclusive" in parts:
                    decay = step_decay(training.ema_decay, training.ema_warmup, exclusive_step)
                    update_average(average, self._exclusive, decay)
                    exclusive_step += 1
                meter.add(losses.detach(), batch.timesteps)
                step += 1
        loss, loss_by_quarter, images_by_quarter = meter.read()
        seconds = time.perf_counter() - start

        moments = on_shared.export_moments()
        return LocalResult(
            shared=copies(self._shared),
            shared_moments=moments if training.shared_moments != "reset" else {},
            state=ClientState(
                exclusive=copies(self._exclusive),
                exclusive_average=copies(average),
                exclusive_moments=on_exclusive.export_moments(),
                shared_moments=moments if training.shared_moments == "keep" else {},
                steps=state.steps + step,
                exclusive_steps=exclusive_step,
            ),
            loss=loss,
            loss_by_quarter=loss_by_quarter,
            images_by_quarter=images_by_quarter,
            shared_steps=shared_steps,
            images=meter.images,
            seconds=seconds,
        )


class LossMeter:
    """Sums losses on the device, in all and by quarter of the timestep range; read once, at the end."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self._timesteps = timesteps
        self._sums = torch.zeros(LOSS_QUARTERS, dtype=torch.float64, device=device)
        self._counts = torch.zeros(LOSS_QUARTERS, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        quarters = (timesteps - 1) * LOSS_QUARTERS // self._timesteps
        self._sums.index_add_(0, quarters, losses.double())
        self._counts.index_add_(0, quarters, torch.ones_like(losses, dtype=torch.float64))
        self.images += len(losses)

    def read(self) -> tuple[float, tuple[float, ...], tuple[int, ...]]:
        """Mean loss, mean loss of each quarter, images behind each of these."""
        means = tuple((self._sums / self._counts).tolist())
        return float(self._sums.sum() / self.images), means, tuple(int(count) for count in self._counts.tolist())


def phases(
    training: TrainingConfig, steps_per_pass: int, exclusive: Collection[str], shared: Collection[str]
) -> list[tuple[int, tuple[str, ...]]]:
    """A round in (steps, parts trained), in order; a part that the partition leaves empty is never trained.

    Args:
        training: the run's settings.
        steps_per_pass: minibatches in one pass over the client's images.
        exclusive, shared: names of the tensors of θ_i and of φ.
    """
    steps = training.local_steps or (training.local_epochs or 0) * steps_per_pass
    present = tuple(name for name, part in (("exclusive", exclusive), ("shared", shared)) if part)
    if training.update == "joint":
        return [(steps, present)]
    counts = {
        "exclusive": training.exclusive_steps or steps,
        "shared": 0 if training.update == "exclusive" else steps,
    }
    return [(counts[name], (name,)) for name in present]


@torch.no_grad()
def _pull_towards(parameters: Mapping[str, nn.Parameter], anchor: Mapping[str, Tensor], strength: float) -> None:
    """Add the gradient of FedProx's term, strength / 2 · ‖φ - anchor‖² (Li et al. 2020, eq. 2)."""
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        parameter.grad.add_(parameter - anchor[name], alpha=strength)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

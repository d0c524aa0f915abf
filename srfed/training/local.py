"""One client's local training: θ_i and φ on the client's own images, for one round."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from srfed.config import RunConfig, TrainingConfig
from srfed.device import arithmetic, memory_layout
from srfed.diffusion.objective import Objective
from srfed.flat import copies
from srfed.model import task_of_table
from srfed.networks.network import Network
from srfed.networks.partition import Control, Exclusive, Partition, Shared
from srfed.training.minibatches import (
    Minibatch,
    MinibatchOrder,
    TrainingImages,
    draw_minibatch,
    seeded_dropout,
)
from srfed.training.optimizer import rates_of_round
from srfed.training.part import ClientState, Part
from srfed.training.step import LocalStep, LossMeter
from srfed.work import STEP_TO_PASS, count_passes


@dataclass(frozen=True)
class LocalResult:
    """What one round of local training gives.

    Attributes:
        shared: φ_i, the client's φ after its local steps.
        state: what the client keeps, but for its memory: the update has not been encoded yet.
        loss: mean over the images seen of the loss, eq. (7).
        loss_by_quarter: the same for timesteps in each quarter of 1..T; NaN where none was drawn.
        images_by_quarter: images behind each of these, with repetition.
        shared_steps: optimizer steps taken on φ.
        images: images seen, with repetition.
        seconds: wall time of the steps.
        gradient: under ``training.control_variates`` the mean of φ's gradients over the steps, as
            they were clipped and before c - c_i was added; otherwise empty.
    """

    shared: Shared
    state: ClientState
    loss: float
    loss_by_quarter: tuple[float, ...]
    images_by_quarter: tuple[int, ...]
    shared_steps: int
    images: int
    seconds: float
    gradient: Control = field(default_factory=lambda: Control({}))


class LocalTrainer:
    """Trains one task's model round by round; holds nothing that a round's result depends on.

    Args:
        config: the run's configuration.
        model: any network of the run's shape, on the device to train on; its weights are
            overwritten.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.
        task: the task's name, part of every seed.
        images: the task's training images, uint8 N x H x W x C.
        index: the task's position, which a model with a table of tasks is told.
        step: of the same model; trainers that share the model may share what was captured of it.

    Raises:
        UserError: the batch size does not fit the images, or the model's table has no such task.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Network,
        partition: Partition,
        objective: Objective,
        task: str,
        images: np.ndarray,
        index: int = 0,
        step: LocalStep | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._index = task_of_table(model, index)
        self._objective = objective
        self._task = task
        self._device = next(model.parameters()).device
        self._step = step or LocalStep(config, model, partition, objective)
        layout = memory_layout(config.resources)
        self._images = TrainingImages([images], self._device, layout)
        training = config.training
        self._order = MinibatchOrder.of(
            training, len(images), training.batch_size, config.seed, task
        )

    def train(
        self,
        round_number: int,
        shared: Shared,
        state: ClientState,
        correction: Control | None = None,
        *,
        lend: bool = False,
    ) -> LocalResult:
        """Train for one round from (φ, θ_i).

        Args:
            round_number: part of the seeds of noise and timesteps; the place in the rates'
                schedule.
            shared: φ as the server sent it.
            state: the client's state after its last accepted round.
            correction: c - c_i, which ``training.control_variates`` adds to φ's gradients; None
                stands for zeros.
            lend: the result's state is not copied, and changes when the model is next trained: for
                whoever writes it away at once.
        """
        with arithmetic(self._config.resources, self._device):
            return self._train(round_number, shared, state, correction, lend)

    def _train(
        self,
        round_number: int,
        shared: Shared,
        state: ClientState,
        correction: Control | None,
        lend: bool,
    ) -> LocalResult:
        training, trained = self._config.training, self._step
        self._model.train()
        steps = [
            parts
            for count, parts in phases(
                training,
                self._order.steps_per_pass,
                trained.exclusive.weights,
                trained.shared.weights,
            )
            for _ in range(count)
        ]
        orders = [self._order.indices(state.minibatches + step) for step in range(len(steps))]
        if trained.captures:
            for parts, indices in {
                (parts, len(order)): (parts, order)
                for parts, order in zip(steps, orders, strict=True)
            }.values():
                trained.prepare(
                    parts, self._draw(indices, round_number, 0), self._tasks(len(indices))
                )
        keeps = training.shared_moments == "keep"
        moments = state.shared_moments if keeps else {}
        # φ's moving average is the server's.
        trained.begin(
            Part(shared, Shared({}), moments),
            state.exclusive,
            rates_of_round(self._config, round_number),
            correction,
        )
        meter = LossMeter(self._objective.process)
        start = time.perf_counter()
        for step, (parts, indices) in enumerate(zip(steps, orders, strict=True)):
            batch = self._draw(indices, round_number, step)
            with seeded_dropout(self._config, self._device, self._task, round_number, step):
                losses = trained.run(parts, batch, self._tasks(len(indices)))
            meter.add(losses, batch.times)
            count_passes(STEP_TO_PASS * len(indices))
        loss, loss_by_quarter, images_by_quarter = meter.read()
        seconds = time.perf_counter() - start

        own, average = (
            {name: tensor.detach() for name, tensor in tensors.items()}
            if lend
            else copies(tensors, by_name=True)
            for tensors in (trained.exclusive.weights, trained.exclusive.average)
        )
        return LocalResult(
            shared=Shared(copies(trained.shared.weights)),
            state=ClientState(
                exclusive=Part(
                    Exclusive(own),
                    Exclusive(average),
                    trained.exclusive.export_moments(lend=lend),
                    trained.exclusive.steps,
                ),
                shared_moments=trained.shared.export_moments(lend=lend) if keeps else {},
                minibatches=state.minibatches + len(steps),
            ),
            loss=loss,
            loss_by_quarter=loss_by_quarter,
            images_by_quarter=images_by_quarter,
            shared_steps=sum("shared" in parts for parts in steps),
            images=meter.images,
            seconds=seconds,
            gradient=Control(copies(trained.terms.mean_gradient(len(steps)))),
        )

    def _draw(self, indices: Tensor, round_number: int, step: int) -> Minibatch:
        images = self._images[indices]
        return draw_minibatch(self._config, self._objective, images, self._task, round_number, step)

    def _tasks(self, count: int) -> Tensor | None:
        return (
            None if self._index is None else torch.full((count,), self._index, device=self._device)
        )


def phases(
    training: TrainingConfig,
    steps_per_pass: int,
    exclusive: Collection[str],
    shared: Collection[str],
) -> list[tuple[int, tuple[str, ...]]]:
    """A round in (steps, parts trained), in order; a part that the partition leaves empty is never
    trained.

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

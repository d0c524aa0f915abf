"""Centralised training: one party has all tasks' images. The baselines that a federation is
compared with.

Three ways to fill a minibatch: ``pooled`` from all images alike (DDPM, and C-DDPM with a shared
task embedding), ``one_task`` from one task drawn uniformly (Algorithm 1), ``balanced`` from every
task alike. A round has as many images as a federated one, so that equal rounds are equal budgets.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from srfed.config import RunConfig, TrainingConfig
from srfed.data import Task
from srfed.data.images import Images
from srfed.device import Captured, arithmetic, memory_layout, to_device
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import Forward
from srfed.errors import UserError
from srfed.flat import copies
from srfed.memory import is_short_of_memory
from srfed.networks.network import Network
from srfed.networks.partition import Exclusive, Partition, Shared
from srfed.randomness import derive_generator
from srfed.room import in_words, largest_that_fits
from srfed.training.minibatches import (
    Minibatch,
    MinibatchOrder,
    TrainingImages,
    draw_minibatch,
    seeded_dropout,
)
from srfed.training.optimizer import rates_of_round
from srfed.training.part import ClientState, LivePart, Part
from srfed.training.step import LossMeter, Share, training_step
from srfed.work import STEP_TO_PASS, count_passes

POOL = "all tasks"
"""Stands for a task's name in the seeds of pooled training."""


@dataclass(frozen=True)
class CentralisedState:
    """All that the next round depends on (CPU tensors by name).

    Attributes:
        shared: φ, every step of which is the optimizer's.
        tasks: what belongs to each task, by name: θ_i, and how many minibatches it had.
    """

    shared: Part[Shared]
    tasks: dict[str, ClientState]


@dataclass(frozen=True)
class CentralisedResult:
    """What one round gives: the new state, mean losses (eq. 7), images seen, seconds."""

    state: CentralisedState
    loss: float
    loss_by_task: dict[str, float]
    loss_by_quarter: tuple[float, ...]
    images: int
    seconds: float


class CentralisedTrainer:
    """Trains φ and every θ_i round by round; holds nothing that a round's result depends on.

    φ descends the mean of the tasks' losses, eq. (8), and each θ_i its own task's loss, as in the
    federation; the norm of the gradient of φ, and of each θ_i, is clipped by itself. A task's share
    goes through the network by itself, which changes nothing: no layer mixes images.

    Args:
        config: the run's configuration; ``training.method`` is not federated.
        model: a network of the run's shape, on the device to train on.
        partition: the run's partition of it.
        objective: what the model learns to predict, on the same device.
        tasks: all tasks, in order.

    Attributes:
        captures: whether steps are captured as a CUDA graph, and so have to be prepared. Under
            ``one_task`` each task would have a graph of its own, and its memory.

    Raises:
        UserError: a batch size does not fit a task's images.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Network,
        partition: Partition,
        objective: Objective,
        tasks: Sequence[Task],
    ) -> None:
        self._config, self._model, self._partition, self._objective = (
            config,
            model,
            partition,
            objective,
        )
        self._device = next(model.parameters()).device
        self._names = [task.name for task in tasks]
        self._layout = memory_layout(config.resources)
        self._shared = LivePart(config.training, _parameters(model, partition.shared, self._layout))
        self._exclusive = {
            name: LivePart(
                config.training,
                _parameters(model, partition.exclusive, self._layout),
                partition.owned,
            )
            for name in [*self._names, POOL]
        }
        self._orders = centralised_orders(config, {task.name: len(task.train) for task in tasks})
        training = config.training
        # Under dropout each share of a step draws in a context of its own.
        several_draw = training.method == "balanced" and config.model.draws
        self.captures = (
            self._device.type == "cuda"
            and training.optimizer == "adam"
            and training.method != "one_task"
            and not several_draw
        )
        self._captured = Captured(self._step, self._device)
        _, size = _batch_size(training)
        self._steps = len(tasks) * (training.local_steps or 0) * training.batch_size // size
        if training.method == "pooled":
            self._images = {POOL: self._images_of([task.train for task in tasks])}
            of_image = [torch.full((len(t.train),), index) for index, t in enumerate(tasks)]
            self._tasks = {POOL: torch.cat(of_image).to(self._device)}
        else:
            self._images = {task.name: self._images_of([task.train]) for task in tasks}
            self._tasks = {
                name: torch.full((len(group),), index, device=self._device)
                for index, (name, group) in enumerate(self._images.items())
            }

    def train(self, round_number: int, state: CentralisedState) -> CentralisedResult:
        """Train for one round.

        Args:
            round_number: part of the seeds; the place in the rates' schedule.
            state: after the last round.

        Raises:
            UserError: there is not enough memory.
        """
        try:
            return self._train(round_number, state, self._steps)
        except (MemoryError, RuntimeError) as error:
            if not is_short_of_memory(error):
                raise
        # Not in the handler: what was raised holds the tensors that it was raised over.
        raise UserError(self._too_large(round_number, state))

    def _too_large(self, round_number: int, state: CentralisedState) -> str:
        """What is said where steps of this size do not fit into memory, and what would."""
        training = self._config.training
        key, size = _batch_size(training)
        together = len(self._names) if training.method == "balanced" else 1
        whose = f"{', '.join(self._names)}, " if training.method == "balanced" else ""
        # With what it has taken of the device's memory.
        self._captured = Captured(self._step, self._device)
        fits = largest_that_fits(
            size // together, lambda images: self._train(round_number, state, 1, images)
        )
        allowed = "" if fits is None else f"training.{key} up to {fits * together}, "
        each = " of each" if together > 1 else ""
        return (
            f"{whose}{training.method}: there is not enough memory ({self._device}) for a step of "
            f"{size // together} images{each} (training.{key} = {size}); "
            f"{in_words(fits, 'images')}; allowed: {allowed}smaller images, or a smaller network"
        )

    def _train(
        self, round_number: int, state: CentralisedState, steps: int, images: int | None = None
    ) -> CentralisedResult:
        """So many steps; each of a share of so many images at most, if that is said."""
        with arithmetic(self._config.resources, self._device):
            return self._in_run_arithmetic(round_number, state, steps, images)

    def _in_run_arithmetic(
        self, round_number: int, state: CentralisedState, steps: int, images: int | None
    ) -> CentralisedResult:
        self._model.train()
        if self.captures:
            self._prepare(round_number, state, steps, images)
        rates = rates_of_round(self._config, round_number)
        self._shared.begin(state.shared, rates.shared)
        for name, own in state.tasks.items():
            self._exclusive[name].begin(own.exclusive, rates.exclusive, rates.owned)
        seen = _seen(state)
        all_losses = LossMeter(self._objective.process)
        task_losses = {name: LossMeter(self._objective.process) for name in self._images}
        start = time.perf_counter()
        for step in range(steps):
            names = self._names_of(round_number, step)
            drawn = [self._draw(name, round_number, step, seen[name], images) for name in names]
            found = self._losses(names, drawn, round_number, step)
            self._shared.count_step(captured=self.captures)
            for name, (batch, _), losses in zip(names, drawn, found, strict=True):
                self._exclusive[name].count_step(captured=self.captures)
                all_losses.add(losses, batch.times)
                task_losses[name].add(losses, batch.times)
                seen[name] += 1
                count_passes(STEP_TO_PASS * len(losses))
        loss, loss_by_quarter, _ = all_losses.read()
        seconds = time.perf_counter() - start
        return CentralisedResult(
            state=CentralisedState(
                shared=Part(
                    Shared(copies(self._shared.weights)),
                    Shared(copies(self._shared.average)),
                    self._shared.export_moments(),
                    self._shared.steps,
                ),
                tasks={
                    name: ClientState(
                        Part(
                            Exclusive(copies(part.weights)),
                            Exclusive(copies(part.average)),
                            part.export_moments(),
                            seen[name],
                        ),
                        minibatches=seen[name],
                    )
                    for name, part in self._exclusive.items()
                    if name in state.tasks
                },
            ),
            loss=loss,
            loss_by_task={
                name: meter.read()[0] for name, meter in task_losses.items() if meter.images
            },
            loss_by_quarter=loss_by_quarter,
            images=all_losses.images,
            seconds=seconds,
        )

    def _images_of(self, sets: Sequence[Images]) -> TrainingImages:
        return TrainingImages(sets, self._device, self._layout)

    def _names_of(self, round_number: int, step: int) -> list[str]:
        """Whose minibatches a step sees."""
        names = list(self._images)
        if self._config.training.method == "one_task":
            generator = derive_generator(self._config.seed, "task", round_number, step)
            names = [names[int(torch.randint(len(names), (), generator=generator))]]
        return names

    def _draw(
        self, name: str, round_number: int, step: int, seen: int, images: int | None
    ) -> tuple[Minibatch, Tensor]:
        """What a share of a step sees, and whose images these are."""
        indices = self._orders[name].indices(seen)[:images]
        batch = draw_minibatch(
            self._config, self._objective, self._images[name][indices], name, round_number, step
        )
        return batch, self._tasks[name][to_device(indices, self._device)]

    def _losses(
        self,
        names: Sequence[str],
        drawn: Sequence[tuple[Minibatch, Tensor]],
        round_number: int,
        step: int,
    ) -> Sequence[Tensor]:
        """Take a step; the losses of each share."""
        drawings = [
            seeded_dropout(self._config, self._device, n, round_number, step) for n in names
        ]
        if not self.captures:
            shares = [
                self._share(name, batch, tasks, drawing)
                for name, (batch, tasks), drawing in zip(names, drawn, drawings, strict=True)
            ]
            return training_step(self._config, self._objective, self._shared, shares)
        # Of a pool, or of shares that draw nothing.
        with drawings[0]:
            losses = self._captured(*_flat(drawn)).clone()
        found: tuple[Tensor, ...] = losses.split([len(batch.images) for batch, _ in drawn])
        return found

    def _prepare(
        self, round_number: int, state: CentralisedState, steps: int, images: int | None
    ) -> None:
        """Capture a step for each shape of a round's minibatches; spoils weights and moments."""
        seen, found = _seen(state), set()
        one_size = self._config.training.minibatches != "ragged"
        for step in range(min(steps, 1) if one_size else steps):
            names = self._names_of(round_number, step)
            sizes = tuple(len(self._orders[name].indices(seen[name])[:images]) for name in names)
            if sizes not in found:
                found.add(sizes)
                drawn = [self._draw(name, round_number, step, seen[name], images) for name in names]
                self._captured.prepare(*_flat(drawn))
            for name in names:
                seen[name] += 1

    def _step(self, *tensors: Tensor) -> Tensor:
        """A step of all shares: of the images, times, noise and tasks of one after the other."""
        shares = [
            self._share(name, Minibatch(*tensors[place : place + 3]), tensors[place + 3])
            for name, place in zip(self._images, range(0, len(tensors), 4), strict=True)
        ]
        return torch.cat(training_step(self._config, self._objective, self._shared, shares))

    def _share(
        self,
        name: str,
        batch: Minibatch,
        tasks: Tensor,
        drawing: AbstractContextManager[None] | None = None,
    ) -> Share:
        exclusive = self._exclusive[name]
        forward = self._forward({**self._shared.weights, **exclusive.weights}, tasks)
        return Share(forward, exclusive, batch, drawing or nullcontext())

    def _forward(self, weights: Mapping[str, Tensor], tasks: Tensor) -> Forward:
        further = (tasks,) if self._model.tasks else ()
        return lambda x, times: functional_call(self._model, dict(weights), (x, times, *further))


def _seen(state: CentralisedState) -> dict[str, int]:
    """Minibatches of each order so far; a pool's are the optimizer's steps."""
    return {name: own.minibatches for name, own in state.tasks.items()} | {POOL: state.shared.steps}


def _flat(drawn: Sequence[tuple[Minibatch, Tensor]]) -> list[Tensor]:
    return [tensor for batch, tasks in drawn for tensor in (*batch, tasks)]


def centralised_orders(config: RunConfig, images: Mapping[str, int]) -> dict[str, MinibatchOrder]:
    """The order of minibatches of each task, or of the pool, from the tasks' numbers of training
    images.

    Raises:
        UserError: a batch size does not fit a task's images.
    """
    training = config.training
    key, size = _batch_size(training)
    tasks_in_batch = len(images) if training.method == "balanced" else 1
    groups = {POOL: sum(images.values())} if training.method == "pooled" else images
    for name, count in groups.items():
        if training.minibatches == "whole" and size // tasks_in_batch > count:
            raise UserError(
                f"training.{key} = {size} asks for {size // tasks_in_batch} images of {name!r} at "
                f"once, which has {count} training images; allowed: up to "
                f"{count * tasks_in_batch}, or training.minibatches = ragged or continued"
            )
    return {
        name: MinibatchOrder.of(training, count, size // tasks_in_batch, config.seed, name)
        for name, count in groups.items()
    }


def _batch_size(training: TrainingConfig) -> tuple[str, int]:
    """How many images a step has, and the setting that says so."""
    if training.centralised_batch_size is None:
        return "batch_size", training.batch_size
    return "centralised_batch_size", training.centralised_batch_size


def _parameters(
    model: Network, names: Sequence[str], layout: torch.memory_format
) -> dict[str, nn.Parameter]:
    """Parameters of their own, of the shapes of the model's and where it is."""
    own = model.state_dict()
    return {
        name: nn.Parameter(
            own[name].clone(memory_format=layout) if own[name].ndim == 4 else own[name].clone()
        )
        for name in names
    }

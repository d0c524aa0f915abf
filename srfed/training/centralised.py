"""Centralised training: one party has all tasks' images. The baselines that a federation is
compared with.

Three ways to fill a minibatch: ``pooled`` from all images alike (DDPM, and C-DDPM with a shared
task embedding), ``one_task`` from one task drawn uniformly (Algorithm 1), ``balanced`` from every
task alike. A round has as many images as a federated one, so that equal rounds are equal budgets.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from srfed.config import RunConfig
from srfed.data import Task, to_model_range
from srfed.device import arithmetic, autocast, memory_layout, to_device
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import Forward
from srfed.errors import UserError
from srfed.networks.network import Network
from srfed.networks.partition import Exclusive, Partition, Shared
from srfed.randomness import derive_generator
from srfed.training.ema import step_decay, update_average
from srfed.training.local import ClientState, copies
from srfed.training.minibatches import MinibatchOrder, draw_minibatch, seeded_dropout
from srfed.training.optimizer import PartOptimizer, learning_rate_factor
from srfed.training.step import LossMeter

POOL = "all tasks"
"""Stands for a task's name in the seeds of pooled training."""


@dataclass(frozen=True)
class CentralisedState:
    """All that the next round depends on (CPU tensors by name).

    Attributes:
        shared: φ.
        shared_average: its moving average.
        shared_moments: Adam's moments of φ.
        steps: optimizer steps so far, all of them on φ.
        tasks: what belongs to each task, by name: θ_i, its average, its moments, and how many
            minibatches it had.
    """

    shared: Shared
    shared_average: Shared
    tasks: dict[str, ClientState]
    shared_moments: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class CentralisedResult:
    """What one round gives: the new state, mean losses (eq. 7), images seen, seconds."""

    state: CentralisedState
    loss: float
    loss_by_task: dict[str, float]
    loss_by_quarter: tuple[float, ...]
    images: int
    seconds: float


@dataclass(frozen=True)
class _Share:
    """What one task, or the pool, brings to one minibatch."""

    name: str
    images: Tensor
    tasks: Tensor


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
        images = [
            to_model_range(t.train).to(self._device).contiguous(memory_format=self._layout)
            for t in tasks
        ]
        self._orders = centralised_orders(config, {task.name: len(task.train) for task in tasks})
        training = config.training
        size = training.centralised_batch_size or training.batch_size
        self._steps = len(tasks) * (training.local_steps or 0) * training.batch_size // size
        if training.method == "pooled":
            self._images = {POOL: torch.cat(images)}
            of_image = [torch.full((len(group),), index) for index, group in enumerate(images)]
            self._tasks = {POOL: torch.cat(of_image).to(self._device)}
        else:
            self._images = dict(zip(self._names, images, strict=True))
            self._tasks = {
                name: torch.full((len(group),), index, device=self._device)
                for index, (name, group) in enumerate(self._images.items())
            }

    def train(self, round_number: int, state: CentralisedState) -> CentralisedResult:
        """Train for one round.

        Args:
            round_number: part of the seeds; the place in the rates' schedule.
            state: after the last round.
        """
        with arithmetic(self._config.resources, self._device):
            return self._train(round_number, state)

    def _train(self, round_number: int, state: CentralisedState) -> CentralisedResult:
        training, device = self._config.training, self._device
        self._model.train()
        factor = learning_rate_factor(self._config, round_number)
        shared_rate = factor * training.learning_rate
        exclusive_rate = factor * (training.exclusive_learning_rate or training.learning_rate)
        shared = _parameters(state.shared, self._partition.shared, device, self._layout)
        exclusive = {
            name: _parameters(own.exclusive, self._partition.exclusive, device, self._layout)
            for name, own in state.tasks.items()
        }
        on_shared = PartOptimizer(training, shared, shared_rate, state.shared_moments)
        on_exclusive = {
            name: PartOptimizer(training, exclusive[name], exclusive_rate, own.exclusive_moments)
            for name, own in state.tasks.items()
        }
        shared_average = {name: t.to(device, copy=True) for name, t in state.shared_average.items()}
        averages = {
            name: {key: t.to(device, copy=True) for key, t in own.exclusive_average.items()}
            for name, own in state.tasks.items()
        }
        # Minibatches of each order so far; a pool's are the optimizer's steps.
        seen = {name: own.steps for name, own in state.tasks.items()} | {POOL: state.steps}
        all_losses = LossMeter(self._objective.process)
        task_losses = {name: LossMeter(self._objective.process) for name in self._images}
        start = time.perf_counter()
        for step in range(self._steps):
            shares = self._shares(round_number, step, seen)
            on_shared.clear_gradients()
            for share in shares:
                own = exclusive.get(share.name, {})
                batch = draw_minibatch(
                    self._config, self._objective, share.images, share.name, round_number, step
                )
                dropout = seeded_dropout(self._config, device, share.name, round_number, step)
                with autocast(self._config.resources, device), dropout:
                    losses = self._objective.loss(
                        self._forward({**shared, **own}, share.tasks), *batch
                    )
                if own:
                    on_exclusive[share.name].clear_gradients()
                losses.mean().backward()
                all_losses.add(losses.detach(), batch.times)
                task_losses[share.name].add(losses.detach(), batch.times)
                if own:
                    _clip(own, training.gradient_clip)
                    on_exclusive[share.name].step()
                    decay = step_decay(training.ema_decay, training.ema_warmup, seen[share.name])
                    update_average(averages[share.name], own, decay)
                seen[share.name] += 1
            if shared:
                _divide_gradients(shared, len(shares))
                _clip(shared, training.gradient_clip)
                on_shared.step()
                decay = step_decay(training.ema_decay, training.ema_warmup, state.steps + step)
                update_average(shared_average, shared, decay)
        loss, loss_by_quarter, _ = all_losses.read()
        seconds = time.perf_counter() - start
        return CentralisedResult(
            state=CentralisedState(
                shared=Shared(copies(shared)),
                shared_average=Shared(copies(shared_average)),
                tasks={
                    name: ClientState(
                        exclusive=Exclusive(copies(exclusive[name])),
                        exclusive_average=Exclusive(copies(averages[name])),
                        exclusive_moments=on_exclusive[name].export_moments(),
                        steps=seen[name],
                        exclusive_steps=seen[name],
                    )
                    for name in state.tasks
                },
                shared_moments=on_shared.export_moments(),
                steps=state.steps + self._steps,
            ),
            loss=loss,
            loss_by_task={
                name: meter.read()[0] for name, meter in task_losses.items() if meter.images
            },
            loss_by_quarter=loss_by_quarter,
            images=all_losses.images,
            seconds=seconds,
        )

    def _shares(self, round_number: int, step: int, seen: Mapping[str, int]) -> list[_Share]:
        names = list(self._images)
        if self._config.training.method == "one_task":
            generator = derive_generator(self._config.seed, "task", round_number, step)
            names = [names[int(torch.randint(len(names), (), generator=generator))]]
        shares = []
        for name in names:
            indices = to_device(self._orders[name].indices(seen[name]), self._device)
            shares.append(_Share(name, self._images[name][indices], self._tasks[name][indices]))
        return shares

    def _forward(self, weights: Mapping[str, Tensor], tasks: Tensor) -> Forward:
        further = () if not self._model.tasks else (tasks,)
        return lambda x, times: functional_call(self._model, dict(weights), (x, times, *further))


def centralised_orders(config: RunConfig, images: Mapping[str, int]) -> dict[str, MinibatchOrder]:
    """The order of minibatches of each task, or of the pool, from the tasks' numbers of training
    images.

    Raises:
        UserError: a batch size does not fit a task's images.
    """
    training = config.training
    key = "batch_size" if training.centralised_batch_size is None else "centralised_batch_size"
    size = training.centralised_batch_size or training.batch_size
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


def _parameters(
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    device: torch.device,
    layout: torch.memory_format,
) -> dict[str, nn.Parameter]:
    copies_there = {name: tensors[name].to(device, copy=True) for name in names}
    return {
        name: nn.Parameter(tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor)
        for name, tensor in copies_there.items()
    }


def _divide_gradients(parameters: Mapping[str, nn.Parameter], shares: int) -> None:
    if shares > 1:
        torch._foreach_div_([p.grad for p in parameters.values() if p.grad is not None], shares)


def _clip(parameters: Mapping[str, nn.Parameter], norm: float | None) -> None:
    if norm is not None:
        nn.utils.clip_grad_norm_(list(parameters.values()), norm, foreach=True)

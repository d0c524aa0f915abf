"""One client's local training: θ_i and φ on the client's own images, for one round."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from srfed.config import RunConfig, TrainingConfig
from srfed.device import arithmetic, memory_layout, to_device
from srfed.diffusion.objective import Objective
from srfed.errors import UserError
from srfed.flat import copies_of_groups
from srfed.memory import is_short_of_memory
from srfed.model import task_of_table
from srfed.networks.network import Network
from srfed.networks.partition import Control, Exclusive, Partition, Shared
from srfed.room import in_words, largest_that_fits
from srfed.training.minibatches import (
    Draws,
    Minibatch,
    MinibatchOrder,
    TrainingImages,
    draw_for,
    seeded_dropout,
    with_draws,
)
from srfed.training.optimizer import rates_of_round
from srfed.training.part import ClientState, Part
from srfed.training.step import Beginning, LocalStep, LossMeter, Owner
from srfed.units import tasks_in_words
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
        seconds: wall time of the steps; where owners are trained together, their equal share of it.
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


Plan = list[tuple[tuple[str, ...], Tensor]]
"""The steps of an owner's round: the parts that each trains, the images that it sees."""


class Job(NamedTuple):
    """An owner's round to be trained: whose, and what :meth:`LocalTrainer.train` is told of it."""

    trainer: "LocalTrainer"
    round_number: int
    shared: Shared
    state: ClientState
    correction: Control | None = None
    lend: bool = False

    @property
    def form(self) -> object:
        """Equal for owners whose rounds can be trained together."""
        steps = tuple((parts, len(indices)) for parts, indices in self.trainer.steps(self.state))
        return self.round_number, self.trainer.image_shape, steps


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
        run: carries out a round; None trains it by itself, on ``step``.

    Attributes:
        image_shape: H, W, C of the images.
        task: the task's name.
        device: where it trains.

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
        run: Callable[[Job], LocalResult] | None = None,
    ) -> None:
        self._config = config
        self._index = task_of_table(model, index)
        self._objective = objective
        self.task = task
        self.device = next(model.parameters()).device
        self._step = step or LocalStep(config, model, partition, objective)
        self._run = run or self.run_alone
        layout = memory_layout(config.resources)
        self.image_shape = tuple(images.shape[1:])
        self._images = TrainingImages([images], self.device, layout)
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
        return self._run(Job(self, round_number, shared, state, correction, lend))

    def run_alone(self, job: Job) -> LocalResult:
        """Carry out a round of this trainer, by itself."""
        (result,) = train_owners(self._config, self._step, [job])
        return result

    def steps(self, state: ClientState) -> Plan:
        """The steps of a round from this state: the parts that each trains, and the indices of the
        images that it sees.
        """
        owner = self._step.owners[0]
        counted = phases(
            self._config.training,
            self._order.steps_per_pass,
            owner.exclusive.weights,
            owner.shared.weights,
        )
        parts = [parts for count, parts in counted for _ in range(count)]
        return [
            (trained, self._order.indices(state.minibatches + step))
            for step, trained in enumerate(parts)
        ]

    def images(self, plan: Plan) -> Iterator[Tensor]:
        """What each step of a plan sees, N x C x H x W on the device."""
        for indices in self._images.places([indices for _, indices in plan]):
            yield self._images[indices]

    def draw(self, shape: Sequence[int], round_number: int, step: int) -> Draws:
        """What a step draws for images of this shape."""
        return draw_for(self._config, self._objective, shape, self.task, round_number, step)

    @property
    def place(self) -> int | None:
        """The task's place, for a model with a table of tasks; else None."""
        return self._index

    def dropout(self, round_number: int, step: int) -> AbstractContextManager[None]:
        """The context that a step's dropout draws in."""
        return seeded_dropout(self._config, self.device, self.task, round_number, step)


def train_owners(config: RunConfig, step: LocalStep, jobs: Sequence[Job]) -> list[LocalResult]:
    """Train one owner for a round, or several at once.

    Args:
        config: the run's configuration, of a network without dropout where there are several.
        step: of as many owners.
        jobs: one for each, all of one :attr:`Job.form`.

    Raises:
        UserError: there is not enough memory. A step of several owners is then given up: it cannot
            be used again.
    """
    plans = [job.trainer.steps(job.state) for job in jobs]
    try:
        return _train_owners(config, step, jobs, plans)
    except (MemoryError, RuntimeError) as error:
        if not is_short_of_memory(error):
            raise
    # Not in the handler: what was raised holds the tensors that it was raised over.
    raise UserError(_too_large(config, step, jobs, plans))


def _too_large(
    config: RunConfig, step: LocalStep, jobs: Sequence[Job], plans: Sequence[Plan]
) -> str:
    """What is said where steps of this size do not fit into memory, and what would."""
    where, step_of = step.device, step

    def trial(owners: int, images: int) -> None:
        step_of.release()
        _train_owners(
            config, step_of, jobs[:owners], [_in_short(plan, images) for plan in plans[:owners]]
        )

    def of_fewer(owners: int) -> None:
        nonlocal step_of
        step_of = step_of.of_fewer(owners)
        trial(owners, batch)

    batch = max(len(indices) for _, indices in plans[0])
    training, stack = config.training, config.resources.stack
    named = tasks_in_words([job.trainer.task for job in jobs])
    short = f"{named}: there is not enough memory ({where}) for a local step of"
    images_said = f"{batch} images (training.batch_size = {training.batch_size})"
    said, remedies = f"{short} {images_said}", "smaller images, or a smaller network"
    if len(jobs) > 1:
        said = f"{short} {len(jobs)} tasks at once (resources.stack = {stack}), each {images_said}"
        owners = largest_that_fits(len(jobs), of_fewer)
        if owners is not None:
            most = "1" if owners == 1 else f"up to {owners}"
            found = in_words(owners, "at once")
            return f"{said}; {found}; allowed: resources.stack {most}, {remedies}"
    fits = largest_that_fits(batch, lambda images: trial(1, images))
    smaller = "" if fits is None else f"training.batch_size up to {fits}, "
    return f"{said}; {in_words(fits, 'images')}; allowed: {smaller}{remedies}"


def _in_short(plan: Plan, images: int) -> Plan:
    """One step of each kind, of so many images at most."""
    # The first of a kind: the last one may be of what a pass has left over.
    kinds = {parts: (parts, indices[:images]) for parts, indices in reversed(plan)}
    return list(kinds.values())


def _train_owners(
    config: RunConfig, step: LocalStep, jobs: Sequence[Job], plans: Sequence[Plan]
) -> list[LocalResult]:
    with arithmetic(config.resources, step.device):
        return _in_run_arithmetic(config, step, jobs, plans)


def _in_run_arithmetic(
    config: RunConfig, step: LocalStep, jobs: Sequence[Job], plans: Sequence[Plan]
) -> list[LocalResult]:
    number, keeps = jobs[0].round_number, config.training.shared_moments == "keep"
    # Of all modules or of none, and there are many.
    if not step.model.training:
        step.model.train()
    beginnings = [
        Beginning(
            # φ's moving average is the server's.
            Part(job.shared, Shared({}), job.state.shared_moments if keeps else {}),
            job.state.exclusive,
            rates_of_round(config, number),
            job.correction,
        )
        for job in jobs
    ]
    step.begin(beginnings)
    if step.captures and _prepare(step, jobs, plans):
        step.begin(beginnings)
    meters = [LossMeter(step.objective.process) for _ in jobs]
    trained = [parts for parts, _ in plans[0]]
    start = time.perf_counter()
    for place, drawn in enumerate(_drawn(jobs, plans, step.device)):
        # In a stack nothing draws.
        alone = jobs[0].trainer.dropout(number, place) if len(jobs) == 1 else nullcontext()
        with alone:
            found = step.run(trained[place], drawn.batch, *drawn.tasks)
        for meter, losses, times in zip(meters, found, drawn.times, strict=True):
            meter.add(losses, times)
            count_passes(STEP_TO_PASS * len(losses))
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)
    seconds = (time.perf_counter() - start) / len(jobs)
    return [
        _result(owner, job, meter, trained, seconds, keeps=keeps)
        for owner, job, meter in zip(step.owners, jobs, meters, strict=True)
    ]


class _Drawn(NamedTuple):
    """What a step of several owners is given: their minibatch, the places of its images' tasks if
    the model has a table of them, and each owner's times, on the CPU.
    """

    batch: Minibatch
    tasks: list[Tensor]
    times: list[Tensor]


def _drawn(jobs: Sequence[Job], plans: Sequence[Plan], device: torch.device) -> Iterator[_Drawn]:
    """Step by step, what it is given."""
    trainers, number = [job.trainer for job in jobs], jobs[0].round_number
    of_owners = [trainer.images(plan) for trainer, plan in zip(trainers, plans, strict=True)]
    for step, images in enumerate(zip(*of_owners, strict=True)):
        draws = [
            trainer.draw(one.shape, number, step)
            for trainer, one in zip(trainers, images, strict=True)
        ]
        tasks = []
        if trainers[0].place is not None:
            rows = [t.place for t, one in zip(trainers, images, strict=True) for _ in one]
            tasks = [to_device(torch.tensor(rows), device)]
        yield _Drawn(with_draws(images, draws), tasks, [drawn.times for drawn in draws])


def _prepare(step: LocalStep, jobs: Sequence[Job], plans: Sequence[Plan]) -> bool:
    """Capture what has not been captured yet of these steps; whether there was anything."""
    height, width, channels = jobs[0].trainer.image_shape
    captured = False
    for place, (parts, indices) in enumerate(plans[0]):
        if step.is_prepared(parts, (len(indices), channels, height, width)):
            continue
        drawn = next(_drawn(jobs, [plan[place : place + 1] for plan in plans], step.device))
        step.prepare(parts, drawn.batch, *drawn.tasks)
        captured = True
    return captured


def _result(
    owner: Owner,
    job: Job,
    meter: LossMeter,
    trained: Sequence[tuple[str, ...]],
    seconds: float,
    *,
    keeps: bool,
) -> LocalResult:
    lend = job.lend and job.trainer.device.type == "cpu"
    # What is stored is in the order of its names.
    stored: dict[str, Mapping[str, Tensor]] = {
        "own": owner.exclusive.weights,
        "average": owner.exclusive.average,
        "own moments": owner.exclusive.moments,
        "moments": owner.shared.moments if keeps else {},
    }
    sent: dict[str, Mapping[str, Tensor]] = {
        "shared": owner.shared.weights,
        "gradient": owner.terms.mean_gradient(len(trained)),
    }
    if lend:
        kept = {group: _detached(tensors) for group, tensors in stored.items()}
        brought = copies_of_groups(sent)
    else:
        kept = brought = copies_of_groups(sent, stored)
    loss, loss_by_quarter, images_by_quarter = meter.read()
    return LocalResult(
        shared=Shared(brought["shared"]),
        state=ClientState(
            exclusive=Part(
                Exclusive(kept["own"]),
                Exclusive(kept["average"]),
                kept["own moments"],
                owner.exclusive.steps,
            ),
            shared_moments=kept["moments"],
            minibatches=job.state.minibatches + len(trained),
        ),
        loss=loss,
        loss_by_quarter=loss_by_quarter,
        images_by_quarter=images_by_quarter,
        shared_steps=sum("shared" in parts for parts in trained),
        images=meter.images,
        seconds=seconds,
        gradient=Control(brought["gradient"]),
    )


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


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

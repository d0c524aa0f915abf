"""What a run will take, before it begins: parameters, steps, minutes, memory, bytes.

Minutes and memory are estimates, from two steps of the run's own network on this machine.
"""

import multiprocessing
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from srfed.config import RunConfig, UNetConfig, parse_config
from srfed.cores import usable_cores
from srfed.data import Task
from srfed.device import device_of_clients, memory_layout
from srfed.errors import UserError
from srfed.evaluation.metrics.denoising_loss import MOMENTS
from srfed.federation.contract import Contract
from srfed.federation.layout import value_bytes
from srfed.flat import copies
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.reporting.pace import comparison_passes, evaluation_passes
from srfed.training.local import LocalTrainer, phases
from srfed.training.minibatches import MinibatchOrder
from srfed.training.part import initial_state
from srfed.units import bytes_in_words, seconds_in_words
from srfed.work import STEP_TO_PASS

TIMED_STEPS = 2
SLOWEST = 3600.0
"""Seconds above which a smaller network is proposed, where the network was left open."""
SMALLER = (16, 16, 32, 32)
"""Channels of the smaller network's stages."""
QUICK = 60.0
"""Seconds that a quick run is fitted to, as the estimate may err and the machine be busy."""
BESIDE_STEPS = 1.4
"""A round against its steps alone: weights are copied, checked, averaged and stored."""
START = {"ray": 15.0, "inline": 5.0}
"""Seconds that a backend takes to be there, about."""
BESIDE_PASSES = 3.0
"""Seconds of an evaluation beside its passes: features, distances, neighbours, pictures."""
PAGE = 3.0
"""Seconds until the table and the run's page are there."""


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        config: the run's configuration.
        owners: by task, training, validation and test images.
        shapes: of the tasks' images.
        shared, exclusive: parameters of φ and of one θ_i.
        steps: local steps of all owners in all rounds, without those of models alone.
        seconds_per_round, seconds_besides: expected; the latter of the start, the evaluations and
            the page at the end.
        memory: bytes at peak, expected, in this machine's memory.
        device_memory: the same on a GPU; 0 without one.
        bytes_down, bytes_up: in a round, to and from one owner.
        where: the device, and how many owners train on it at once.
        reduced: in words, why the network is smaller than it would be; empty where it is not.
    """

    config: RunConfig
    owners: dict[str, tuple[int, int, int]]
    shapes: list[tuple[int, int, int]]
    shared: int
    exclusive: int
    steps: int
    seconds_per_round: float
    seconds_besides: float
    memory: float
    device_memory: float
    bytes_down: int
    bytes_up: int
    where: str
    reduced: str = ""

    @property
    def seconds(self) -> float:
        """Expected, of the whole run."""
        return self.config.federation.rounds * self.seconds_per_round + self.seconds_besides

    def lines(self) -> list[str]:
        """The plan in words."""
        federation = self.config.federation
        train, validation, test = (
            [counts[side] for counts in self.owners.values()] for side in range(3)
        )
        aside = f", {sum(validation):,} to choose the round by" if any(validation) else ""
        shapes = " and ".join(sorted({" x ".join(map(str, shape)) for shape in self.shapes}))
        clients = federation.clients_per_round or federation.clients
        a_round = self.bytes_down + self.bytes_up
        traffic = bytes_in_words(a_round * clients * federation.rounds)
        gpu = f", and {bytes_in_words(self.device_memory)} of the GPU" if self.device_memory else ""
        alone = "" if federation.compare == "none" else ", and as many of everybody alone"
        return [
            f"owners:     {len(self.owners)}, with {min(train)} to {max(train)} images to train "
            f"on, {sum(train):,} in all{aside}; {sum(test):,} held out",
            f"images:     {shapes}",
            f"network:    φ {self.shared:,} parameters, shared; θ_i {self.exclusive:,}, each "
            "owner's own" + (f"; {self.reduced}" if self.reduced else ""),
            f"steps:      {self.steps:,}, in {federation.rounds} rounds{alone}",
            f"time:       about {seconds_in_words(self.seconds)}, an estimate from "
            f"{TIMED_STEPS} steps timed here ({self.where})",
            f"memory:     about {bytes_in_words(self.memory)} at peak{gpu}",
            f"traffic:    {bytes_in_words(self.bytes_down)} to an owner and "
            f"{bytes_in_words(self.bytes_up)} back in a round, about {traffic} in all",
        ]


def plan_run(
    config: RunConfig, tasks: Sequence[Task], *, free: bool = False, quick: bool = False
) -> Plan:
    """Time the run's network, and say what the run will take.

    Args:
        config: of a federation.
        tasks: its tasks.
        free: the network was left open: a smaller one is taken where this one is slow here.
        quick: take as many rounds, up to the configuration's, as are quick here.

    Returns:
        The plan; its configuration has what was chosen.

    Raises:
        UserError: the network cannot be made, or its device is not there.
    """
    plan = _measured(config, tasks)
    if free and plan.seconds > SLOWEST and isinstance(config.model, UNetConfig):
        reduced = (
            f"smaller than the recipe's, which would take {seconds_in_words(plan.seconds)} here; "
            "--set model.channels=[...] takes another"
        )
        smaller = _with(config, "model", channels=SMALLER)
        plan = replace(_measured(smaller, tasks), reduced=reduced)
    if quick:
        rounds = int((QUICK - plan.seconds_besides) / plan.seconds_per_round)
        plan = _of_rounds(plan, min(max(rounds, 1), plan.config.federation.rounds))
    return plan


def _of_rounds(plan: Plan, rounds: int) -> Plan:
    steps = plan.steps // plan.config.federation.rounds * rounds
    return replace(plan, config=_with(plan.config, "federation", rounds=rounds), steps=steps)


def _with(config: RunConfig, section: str, **settings: object) -> RunConfig:
    content = config.model_dump(mode="json")
    content[section] |= settings
    return parse_config(content)


def _measured(config: RunConfig, tasks: Sequence[Task]) -> Plan:
    federation, training, resources = config.federation, config.training, config.resources
    device = device_of_clients(resources)
    largest = max(tasks, key=lambda task: int(np.prod(task.shape)))
    model = build_model(config, largest.shape[-1])
    partition = build_partition(config, model)
    weights = model.state_dict()
    contract = Contract.of(config, partition.take_shared(weights))
    shared, exclusive = (
        sum(weights[name].numel() for name in names)
        for names in (partition.shared, partition.exclusive)
    )
    timed = _timed(config, largest, aside=resources.backend == "ray" and device.type == "cuda")
    steps = [
        sum(
            count
            for count, _ in phases(
                training,
                MinibatchOrder.of(
                    training, len(task.train), training.batch_size, config.seed, task.name
                ).steps_per_pass,
                partition.exclusive,
                partition.shared,
            )
        )
        for task in tasks
    ]
    clients = federation.clients_per_round or federation.clients
    a_round = sum(steps) * clients // federation.clients
    at_once = 1
    if resources.backend == "ray" and device.type == "cpu":
        cores = resources.cpus or usable_cores()
        at_once = max(1, min(clients, cores // resources.client_cpus))
    per_pass = timed.seconds / STEP_TO_PASS / at_once
    between = (federation.rounds - 1) // config.evaluation.every if config.evaluation.every else 0
    passes = (
        between * evaluation_passes(config, federation.clients, final=False)
        + evaluation_passes(config, federation.clients, final=True)
        + (between + 1) * comparison_passes(config, [len(task.test) for task in tasks])
    )
    seconds = a_round * training.batch_size * timed.seconds / at_once
    models = 1 if federation.compare == "none" else 2
    validated = sum(map(config.validation_due, range(1, federation.rounds + 1)))
    # The models alone look at their owners' images after every round.
    looks = validated / federation.rounds + (models - 1)
    aside = MOMENTS * sum(len(task.validation) for task in tasks)
    processes = 1 + (at_once if resources.backend == "ray" else 0)
    return Plan(
        config=config,
        owners={t.name: (len(t.train), len(t.validation), len(t.test)) for t in tasks},
        shapes=[task.shape for task in tasks],
        shared=shared,
        exclusive=exclusive,
        steps=a_round * federation.rounds,
        seconds_per_round=BESIDE_STEPS * models * seconds + looks * aside * per_pass,
        seconds_besides=START[resources.backend]
        + passes * per_pass
        + (between + 1) * BESIDE_PASSES
        + PAGE,
        memory=processes * timed.memory,
        device_memory=timed.device_memory * at_once,
        bytes_down=sum(map(value_bytes, contract.training_request.values())),
        bytes_up=sum(map(value_bytes, {**contract.update, **contract.control}.values())),
        where=f"{device.type}, {at_once} owner{'s' * (at_once > 1)} at once",
    )


class Timed(NamedTuple):
    """What steps of a run have taken.

    Attributes:
        seconds: of a training step for each of its images.
        memory: bytes that the process has had at most.
        device_memory: bytes on the GPU at peak; 0 without one.
    """

    seconds: float
    memory: float
    device_memory: float


def _timed(config: RunConfig, task: Task, *, aside: bool) -> Timed:
    """Time the run's steps with a task; ``aside`` in a process of its own, as the driver of a Ray
    run is to hold no part of a GPU's memory.
    """
    if not aside:
        return _steps_timed(config, task)
    spawned = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawned) as process:
            return process.submit(_steps_timed, config, task).result()
    except BrokenProcessPool as error:
        raise UserError(
            "the process that timed a few steps on the GPU has ended before they were done; "
            "allowed: --set resources.device=cpu, or srfed simulate, which times none"
        ) from error


def _steps_timed(config: RunConfig, task: Task) -> Timed:
    timed = _with(config, "training", local_steps=TIMED_STEPS, local_epochs=None)
    device = device_of_clients(config.resources)
    layout = memory_layout(config.resources)
    model = build_model(timed, task.shape[-1])
    partition = build_partition(timed, model)
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    state = initial_state(model, partition)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    trainer = LocalTrainer(
        timed,
        model,
        partition,
        build_objective(timed, device),
        task.name,
        task.train,
        task.index,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resources.client_cpus)
    try:
        # The first steps are slower: libraries choose their algorithms, and take their memory.
        trainer.train(1, shared, state)
        result = trainer.train(1, shared, state)
    finally:
        torch.set_num_threads(threads)
    memory = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
    return Timed(result.seconds / result.images, _peak(), memory)


def _peak() -> float:
    """Bytes that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

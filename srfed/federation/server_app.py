"""The ServerApp: meet the clients, restore or begin the run, hand over to the strategy."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from srfed.config import RunConfig
from srfed.data import Task, load_tasks
from srfed.errors import UserError
from srfed.evaluation.central import CentralEvaluation
from srfed.evaluation.features import load_feature_network
from srfed.federation.exchange import StoppedError, exchange, stop_requested
from srfed.federation.messages import DESCRIBE, Description, Request, array_record
from srfed.federation.server_state import ServerCheckpoints, ServerState
from srfed.federation.strategy import Member, SharedRepresentationStrategy
from srfed.models.partition import Partition
from srfed.models.unet import UNet
from srfed.reporting.records import TaskInfo
from srfed.reporting.reporter import Reporter
from srfed.reporting.run_directory import RunDirectory
from srfed.training.setup import build_model, build_partition, resolve_device

RUN_DIR_VARIABLE = "SRFED_RUN_DIR"
"""Environment variable that tells a simulation's ServerApp which run directory is its own."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the run of a run directory.

    Raises:
        UserError: see :func:`run_federation`; also, no run directory was named.
    """
    folder = context.run_config.get("run-dir") or os.environ.get(RUN_DIR_VARIABLE)
    if not isinstance(folder, str):
        raise UserError("no run directory: set the run configuration's run-dir")
    run_federation(grid, RunDirectory.open(Path(folder)))


def run_federation(grid: Grid, run: RunDirectory) -> None:
    """Train and evaluate until the last round.

    Raises:
        UserError: too few clients, clients that do not fit together, a damaged checkpoint, a round that fails.
        StoppedError: the user asked to stop.
    """
    config = run.config
    torch.set_num_threads(config.resources.client_cpus)
    reporter = Reporter(run)
    try:
        tasks = load_tasks(config.data, config.federation.clients)
        members = meet(grid, config, run.lineage)
        checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
        model, partition, shape = _agree(config, members)
        if run.started:
            state = checkpoints.load_last()
        else:
            state = _initial_state(run, model, partition, shape)
            checkpoints.save(state)
        reporter.begin(
            state.round,
            [
                TaskInfo(client, m.description.task, m.description.images, m.description.test_images)
                for client, m in sorted(members.items(), key=lambda item: item[1].description.index)
            ],
        )
        network = load_feature_network(
            config.evaluation.feature_network,
            config.evaluation.inception_weights,
            resolve_device(config.resources),
        )
        evaluation = CentralEvaluation(network, {task.name: task.test for task in tasks})
        strategy = SharedRepresentationStrategy(
            config, partition, state, members, checkpoints, evaluation, _Floor(evaluation, tasks), reporter
        )
        timeout = config.federation.round_timeout
        if strategy.evaluation_due(state.round, config.federation.rounds) and not reporter.has_evaluation(state.round):
            strategy.evaluate(grid, state.round, timeout)
        strategy.start(grid, array_record(strategy.state.shared), config.federation.rounds, timeout)
    finally:
        reporter.close()


def meet(grid: Grid, config: RunConfig, lineage: str) -> dict[str, Member]:
    """Wait for as many nodes as the run has clients and ask each who it is.

    Raises:
        UserError: too few nodes in time, a client that fails, or two with one id.
    """
    wanted, deadline = config.federation.clients, time.monotonic() + config.federation.round_timeout
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if stop_requested.is_set():
            raise StoppedError
        if time.monotonic() > deadline:
            raise UserError(f"{len(nodes)} of {wanted} clients joined in {config.federation.round_timeout:g} s")
        time.sleep(0.1)
    request = Request(config.to_json(), lineage)
    messages = [Message(request.to_content(), node, DESCRIBE) for node in nodes]
    asked = exchange(grid, messages, config.federation.round_timeout)
    members: dict[str, Member] = {}
    for reply in asked.replies:
        node = asked.requests[reply.metadata.reply_to_message_id].metadata.dst_node_id
        if reply.has_error():
            raise UserError(f"node {node} cannot describe itself; the reason is in its client.log")
        try:
            description = Description.of(reply.content)
        except ValueError as error:
            raise UserError(
                f"node {node} describes itself in another way ({error}); is its srfed another version?"
            ) from error
        if description.client in members:
            raise UserError(f"two clients call themselves {description.client!r}")
        members[description.client] = Member(node, description)
    if len(members) < wanted:
        raise UserError(f"{len(members)} of {wanted} clients described themselves in time")
    return members


def _agree(config: RunConfig, members: dict[str, Member]) -> tuple[UNet, Partition, tuple[int, int, int]]:
    """The model that all clients share; raises UserError where their images or partitions differ."""
    shapes = {
        (m.description.height, m.description.width, m.description.channels): client for client, m in members.items()
    }
    if len(shapes) > 1:
        listed = ", ".join(f"{client}: {'x'.join(map(str, shape))}" for shape, client in shapes.items())
        raise UserError(f"the clients' images differ in shape ({listed}); set data.image_size and data.channels")
    shape = next(iter(shapes))
    model = build_model(config, shape[-1])
    partition = build_partition(config, model)
    fingerprint = partition.fingerprint(model.state_dict())
    for client, member in members.items():
        if member.description.partition != fingerprint:
            raise UserError(f"client {client!r} divides the model differently; is its srfed another version?")
    return model, partition, shape


def _initial_state(run: RunDirectory, model: UNet, partition: Partition, shape: tuple[int, int, int]) -> ServerState:
    shared = {name: t.clone() for name, t in partition.take_shared(model.state_dict()).items()}
    return ServerState(
        lineage=run.lineage,
        round=0,
        shared=shared,
        shared_average={name: tensor.clone() for name, tensor in shared.items()},
        shape=shape,
    )


class _Floor:
    """The score that the real training images of some tasks would get: what a perfect model scores."""

    def __init__(self, evaluation: CentralEvaluation, tasks: list[Task]) -> None:
        self._evaluation = evaluation
        self._images = {task.name: task.train for task in tasks}
        self._known: dict[tuple[str, ...], float] = {}

    def __call__(self, clients: Iterable[str]) -> float:
        key = tuple(sorted(clients))
        if key not in self._known:
            images = {client: self._images[client] for client in key}
            self._known[key] = self._evaluation.score(images).overall
        return self._known[key]

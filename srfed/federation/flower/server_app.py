"""The ServerApp: meet the clients, restore or begin the run, hand over to the strategy."""

import logging
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from srfed.config import load_config
from srfed.data import load_recorded_tasks, record_tasks
from srfed.data.tasks import ALLOW
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.references import RealFloor, References
from srfed.federation.flower.exchange import StoppedError
from srfed.federation.flower.identity import ROSTER_FILE, kept_roster, read_roster
from srfed.federation.flower.roster import Expected, Member, Roster
from srfed.federation.flower.strategy import SharedRepresentationStrategy
from srfed.federation.messages import array_record
from srfed.federation.site import run_folder
from srfed.files import write_bytes, write_json
from srfed.model import build_model, build_partition
from srfed.paths import user_path
from srfed.records import TaskInfo
from srfed.reporting.console import Console
from srfed.reporting.summary import summarise
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import KnownClient, ServerCheckpoints, ServerState

RUN_DIR_VARIABLE = "SRFED_RUN_DIR"
"""Environment variable that tells a simulation's ServerApp which run directory is its own."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Begin the run of a run folder, or go on with it; see :func:`begin_or_go_on`.

    Raises:
        UserError: see :func:`run_federation`.
    """
    simulated = os.environ.get(RUN_DIR_VARIABLE)
    if simulated:
        run_federation(grid, RunFolder.open(Path(simulated)), fixed=True)
        return
    logging.getLogger("flwr").addFilter(_without_traceback)
    began = time.monotonic()
    run = begin_or_go_on(context)
    run_federation(grid, run)
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    print(f"\n{summary}", flush=True)


def begin_or_go_on(context: Context) -> RunFolder:
    """The run that ``flwr run --run-config`` names: new, or one that was stopped.

    ``run-dir`` is its folder, ``config`` a YAML file (absolute, or one of the app's own such as
    "configs/mnist.yaml"; by default what the run was begun with, or the embedded digits), ``set``
    holds overrides, separated by spaces; ``roster`` is a file that maps client ids to public keys,
    which the run keeps.

    Raises:
        UserError: the configuration is impossible, or not the one that the run was begun with; the
            roster is none.
    """
    folder = run_folder(context)
    named, overrides, roster = (
        str(context.run_config.get(key) or "") for key in ("config", "set", "roster")
    )
    keys = read_roster(user_path(roster)) if roster else None
    if (folder / "run.json").exists():
        run = RunFolder.open(folder)
        run = run.reconfigure(
            load_config(_config_file(named) or run.config_file, shlex.split(overrides))
        )
    else:
        run = RunFolder.create(folder, load_config(_config_file(named), shlex.split(overrides)))
    if keys is not None:
        write_json(folder / ROSTER_FILE, {"keys": keys})
    return run


def _config_file(name: str) -> Path | None:
    """A configuration file by its path, or by its name in the app's folder, which Flower puts on
    Python's path.
    """
    if not name:
        return None
    candidates = [Path(folder) / name for folder in sys.path]
    return next((file for file in candidates if file.is_file()), Path(name))


def _without_traceback(record: logging.LogRecord) -> bool:
    """Flower logs whatever ends a ServerApp with its traceback; what the user can mend takes one
    line.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | StoppedError):
        record.msg, record.args, record.exc_info = f"error: {error}", None, None
    return True


def run_federation(grid: Grid, run: RunFolder, *, fixed: bool = False) -> None:
    """Train and evaluate until the last round.

    Args:
        grid: where the clients are.
        run: the run's folder.
        fixed: the clients are those of a simulation; one that does not fit is not waited for.

    Raises:
        UserError: too few clients, a damaged checkpoint, a round that fails, a folder in use.
        StoppedError: the user asked to stop.
    """
    with run.in_use():
        reporter = Console(run)
        try:
            _Server(grid, run, reporter, fixed).run()
        finally:
            reporter.close()


class _Server:
    """One execution of a run, from its last checkpoint on."""

    def __init__(self, grid: Grid, run: RunFolder, reporter: Console, fixed: bool) -> None:
        self._grid, self._run, self._reporter, self._fixed = grid, run, reporter, fixed
        self._config = config = run.config
        torch.set_num_threads(config.resources.client_cpus)
        self._tasks = []
        if config.data.dataset != "sites":
            remedy = ALLOW if fixed else "begin another run"
            self._tasks = load_recorded_tasks(
                config.data, config.federation.clients, run.images, remedy=remedy
            )
            record_tasks(run.images, self._tasks)
        shape = self._shape()
        model = build_model(config, shape[-1])
        self._partition = build_partition(config, model)
        shared = self._partition.take_shared(model.state_dict())
        self._checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
        if run.started:
            self._state = self._checkpoints.load_last()
            self._checkpoints.check(self._state, shared)
        else:
            self._state = ServerState(
                lineage=run.lineage,
                round=0,
                shared={name: tensor.clone() for name, tensor in shared.items()},
                shared_average={name: tensor.clone() for name, tensor in shared.items()},
                shape=shape,
            )
        self._roster = Roster(
            grid,
            config,
            run.lineage,
            Expected(
                shape=shape,
                partition=self._partition.fingerprint(model.state_dict()),
                clients=self._known_references(),
                known=self._known_clients(),
                keys=kept_roster(run.path),
            ),
            joined=self._joined,
            notice=reporter.on_notice,
        )
        self._began = False

    def run(self) -> None:
        config, reporter = self._config, self._reporter
        self._gather()
        self._state = replace(self._state, known=self._roster.known)
        if not self._run.started:
            self._checkpoints.save(self._state)
        training = config.training
        if training.optimizer == "sgd" and training.gradient_clip is None:
            reporter.on_notice(
                "training.gradient_clip is null: plain SGD can move φ as far as it likes, so "
                "updates have no bound"
            )
        members = self._roster.members.values()
        reporter.begin(
            self._state.round,
            [_info(m) for m in sorted(members, key=lambda m: m.description.index)],
        )
        self._began = True
        network = load_feature_network(
            config.evaluation.feature_network,
            config.evaluation.inception_weights,
            resolve_device(config.resources),
        )
        evaluation = References(network, {task.name: task.test for task in self._tasks})
        strategy = SharedRepresentationStrategy(
            config,
            self._partition,
            self._state,
            self._roster,
            self._checkpoints,
            evaluation,
            RealFloor(evaluation, self._tasks),
            reporter,
        )
        timeout, last = config.federation.round_timeout, config.federation.rounds
        if config.evaluation_due(self._state.round) and not reporter.has_evaluation(
            self._state.round
        ):
            strategy.evaluate(self._grid, self._state.round, timeout)
        strategy.start(self._grid, array_record(strategy.state.shared), last, timeout)

    def _gather(self) -> None:
        """Wait for the clients that the run begins, or goes on, with."""
        federation, roster, known = self._config.federation, self._roster, set(self._state.clients)

        def enough() -> bool:
            present = set(roster.present)
            return present >= known if known else len(present) >= federation.clients

        def acceptable() -> bool:
            return federation.on_missing == "skip" and len(roster.present) >= federation.min_clients

        roster.gather(enough, acceptable, fixed=self._fixed, known=known)

    def _shape(self) -> tuple[int, int, int]:
        """H, W, C of the run's images, which every client's must have."""
        if self._tasks:
            height, width, channels = self._tasks[0].train.shape[1:]
            return height, width, channels
        size, channels = self._config.data.image_size, self._config.data.channels
        assert size is not None, "the configuration was checked"
        assert channels is not None, "the configuration was checked"
        return size, size, channels

    def _known_clients(self) -> dict[str, KnownClient]:
        """What clients are held to; in a simulation their images are those on record, whatever they
        were before.
        """
        known = dict(self._state.known)
        for task in self._tasks if self._fixed else ():
            if task.name in known:
                known[task.name] = replace(
                    known[task.name], images=len(task.train), test_images=len(task.test)
                )
        return known

    def _known_references(self) -> frozenset[str] | None:
        """The clients whose samples this server can judge; None where they judge them
        themselves.
        """
        if self._config.evaluation.mode == "statistics":
            return None
        return frozenset(task.name for task in self._tasks)

    def _joined(self, member: Member) -> None:
        if self._began:
            self._reporter.on_join(_info(member))


def _info(member: Member) -> TaskInfo:
    description = member.description
    return TaskInfo(
        description.client, description.task, description.images, description.test_images
    )

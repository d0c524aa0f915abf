"""Whose machine this is: the client's id, its task's images, and where it keeps its state.

A deployed site says so itself, in its SuperNode's ``--node-config``; in a simulation, partition i
owns task i.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from srfed.config import DataConfig, RunConfig
from srfed.data import (
    RECORD_FILE,
    Task,
    load_own_task,
    load_recorded_task,
    task_names,
)
from srfed.data.own_images import Write
from srfed.errors import UserError
from srfed.federation.keeping import keep
from srfed.files import append_text, exists, open_to_others
from srfed.paths import home_folder, user_path
from srfed.storage.client_store import check_name
from srfed.units import escaped, escaped_lines

STATE_DIR_VARIABLE = "SRFED_STATE_DIR"
"""Environment variable that tells clients in Ray's processes where the run keeps their stores."""
NODE_CONFIG = ("client-id", "data", "state-dir")
"""What a site's SuperNode is told, all three."""
CLIENT_STORES = "clients"
"""Where a run's folder holds the stores of simulated clients."""


class Surroundings(Protocol):
    """Flower's ``Context``, as far as a site and a run follow from it."""

    @property
    def run_id(self) -> int:
        """The run's number."""

    @property
    def node_config(self) -> Mapping[str, Any]:
        """What the node was started with."""

    @property
    def run_config(self) -> Mapping[str, Any]:
        """What the run was started with."""


@dataclass(frozen=True)
class Site:
    """One client's surroundings.

    Attributes:
        client: its stable id; in a simulation the name of its task.
        state_dir: folder of the client's durable state.
        data: its own images, a folder or an .npz file; None in a simulation.
        index: in a simulation, the task's position in the data set; -1 at a deployed site.
    """

    client: str
    state_dir: Path
    data: Path | None = None
    index: int = -1

    @property
    def folder(self) -> Path:
        """Everything that this client keeps."""
        return self.state_dir / self.client

    @property
    def log(self) -> Path:
        """Where it explains failures, which never travel."""
        return self.folder / "client.log"

    def note(self, text: str) -> None:
        """Append to the log, with the time; raises UserError where it cannot be written. What a
        text quotes can begin no entry of its own.
        """
        first, *others = escaped_lines(text) or [""]
        entry = "".join(f"{line}\n" for line in [first, *(f"  {line}" for line in others)])
        append_text(self.log, f"{datetime.now(UTC).isoformat(timespec='seconds')} {entry}")

    def says(self, text: str) -> bool:
        """Whether the log has a line with these words; not where there is no log."""
        return exists(self.log) and escaped(text) in self.log.read_text(errors="replace")

    def note_open_folders(self) -> None:
        """Say in the log which of the client's folders others can read."""
        for folder in (self.state_dir, self.folder):
            if said := open_to_others(folder):
                self.note(said)


def site_of(context: Surroundings, config: RunConfig) -> Site:
    """The site that a message has reached.

    Raises:
        UserError: the node's configuration lacks something, or has what nobody reads.
    """
    if is_simulated(context):
        index = int(str(context.node_config["partition-id"]))
        return Site(_task_names(config.data)[index], _simulated_state_dir(context), index=index)
    return deployed_site(context.node_config)


def is_simulated(context: Surroundings) -> bool:
    """Whether the node is one of a simulation's, which Flower numbers and nobody has configured."""
    return (
        isinstance(context.node_config.get("partition-id"), int)
        and "client-id" not in context.node_config
    )


def deployed_site(node_config: Mapping[str, Any]) -> Site:
    """The site that a SuperNode's ``--node-config`` describes; raises UserError as
    :func:`site_of`.
    """
    unknown = sorted(set(node_config) - set(NODE_CONFIG))
    if unknown:
        raise UserError(f"node-config: {unknown[0]} is unknown; allowed: {', '.join(NODE_CONFIG)}")
    for key in NODE_CONFIG:
        if not isinstance(value := node_config.get(key), str) or not value:
            raise UserError(
                f"node-config: {key} = {value!r} is impossible; allowed: a text in quotation marks"
            )
    client = str(node_config["client-id"])
    check_name(client)
    paths = [user_path(str(node_config[key])) for key in ("state-dir", "data")]
    for key, path in zip(("state-dir", "data"), paths, strict=True):
        if not path.is_absolute():
            raise UserError(f"node-config: {key} = {path} is impossible; allowed: an absolute path")
    return Site(client, paths[0], paths[1])


def run_folder(context: Surroundings) -> Path:
    """The folder of the run that a Flower app belongs to, from its run configuration's ``run-dir``.

    Raises:
        UserError: it is no absolute path. Flower's processes stand in folders of their own.
    """
    named = context.run_config.get("run-dir") or ""
    if not named:
        return home_folder() / "srfed-runs" / str(context.run_id)
    path = user_path(str(named))
    if not path.is_absolute():
        raise UserError(f"run-config: run-dir = {named} is impossible; allowed: an absolute path")
    return path


def own_task(config: DataConfig, site: Site) -> Task:
    """The site's task, read once a process and run, however many sites it has; raises UserError
    where its images are not what they should be.
    """
    tasks = _tasks_of(config, site.state_dir)
    if site not in tasks:
        tasks[site] = _own_task(config, site)
    task, waiting = tasks[site]
    if waiting:
        # With the first message that is answered, whichever that is.
        keep(lambda: _write(waiting), last=True)
    return task


@lru_cache(maxsize=2)
def _tasks_of(config: DataConfig, state_dir: Path) -> dict[Site, tuple[Task, list[Write]]]:
    """The tasks of one run's sites, and what of each is to be written yet; those of runs before are
    let go.
    """
    return {}


def _write(waiting: list[Write]) -> None:
    while waiting:
        waiting[0]()
        del waiting[0]


def _own_task(config: DataConfig, site: Site) -> tuple[Task, list[Write]]:
    if site.data is None:
        # A simulation's stores lie in its run's folder, beside the record that the server has made.
        return load_recorded_task(config, site.index, site.state_dir.parent / RECORD_FILE), []
    waiting: list[Write] = []
    task = load_own_task(config, site.data, site.client, site.folder, later=waiting.append)
    return task, waiting


def _simulated_state_dir(context: Surroundings) -> Path:
    state_dir = context.node_config.get("state-dir") or os.environ.get(STATE_DIR_VARIABLE)
    return Path(str(state_dir)) if state_dir else run_folder(context) / CLIENT_STORES


@lru_cache(maxsize=4)
def _task_names(data: DataConfig) -> tuple[str, ...]:
    return tuple(task_names(data))

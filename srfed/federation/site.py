"""Whose machine this is: the client's id, its task's images, and where it keeps its state."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from srfed.config import DataConfig, RunConfig
from srfed.data import Task, load_task, task_names
from srfed.errors import UserError

STATE_DIR_VARIABLE = "SRFED_STATE_DIR"
"""Environment variable that tells a simulation's clients where the run keeps their stores."""


@dataclass(frozen=True)
class Site:
    """One client's surroundings.

    Attributes:
        client: its stable id; in a simulation the name of its task.
        index: the task's position in the data set.
        state_dir: folder of the client's durable state.
        log: where it explains failures, which never travel.
    """

    client: str
    index: int
    state_dir: Path

    @property
    def log(self) -> Path:
        return self.state_dir / self.client / "client.log"


def site_of(context: Context, config: RunConfig) -> Site:
    """The site of a simulated client: partition i owns task i.

    Raises:
        UserError: the context or the environment is not a simulation's.
    """
    index = context.node_config.get("partition-id")
    state_dir = os.environ.get(STATE_DIR_VARIABLE)
    if not isinstance(index, int) or state_dir is None:
        raise UserError("this client has neither a partition-id nor a state folder")
    return Site(_task_names(config.data)[index], index, Path(state_dir))


@lru_cache(maxsize=4)
def _task_names(data: DataConfig) -> tuple[str, ...]:
    return tuple(task_names(data))


@lru_cache(maxsize=256)
def own_task(data: DataConfig, index: int) -> Task:
    """The task of a simulated client, read once a process."""
    return load_task(data, index)

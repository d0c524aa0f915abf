"""A trained run, opened for sampling: the averaged φ of its last checkpoint, each client's averaged θ_i."""

from pathlib import Path

from srfed.config import ResourcesConfig
from srfed.errors import UserError
from srfed.federation.client_store import ClientStore
from srfed.federation.server_state import ServerCheckpoints
from srfed.models.unet import UNet
from srfed.reporting.metrics_log import MetricsLog
from srfed.reporting.records import TaskInfo
from srfed.reporting.run_directory import RunDirectory
from srfed.training.local import initial_state, load_tensors
from srfed.training.setup import build_diffusion, build_model, build_partition, resolve_device


class TrainedRun:
    """The models of a simulation's run folder.

    Args:
        path: the run's folder.
        device: where to sample; see ``resources.device``.

    Raises:
        UserError: no such run, no checkpoint yet, or damaged files.
    """

    def __init__(self, path: Path, resources: ResourcesConfig) -> None:
        self._run = RunDirectory.open(path)
        self.config = self._run.config
        self._state = ServerCheckpoints(self._run.server, 1).load_last()
        self.round = self._state.round
        self.shape = self._state.shape
        self.device = resolve_device(resources)
        self._model = build_model(self.config, self.shape[-1])
        self._partition = build_partition(self.config, self._model)
        self._initial = initial_state(self._model, self._partition)
        self._model.to(self.device)
        self.diffusion = build_diffusion(self.config, self.device)
        self.tasks: list[TaskInfo] = MetricsLog(self._run.metrics).tasks()

    def find_task(self, wanted: str) -> TaskInfo:
        """The task of that name or position; raises UserError listing what there is."""
        for position, task in enumerate(self.tasks):
            if wanted in (task.task, str(position)):
                return task
        names = ", ".join(f"{position} ({task.task})" for position, task in enumerate(self.tasks))
        raise UserError(f"--task {wanted!r} is not in this run; it has {names}")

    def model_of(self, task: TaskInfo) -> UNet:
        """The averaged (φ, θ_i) of a task, in evaluation mode; the next call reuses the same module."""
        state = self._initial
        if task.client in self._state.attempts:
            store = ClientStore(self._run.clients, task.client, self._run.lineage, 1)
            state = store.load(self._state.attempts[task.client])
        load_tensors(self._model, self._state.shared_average, state.exclusive_average)
        return self._model.eval()

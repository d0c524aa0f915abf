"""Trained models, opened for sampling: those of a simulation's run, or the one of a deployed
site.
"""

from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from srfed.config import ResourcesConfig
from srfed.data.source import slugs
from srfed.device import resolve_device
from srfed.diffusion.process import Denoiser
from srfed.errors import UserError
from srfed.files import exists
from srfed.model import (
    Forwards,
    build_model,
    build_objective,
    build_partition,
    captured_forwards,
    denoiser_of_task,
    shared_of,
)
from srfed.networks.network import Network
from srfed.records import Shape, TaskInfo
from srfed.storage.checkpoint import check_tensors
from srfed.storage.client_store import ClientStore
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import RunState, ServerCheckpoints
from srfed.storage.site_model import SiteModel
from srfed.training.part import ClientState, initial_state, load_tensors


class TrainedSite:
    """The model of one deployed site, from its own store; the same interface as
    :class:`TrainedRun`.

    Attributes:
        shared: the averaged φ.
        partition: what of the model that is.
        shapes: H, W, C of its images, alone.

    Args:
        folder: the client's own folder, ``<state-dir>/<client>``.
        resources: says where to sample.

    Raises:
        UserError: the store has no model yet, or a damaged one.
    """

    def __init__(self, folder: Path, resources: ResourcesConfig) -> None:
        stored = SiteModel(folder)
        self.config, self.round, self.shapes = stored.config, stored.round, [stored.shape]
        self.device = resolve_device(resources)
        model = build_model(self.config, stored.shape[-1])
        self.shared, self._exclusive = stored.tensors
        check_tensors(str(stored.path), {**self.shared, **self._exclusive}, model.state_dict())
        load_tensors(model, self.shared, self._exclusive)
        self.partition = build_partition(self.config, model)
        self._model = model.to(self.device).eval()
        self._forwards = captured_forwards(self._model, resources, self.device)
        self.objective = build_objective(self.config, self.device)
        self.tasks = [TaskInfo(stored.client, stored.client, 0, 0)]

    def find_task(self, wanted: str | int) -> TaskInfo:
        """The site's own task; raises UserError for any other."""
        if wanted not in (self.tasks[0].task, "0", 0):
            raise UserError(
                f"--task {wanted!r} is not at this site; it has 0 ({self.tasks[0].task})"
            )
        return self.tasks[0]

    def shape_of(self, task: TaskInfo) -> Shape:
        """H, W, C of its images."""
        return self.shapes[0]

    def denoiser(self, task: TaskInfo) -> Denoiser:
        """E[x_0 | x_t] of the averaged (φ, θ_i), in evaluation mode; where samples are drawn, it is
        guided.
        """
        return denoiser_of_task(self.objective, self._model, None, self._forwards)

    def exclusive_of(self, task: TaskInfo) -> dict[str, Tensor]:
        """The averaged θ_i."""
        return self._exclusive

    @property
    def at_hand(self) -> list[TaskInfo]:
        """The tasks that can be sampled here: its own."""
        return self.tasks


class TrainedRun:
    """The models of a simulation's run folder: of its best round so far under ``federation.result:
    best``, else of its last.

    Attributes:
        shapes: the different H, W, C of its tasks' images, in the order of the tasks.

    Args:
        path: the run's folder.
        resources: say where to sample.
        after: the round whose weights are wanted, one that is kept; None as above.

    Raises:
        UserError: no such run, no such checkpoint, or damaged files.
    """

    def __init__(self, path: Path, resources: ResourcesConfig, *, after: int | None = None) -> None:
        self._run = RunFolder.open(path)
        self.config = self._run.config
        checkpoints = ServerCheckpoints(self._run.server, 1)
        last = checkpoints.load_last()
        # The best round's, where that is the run's result; shapes may be of tasks that came later.
        state = checkpoints.load_best(last) if after is None else checkpoints.load(after)
        self._state = replace(state, shapes=last.shapes)
        self.round = self._state.round
        self.tasks: list[TaskInfo] = MetricsLog(self._run.metrics).tasks()
        if not self.tasks:
            raise UserError(
                f"{self._run.metrics} names no task: it is missing or empty; put it back, or write "
                f"it again with --resume {self._run.path}"
            )
        self.shapes = list(dict.fromkeys(map(self.shape_of, self.tasks)))
        self._resources, self.device = resources, resolve_device(resources)
        self._models: dict[int, _Model] = {}
        self.partition, shared = shared_of(self.config, [self.shapes[0][-1]])
        checkpoints.check(self._state, shared)
        self.objective = build_objective(self.config, self.device)

    def find_task(self, wanted: str | int) -> TaskInfo:
        """The task of that name, or of that of its folder, or else at that position.

        Raises:
            UserError: there is none, and the text lists what there is; or a position, given as a
                number, is another task's name.
        """
        named = {task.task: task for task in self.tasks}
        placed = dict(enumerate(self.tasks))
        by_name = named.get(str(wanted))
        if isinstance(wanted, str) and by_name is not None:
            return by_name
        at = next((place for place in placed if str(place) == str(wanted)), -1)
        if at in placed:
            if by_name not in (None, placed[at]):
                raise UserError(
                    f"task {at} is {placed[at].task!r} by position, and another one is called "
                    f"'{at}'; give the name as text, '{at}' or {placed[at].task!r}"
                )
            return placed[at]
        # The name that its owner gave the folder: "red blood_cells" is the task red-blood-cells.
        # A text that no folder could be called by is refused below, with what there is.
        with suppress(UserError):
            (called,) = slugs([str(wanted)])
            if called in named and not called.isdigit():
                return named[called]
        names = ", ".join(f"{position} ({task.task})" for position, task in enumerate(self.tasks))
        raise UserError(f"--task {wanted!r} is not in this run; it has {names}")

    def denoiser(self, task: TaskInfo) -> Denoiser:
        """E[x_0 | x_t] of a task's averaged (φ, θ_i), in evaluation mode; where samples are drawn,
        it is guided. The next call reuses the same module.
        """
        model = self._model_of(task)
        load_tensors(model.network, self.shared, self.exclusive_of(task))
        model.network.eval()
        return denoiser_of_task(
            self.objective, model.network, self.tasks.index(task), model.forwards
        )

    def shape_of(self, task: TaskInfo) -> Shape:
        """H, W, C of a task's images; of one that joined after the last checkpoint, another's."""
        shapes = self._state.shapes
        return shapes.get(task.client, next(iter(shapes.values())))

    @property
    def shared(self) -> dict[str, Tensor]:
        """The averaged φ."""
        return self._state.shared.average

    @property
    def at_hand(self) -> list[TaskInfo]:
        """The tasks that can be sampled here: of a copy those whose θ_i was kept, otherwise all; if
        none was, all, so that whoever samples is told.
        """
        kept = self._run.copied_tasks
        return [task for task in self.tasks if kept is not None and task.task in kept] or self.tasks

    @property
    def state(self) -> RunState:
        """What the checkpoint holds whose weights these are."""
        return self._state

    def initial_exclusive_of(self, task: TaskInfo) -> dict[str, Tensor]:
        """θ_0, the initialisation that all tasks with images of so many channels have in common."""
        return self._model_of(task).initial.exclusive.weights

    def sizes_of(self, task: TaskInfo) -> dict[str, int]:
        """Numbers in each tensor of a task's model, by name."""
        network = self._model_of(task).network
        return {name: tensor.numel() for name, tensor in network.state_dict().items()}

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the lineage, the round and the attempts: what names this checkpoint's
        weights.
        """
        name = f"{self._state.lineage} {self._state.round} {sorted(self._state.attempts.items())}"
        return sha256(name.encode()).hexdigest()

    def exclusive_of(self, task: TaskInfo) -> dict[str, Tensor]:
        """The averaged θ_i of a task; the common initialisation where it never took part.

        Raises:
            UserError: the run was deployed, and θ_i is at its site.
        """
        initial = self._model_of(task).initial.exclusive.average
        if task.client not in self._state.attempts or not self.partition.exclusive:
            return initial
        store = ClientStore(self._run.clients, task.client, self._run.lineage, 1)
        if not exists(self._run.clients / task.client):
            if self._run.copied_tasks is not None:
                raise UserError(
                    f"{self._run.path} is a copy without θ of {task.client!r}, which srfed share "
                    "has left out; sample where the run itself is"
                )
            raise UserError(
                f"{self._run.path} has no θ of {task.client!r}: a deployed site keeps its own; "
                "sample there with --store <state-dir>/<client-id>"
            )
        average = store.load(self._state.attempts[task.client]).exclusive.average
        check_tensors(str(store.folder), average, initial)
        return average

    def _model_of(self, task: TaskInfo) -> "_Model":
        channels = self.shape_of(task)[-1]
        if channels not in self._models:
            network = build_model(self.config, channels)
            initial = initial_state(network, self.partition)
            network.to(self.device)
            self._models[channels] = _Model(
                network, captured_forwards(network, self._resources, self.device), initial
            )
        return self._models[channels]


class _Model(NamedTuple):
    """The network for images of so many channels."""

    network: Network
    forwards: Forwards
    initial: ClientState

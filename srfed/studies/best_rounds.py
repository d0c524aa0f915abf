"""The best round of each network by validation images, kept while a run is trained.

    <run>/best/history.json             validation loss by round and task
    <run>/best/<group>.safetensors      the averaged φ and θ_i of the round that was best so far

A group is what has a round of its own: a task by itself, or ``all`` of them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from srfed.data import Task
from srfed.errors import UserError
from srfed.evaluation.metrics.denoising_loss import denoising_losses, mean_loss
from srfed.files import exists, read_json, write_json
from srfed.observer import Observer
from srfed.records import RoundRecord, TaskInfo
from srfed.runs.run import TrainedRun
from srfed.storage.checkpoint import write_arrays
from srfed.storage.run_folder import RunFolder

TOGETHER = "all"
"""The group of all tasks."""
VALIDATION_NOISE = 1
"""A seed: the noise is the same for every run, whatever its own seed, and not that of the test
images.
"""


class BestRounds(Observer):
    """Keeps the averaged weights of the rounds with the least validation loss.

    Killed anywhere and gone on with, it ends with the same: weights are written before the history,
    a round that is not in the history is judged again, and a run tells its last round when it
    begins.

    Args:
        run: the run.
        tasks: its tasks, with validation images.
        every: rounds between two looks at them; the last round has one too.
        apart: each task has a round of its own.
    """

    def __init__(self, run: RunFolder, tasks: Sequence[Task], every: int, *, apart: bool) -> None:
        self._run, self._tasks, self._every = run, tasks, every
        self._groups = groups_of(tasks, apart=apart)

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        if last_round:
            self._judge(last_round)

    def on_round(self, record: RoundRecord) -> None:
        self._judge(record.round)

    def _judge(self, number: int) -> None:
        due = number % self._every == 0 or number == self._run.config.federation.rounds
        history = read_history(self._run)
        if not due or number in history:
            return
        trained = TrainedRun(self._run.path, self._run.config.resources)
        losses = {
            task.name: mean_loss(
                denoising_losses(
                    trained.denoiser(trained.find_task(task.name)),
                    trained.objective.process,
                    task.validation,
                    task=task.name,
                    seed=VALIDATION_NOISE,
                )
            )
            for task in self._tasks
        }
        for group, members in self._groups.items():
            before = [_of_group(found, members) for found in history.values()]
            if _of_group(losses, members) < min(before, default=math.inf):
                self._keep(trained, group, members, number)
        history[number] = losses
        write_json(_history_file(self._run), {"rounds": {str(n): v for n, v in history.items()}})

    def _keep(self, trained: TrainedRun, group: str, members: Sequence[str], number: int) -> None:
        arrays = {f"shared:{name}": tensor.numpy() for name, tensor in trained.shared.items()}
        for member in members:
            exclusive = trained.exclusive_of(trained.find_task(member))
            arrays |= {f"{member}:{name}": tensor.numpy() for name, tensor in exclusive.items()}
        write_arrays(best_file(self._run, group), arrays, {"round": str(number)})


def groups_of(tasks: Sequence[Task], *, apart: bool) -> dict[str, list[str]]:
    """The tasks of each group that has a round of its own: each by itself, or all together."""
    names = [task.name for task in tasks]
    return {name: [name] for name in names} if apart else {TOGETHER: names}


def read_history(run: RunFolder) -> dict[int, dict[str, float]]:
    """Validation loss by round and task; none where there is none yet.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    if not exists(_history_file(run)):
        return {}
    found = read_json(_history_file(run), kinds={"rounds": dict})["rounds"]
    return {int(number): losses for number, losses in found.items()}


def best_rounds(
    history: Mapping[int, Mapping[str, float]], groups: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """The round with the least validation loss, the first of several, by group.

    Raises:
        UserError: no round has a finite one.
    """
    best = {}
    for group, members in groups.items():
        losses = {number: _of_group(history[number], members) for number in sorted(history)}
        best[group] = min(losses, key=losses.__getitem__)
        if math.isinf(losses[best[group]]):
            raise UserError(
                f"the validation loss of {group} was finite in no round; lower the learning rate"
            )
    return best


def has_passed(
    history: Mapping[int, Mapping[str, float]],
    groups: Mapping[str, Sequence[str]],
    patience: int,
) -> bool:
    """Whether no group has had a better round for ``patience`` rounds; 0: never."""
    if not patience or not history:
        return False
    last = max(history)
    return all(
        last - min(history, key=lambda number: (_of_group(history[number], members), number))
        >= patience
        for members in groups.values()
    )


def _of_group(losses: Mapping[str, float], members: Sequence[str]) -> float:
    """Mean over a group's tasks; what is not finite is worse than all that is."""
    loss = mean(losses[member] for member in members)
    return loss if math.isfinite(loss) else math.inf


def _history_file(run: RunFolder) -> Path:
    return run.path / "best" / "history.json"


def best_file(run: RunFolder, group: str) -> Path:
    """Where the weights of a group's best round are."""
    return run.path / "best" / f"{group}.safetensors"

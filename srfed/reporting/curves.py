"""What a run's folder shows: TensorBoard's curves, and pictures of the samples."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress

from srfed.files import list_folder
from srfed.observer import Observer
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.console import Console
from srfed.reporting.pictures import draw_grid, write_png
from srfed.reporting.tensorboard import TensorBoard
from srfed.storage.run_folder import RunFolder


class Curves(Observer):
    """Writes curves and pictures into a run's folder.

    Args:
        run: the folder.
        notice: told where curves cannot be written any more.
    """

    def __init__(self, run: RunFolder, notice: Callable[[str], object] = lambda text: None) -> None:
        self._run, self._notice = run, notice
        self._tensorboard: TensorBoard | None = None
        self._clients: list[str] = []

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        """Raises UserError where the curves cannot be begun."""
        self._clients = [task.client for task in tasks]
        self._drop_pictures(last_round)
        self._tensorboard = TensorBoard(
            self._run.tensorboard, self._run.config, last_round, self._notice
        )

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in self._clients:
            self._clients.append(task.client)

    def on_round(self, record: RoundRecord) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_round(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        shown = [client for client in self._clients if client in record.grids]
        pictures = {}
        if shown:
            pictures["samples"] = draw_grid({client: record.grids[client] for client in shown})
            pictures["reverse_process"] = draw_grid(
                {client: record.strips[client] for client in shown}
            )
            write_png(self._run.samples / f"round-{record.round:05d}.png", pictures["samples"])
            write_png(
                self._run.samples / f"reverse-process-{record.round:05d}.png",
                pictures["reverse_process"],
            )
        if self._tensorboard is not None:
            self._tensorboard.add_evaluation(record, pictures)

    def on_end(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _drop_pictures(self, last_round: int) -> None:
        """A resumed run draws those of later rounds again."""
        for name in list_folder(self._run.samples):
            number = re.fullmatch(r"(?:round|reverse-process)-(\d+)\.png", name)
            if number is not None and int(number[1]) > last_round:
                with suppress(OSError):
                    (self._run.samples / name).unlink()


def shown_on_terminal(run: RunFolder) -> list[Observer]:
    """What a command shows of a run: its folder's curves and pictures, and its lines."""
    console = Console(run.config)
    return [Curves(run, console.on_notice), console]

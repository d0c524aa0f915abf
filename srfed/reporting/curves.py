"""What a run's folder shows: TensorBoard's curves, and pictures of the samples."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from srfed.files import list_folder
from srfed.observer import Observer
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.console import Console
from srfed.reporting.pictures import Images, draw_grid, read_png, write_png
from srfed.reporting.tensorboard import TensorBoard
from srfed.reporting.values import record_of
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

FILES = {"samples": "round", "reverse_process": "reverse-process"}
"""How the files of an evaluation's pictures begin, by TensorBoard's name."""


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
        self._pictures: dict[str, Images] = {}

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        """Raises UserError where the curves cannot be begun."""
        self._clients = [task.client for task in tasks]
        self._drop_pictures(last_round)
        self._tensorboard = TensorBoard(
            self._run.tensorboard,
            self._run.config,
            last_round,
            self._notice,
            self._earlier(),
        )

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in self._clients:
            self._clients.append(task.client)

    def on_round(self, record: RoundRecord) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_round(record)

    def on_judged(self, record: EvaluationRecord) -> None:
        self._pictures = self._drawn(record)
        for name, picture in self._pictures.items():
            write_png(self._picture(name, record.round), picture)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_evaluation(record, self._pictures)

    def on_end(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _drawn(self, record: EvaluationRecord) -> dict[str, Images]:
        """The pictures of an evaluation by TensorBoard's name; none of one without samples."""
        shown = [client for client in self._clients if client in record.grids]
        if not shown:
            return {}
        groups = {"samples": record.grids, "reverse_process": record.strips}
        return {
            name: draw_grid({client: group[client] for client in shown})
            for name, group in groups.items()
        }

    def _picture(self, name: str, number: int) -> Path:
        """The file of a picture of an evaluation."""
        return self._run.samples / f"{FILES[name]}-{number:05d}.png"

    def _earlier(self) -> Iterator[tuple[RoundRecord | EvaluationRecord, dict[str, Images]]]:
        """What is on record, one of each kind a round, with the pictures that there are."""
        lines = list(MetricsLog(self._run.metrics).lines())
        last = {(line["kind"], line.get("round")): line for line in lines}
        for line in last.values():
            if (record := record_of(line)) is None:
                continue
            pictures = {}
            for name in FILES if isinstance(record, EvaluationRecord) else ():
                # Somebody may have removed it; the curves are whole without.
                with suppress(OSError):
                    pictures[name] = read_png(self._picture(name, record.round))
            yield record, pictures

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

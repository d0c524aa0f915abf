"""The run's curves and pictures for TensorBoard."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.records import EvaluationRecord, RoundRecord
from srfed.reporting.pictures import Images
from srfed.reporting.values import evaluation_values, hyperparameters, round_values

EVENTS = "events.out.tfevents."
"""How the names of its files begin."""


class TensorBoard:
    """Event files of one run. Where they cannot be written any more, that is told once, and the run
    goes on.

    Args:
        folder: where they lie.
        config: shown as text.
        last_round: a resumed run's last finished round.
        notice: told where the files cannot be written.
        earlier: what a resumed run has on record, and the pictures of its evaluations. The files
            are made anew of it, so that there is one value a step whatever ended the run, and when.

    Raises:
        UserError: they cannot even be begun.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        last_round: int,
        notice: Callable[[str], object],
        earlier: Iterable[tuple[RoundRecord | EvaluationRecord, Mapping[str, Images]]] = (),
    ) -> None:
        self._folder, self._notice = folder, notice
        _hush_writing_threads()
        try:
            for file in folder.glob(f"{EVENTS}*"):
                file.unlink()
            self._writer: SummaryWriter | None = SummaryWriter(str(folder))
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        indented = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())
        self._write(lambda writer: writer.add_text("config", indented, last_round))
        self._write(partial(_add_hyperparameters, config=config))
        for record, pictures in earlier:
            if isinstance(record, RoundRecord):
                self.add_round(record)
            else:
                self.add_evaluation(record, pictures)

    def add_round(self, record: RoundRecord) -> None:
        values = round_values(record)
        self._write(partial(_add, values=values, pictures={}, step=record.round))

    def add_evaluation(self, record: EvaluationRecord, pictures: Mapping[str, Images]) -> None:
        values = evaluation_values(record)
        self._write(partial(_add, values=values, pictures=pictures, step=record.round))

    def close(self) -> None:
        self._write(SummaryWriter.close)

    def _write(self, what: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            what(self._writer)
        except OSError as error:
            self._writer = None
            self._notice(
                f"cannot write {self._folder}: {error.strerror or error}; its curves end here, and "
                "the run goes on"
            )


def _hush_writing_threads() -> None:
    """A thread of TensorBoard's that fails is told of by the next call; its traceback says nothing
    more.
    """
    others = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        tensorboards = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (tensorboards and isinstance(arguments.exc_value, OSError)):
            others(arguments)

    if getattr(others, "__module__", "") != __name__:
        threading.excepthook = hook


def _add_hyperparameters(writer: SummaryWriter, config: RunConfig) -> None:
    """A row of the tab HParams, whose numbers are those of the curves that it names."""
    score = {"embedded": "fd_embedded/all", "inception": "fid/all"}[
        config.evaluation.feature_network
    ]
    about, begins, ends = hparams(
        hyperparameters(config), dict.fromkeys(("loss/mean", score), math.nan)
    )
    for summary in (about, begins, ends):
        writer._get_file_writer().add_summary(summary)
    writer.flush()


def _add(
    writer: SummaryWriter, values: Mapping[str, float], pictures: Mapping[str, Images], step: int
) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    for name, picture in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")
    writer.flush()

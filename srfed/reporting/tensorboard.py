"""The run's curves and pictures for TensorBoard."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.records import EvaluationRecord, RoundRecord
from srfed.reporting.pictures import Images


class TensorBoard:
    """Event files of one run. Where they cannot be written any more, that is told once, and the run
    goes on.

    Args:
        folder: where they lie.
        config: shown as text.
        last_round: a resumed run's last finished round; what was shown of later ones disappears.
        notice: told where the files cannot be written.

    Raises:
        UserError: they cannot even be begun.
    """

    def __init__(
        self, folder: Path, config: RunConfig, last_round: int, notice: Callable[[str], object]
    ) -> None:
        self._folder, self._notice = folder, notice
        _hush_writing_threads()
        try:
            self._writer: SummaryWriter | None = SummaryWriter(
                str(folder), purge_step=last_round + 1 if last_round else None
            )
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        indented = "".join(f"    {line}\n" for line in config.to_yaml().splitlines())
        self._write(lambda writer: writer.add_text("config", indented, last_round))

    def add_round(self, record: RoundRecord) -> None:
        values = {
            "loss/mean": record.loss,
            **{f"loss_by_client/{client}": loss for client, loss in record.loss_by_client.items()},
            **{
                f"loss_by_timestep/quarter_{n}": loss
                for n, loss in enumerate(record.loss_by_quarter, 1)
            },
            "speed/images_per_second": record.images_per_second,
            "speed/seconds_per_round": record.seconds,
            "traffic/bytes_up": record.bytes_up,
            "traffic/bytes_down": record.bytes_down,
            "optimisation/learning_rate": record.learning_rate,
            "optimisation/shared_update_norm": record.update_norm,
            "optimisation/client_disagreement": record.disagreement,
            "clients/accepted": len(record.accepted),
            "clients/refused": len(record.refused),
            "clients/missing": len(record.missing),
            **{f"took_part/{client}": 1 for client in record.accepted},
            **{f"took_part/{client}": 0 for client in (*record.refused, *record.missing)},
        }
        if (validation := record.validation) is not None:
            values |= {
                f"validation_by_client/{c}": loss for c, loss in validation.loss_by_client.items()
            }
            if validation.loss is not None:
                values["validation/mean"] = validation.loss
            if validation.result is not None:
                values["validation/best_round"] = validation.result.round
        self._write(partial(_add, values=values, pictures={}, step=record.round))

    def add_evaluation(self, record: EvaluationRecord, pictures: Mapping[str, Images]) -> None:
        values = {
            f"{record.score_name}/all": record.score,
            **{
                f"{record.score_name}_by_client/{c}": score
                for c, score in record.score_by_client.items()
            },
            **{f"ssim_rec/t={timestep}": value for timestep, value in record.ssim.items()},
            **{
                f"ssim_rec_by_client/{client}": value
                for client, value in record.ssim_by_client.items()
            },
            **{
                f"memorisation_pixels/{client}": audit.pixels.share
                for client, audit in record.audits.items()
            },
            **{
                f"memorisation_features/{client}": audit.features.share
                for client, audit in record.audits.items()
            },
            **{
                f"joining_{name}/{client}": getattr(one, name)
                for client, one in record.comparisons.items()
                for name in ("alone", "together", "ratio")
            },
            "traffic/evaluation_bytes_up": record.bytes_up,
            "traffic/evaluation_bytes_down": record.bytes_down,
            "speed/seconds_per_evaluation": record.seconds,
        }
        values |= {f"recognised_by_client/{c}": s for c, s in record.recognised_by_client.items()}
        for name, share in (("all", record.recognised), ("real_images", record.recognised_real)):
            if share is not None:
                values[f"recognised/{name}"] = share
        if record.floor is not None:
            values[f"{record.score_name}/real_images"] = record.floor
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


def _add(
    writer: SummaryWriter, values: Mapping[str, float], pictures: Mapping[str, Images], step: int
) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    for name, picture in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")
    writer.flush()

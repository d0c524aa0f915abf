"""A run's numbers at Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from srfed.config import RunConfig
from srfed.errors import optional
from srfed.reporting.pictures import Images
from srfed.reporting.tracker import Tracker
from srfed.reporting.values import hyperparameters


class WeightsAndBiases(Tracker):
    """An observer that logs every number of a run to Weights & Biases, at the round as step.

    Settings that decide the result, numbers and owners' names go where wandb sends them;
    ``mode="offline"`` keeps them on this machine. It needs the extra ``wandb``.

    Args:
        config: of the run.
        pictures: whether samples go there too.
        settings: what ``wandb.init`` takes: project, entity, mode, dir, id, resume, ....

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, config: RunConfig, *, pictures: bool = False, **settings: Any) -> None:
        super().__init__(pictures=pictures)
        self._wandb = optional("wandb", "srfed.WeightsAndBiases", "wandb")
        self._settings = {"name": config.name, "config": hyperparameters(config), **settings}

    def begin(self, last_round: int) -> None:
        self._run = self._wandb.init(**self._settings)

    def add_numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def add_picture(self, picture: Images, step: int) -> None:
        self._run.log({"samples": self._wandb.Image(picture)}, step=step)

    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)

"""A run's numbers at MLflow."""

import math
import re
import time
from collections.abc import Mapping

from srfed.config import RunConfig
from srfed.errors import optional
from srfed.reporting.pictures import Images
from srfed.reporting.tracker import Tracker
from srfed.reporting.values import hyperparameters

AT_ONCE = 100
"""Most settings, and numbers, in a request, as MLflow's own limits are."""
LONGEST = 500
"""Characters of a setting that every version of MLflow takes."""


class MLflow(Tracker):
    """An observer that logs every number of a run to MLflow, at the round as step.

    Settings that decide the result, numbers and owners' names go to the tracking server. It needs
    the extra ``mlflow``.

    Args:
        config: of the run.
        tracking_uri: where; None takes MLflow's own choice (MLFLOW_TRACKING_URI, or this machine).
        experiment: the experiment's name, which is made where there is none.
        pictures: whether samples go there too.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        tracking_uri: str | None = None,
        experiment: str = "srfed",
        pictures: bool = False,
    ) -> None:
        super().__init__(pictures=pictures)
        self._mlflow = optional("mlflow", "srfed.MLflow", "mlflow")
        self._config, self._uri, self._experiment = config, tracking_uri, experiment

    def begin(self, last_round: int) -> None:
        # A client of its own: mlflow.start_run keeps one run for the whole process.
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment)
            if found is None
            else found.experiment_id
        )
        run = self._client.create_run(experiment, run_name=self._config.name)
        self._id = run.info.run_id
        made = self._mlflow.entities.Param
        settings = [
            made(name, str(value)[:LONGEST])
            for name, value in hyperparameters(self._config).items()
        ]
        for first in range(0, len(settings), AT_ONCE):
            self._client.log_batch(self._id, params=settings[first : first + AT_ONCE])

    def add_numbers(self, values: Mapping[str, float], step: int) -> None:
        now, made = int(1000 * time.time()), self._mlflow.entities.Metric
        numbers = [
            # MLflow's names know no "=".
            made(re.sub(r"[^\w./ -]", "_", name), float(value), now, step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(numbers), AT_ONCE):
            self._client.log_batch(self._id, metrics=numbers[first : first + AT_ONCE])

    def add_picture(self, picture: Images, step: int) -> None:
        self._client.log_image(self._id, picture, f"samples/round-{step:05d}.png")

    def end(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

"""Metrics of one's own: functions of real and generated images, at every evaluation."""

import re
from collections.abc import Callable, Mapping
from typing import SupportsFloat

import numpy as np

from srfed.config import RunConfig
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.records import OwnScore

Metric = Callable[[Images, Images], SupportsFloat]
"""(real, generated) -> a number; each uint8 N x H x W x C. ``real`` are held-out test images."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class OwnMetrics:
    """Metrics by name, called where real and generated images are together: at a simulation's
    server, or where one party has all images.

    Args:
        metrics: by name.
        config: the run's.

    Raises:
        UserError: a name becomes no tag, a value is no function, or the images stay at the sites.
    """

    def __init__(self, metrics: Mapping[str, Metric], config: RunConfig) -> None:
        self._metrics = dict(metrics)
        for name, metric in self._metrics.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UserError(
                    f"metrics has the name {name!r}; allowed: letters, digits, '.', '_' and '-', "
                    "up to 64"
                )
            if not callable(metric):
                raise UserError(
                    f"metrics[{name!r}] is of type {type(metric).__name__}; allowed: a function of "
                    "(real, generated) that returns a number"
                )
        if self._metrics and config.evaluation.mode != "samples":
            raise UserError(
                f"metrics needs generated images where they are scored, and evaluation.mode = "
                f"{config.evaluation.mode} keeps them at the sites; allowed: samples"
            )

    def __call__(
        self, real: Mapping[str, Images], generated: Mapping[str, Images]
    ) -> dict[str, OwnScore]:
        """Each metric of each client's images, and of all together where these are of one shape.

        Args:
            real: held-out images by client.
            generated: of some or all of these clients.

        Raises:
            UserError: a metric fails, or returns no number.
        """
        clients = sorted(generated)
        one_shape = len({generated[client].shape[1:] for client in clients}) == 1
        found = {}
        for name in self._metrics:
            by_client = {c: self._value(name, real[c], generated[c], c) for c in clients}
            everything = None
            if one_shape:
                both = [np.concatenate([side[c] for c in clients]) for side in (real, generated)]
                everything = self._value(name, both[0], both[1], "all owners")
            found[name] = OwnScore(everything, by_client)
        return found

    def _value(self, name: str, real: Images, generated: Images, whose: str) -> float:
        try:
            # Copies: what a metric does to its arrays is not done to the run's.
            return float(self._metrics[name](real.copy(), generated.copy()))
        except Exception as error:
            # It is somebody else's program, and may raise anything.
            raise UserError(
                f"metrics[{name!r}] fails on the images of {whose}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error

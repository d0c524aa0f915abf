"""What joining a federation is worth to its owners: the same images, network, minibatches and
number of steps on four sides.

alone       each owner trains a network of its own
paper       the outermost stage is each owner's own, k = 1
together    everything is shared but each owner's small parts, which learn faster; the server's step
            has momentum
pooled      one party has all images, and the same small parts for each owner

Every network is judged at its own best round by images that are set aside for that, and then once
on the test images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from srfed.config import RunConfig
from srfed.files import exists, read_json
from srfed.studies.cases import Job, change
from srfed.studies.judged import OUTCOME_FILE, Judging

ALONE, PAPER, JOINED, POOLED = SIDES = ("alone", "paper", "together", "pooled")
OWN_RATES: Mapping[str, float] = {ALONE: 1, PAPER: 1, JOINED: 10, POOLED: 10}
"""The rate of θ_i over that of φ, unless somebody says otherwise."""
RATE = 3e-3
SERVER_MOMENTUM = 0.5
"""On the side together: a step of the server goes on into the next rounds, twice as far in all."""
COMMON: Mapping[str, Any] = {
    "data__image_size": 14,
    "data__channels": 1,
    "diffusion__prediction": "velocity",
    "model__channels": (16, 32, 64, 64),
    "training__batch_size": 8,
    "training__local_steps": 16,
    # An owner with 13 images has a whole minibatch and a part of one.
    "training__minibatches": "continued",
    "training__learning_rate": RATE,
    "training__learning_rate_schedule": "linear",
    "training__learning_rate_floor": 0.02,
    "training__shared_moments": "keep",
    "training__ema_decay": 0.98,
    "federation__server_optimizer": "average",
    "evaluation__every": 0,
    "evaluation__ssim_images": 0,
    "evaluation__memorisation_quantile": 0.0,
    "resources__backend": "inline",
    "resources__client_cpus": 1,
    # A third faster with so small images.
    "resources__channels_last": True,
}


@dataclass(frozen=True)
class Cell:
    """One side with one seed.

    Attributes:
        owners: the set's name.
        side: one of SIDES.
        config: what is trained.
        judging: how it is judged.
    """

    owners: str
    side: str
    config: RunConfig
    judging: Judging

    def folder(self, pool: Path) -> Path:
        """Where its run is: of everything that decides which weights are kept."""
        content = f"{self.config.fingerprint()} {self.judging.every}"
        return pool / f"{self.owners}-{self.side}-{sha256(content.encode()).hexdigest()[:12]}"

    def left(self, pool: Path) -> dict[str, Any] | None:
        """What an earlier process has found of this very cell."""
        file = self.folder(pool) / OUTCOME_FILE
        if not exists(file):
            return None
        found = read_json(file, "owners")
        asked = {**asdict(self.judging), "asked_rounds": self.config.federation.rounds}
        return found if all(found.get(key) == value for key, value in asked.items()) else None

    def job(self, pool: Path) -> Job:
        """The process that trains and judges it."""
        folder = self.folder(pool)
        asked = {"config": json.loads(self.config.to_json()), "judging": asdict(self.judging)}
        return Job(
            name=f"{self.owners}, {self.side} (seed {self.config.seed})",
            folder=folder,
            command=["srfed.studies.judged", str(folder)],
            given=json.dumps(asked).encode(),
            threads=self.config.resources.client_cpus,
            left=lambda: self.left(pool),
        )


def side_settings(
    side: str, owners: int, batch_size: int, rate: float, own_rate: float
) -> dict[str, Any]:
    """What a side has over the common settings; ``own_rate`` is θ_i's over φ's ``rate``."""
    small = {"model__exclusive_stages": "none", "model__owned": ("vector", "film")}
    settings: dict[str, dict[str, Any]] = {
        ALONE: {"model__exclusive_stages": "all"},
        PAPER: {"model__exclusive_stages": 1},
        JOINED: {
            **small,
            "federation__server_optimizer": "momentum",
            "federation__server_momentum": SERVER_MOMENTUM,
            # Without them the owners drift apart during a round.
            "training__control_variates": True,
        },
        POOLED: {
            **small,
            "training__method": "balanced",
            "training__centralised_batch_size": owners * batch_size,
            "resources__stack": "auto",
        },
    }
    return {**settings[side], "training__exclusive_learning_rate": rate * own_rate}


def cells(
    owners: str,
    base: RunConfig,
    judging: Mapping[str, int],
    seeds: Sequence[int],
    own_rates: Mapping[str, float],
    sides: Sequence[str] = SIDES,
) -> list[Cell]:
    """Every side with every seed.

    Args:
        owners: the set's name.
        base: the common settings.
        judging: ``every``, ``samples`` and ``test_images`` of :class:`Judging`.
        seeds: which.
        own_rates: by side, the rate of θ_i over that of φ.
        sides: which of SIDES.

    Raises:
        UserError: the settings are impossible.
    """
    training = base.training
    return [
        Cell(
            owners,
            side,
            change(
                base,
                seed=seed,
                **side_settings(
                    side,
                    base.federation.clients,
                    training.batch_size,
                    training.learning_rate,
                    own_rates[side],
                ),
            ),
            Judging(apart=side == ALONE, **judging),
        )
        for seed in seeds
        for side in sides
    ]


def alone_with(counts: Sequence[int], base: RunConfig, asked: Sequence[Cell]) -> list[Cell]:
    """Owners alone as in ``asked``, but with other numbers of training images.

    Raises:
        UserError: the settings are impossible.
    """
    held_out = base.data.validation_images
    return [
        replace(cell, config=change(cell.config, data__images_per_task=count + held_out))
        for cell in asked
        if cell.side == ALONE
        for count in counts
    ]

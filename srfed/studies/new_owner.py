"""What an owner gains that comes when a federation is trained: φ stays as it is, and θ_new is
fitted to a few images of an owner that nobody has seen.

together    φ of a federation that shares everything but each owner's small parts
paper       φ of one with k = 1, so that θ_new is the outermost stage
pooled      φ of one party that has had all images, with the same small parts for each owner
scratch     no φ: the same network from its initialisation, all of it trained on the new owner alone

Every core is that of its own best round, and every adaptation that of its own best step, by images
that are set aside for that; the test images are looked at once, when both have been chosen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from srfed.config import RunConfig
from srfed.data import load_task
from srfed.files import exists, read_json
from srfed.studies import joining
from srfed.studies.cases import Job
from srfed.studies.joining import JOINED, OWN_RATES, PAPER, POOLED
from srfed.training.adaptation import Mode

SCRATCH = "scratch"
CORES = (JOINED, PAPER, POOLED)
SIDES = (*CORES, SCRATCH)
NICENESS = 10
"""Of each process: a study takes hours."""
ADAPTED_FILE, SAMPLES_FILE = "adapted.json", "adapted.safetensors"


class Plan(NamedTuple):
    """How a set of owners is divided.

    Attributes:
        known: how many owners train, the first.
        new: how many come later, the next.
        images: numbers of training images of a new owner.
    """

    known: int
    new: int
    images: tuple[int, ...]


FEW = (5, 10, 20, 50)
PLANS: Mapping[str, Plan] = {
    # A character has 16 drawings beside those to test on, and 3 choose the step.
    "characters": Plan(12, 3, (5, 10, 13)),
    "alphabets": Plan(6, 2, FEW),
    "mnist": Plan(8, 2, FEW),
    "fashion_mnist": Plan(8, 2, FEW),
    "blood_cells": Plan(2, 1, FEW),
    # After three owners of each kind, one of each; of the rarest there are 32 images an owner.
    "blood_labs": Plan(9, 3, (5, 10, 20)),
    "digits": Plan(8, 2, FEW),
}


@dataclass(frozen=True)
class Adapting:
    """How a new owner is fitted and judged.

    Attributes:
        images: training images, the first of those that the most have.
        steps: local steps in all.
        between: local steps from one look at the validation images to the next.
        patience: it ends where no step has been better for as many steps; 0: never.
        samples: generated images, at least 2.
        test_images: test images, the first, at least 2; fewer where there are no more.
    """

    images: int
    steps: int
    between: int
    patience: int
    samples: int
    test_images: int


@dataclass(frozen=True)
class NewOwnerCell:
    """One new owner with so many images, on one side, with one seed.

    Attributes:
        core: the run whose φ is taken; of scratch, the one whose network and rate are.
        side: one of SIDES.
        everybody: the settings of all owners' images, those that trained and the new ones.
        owner: the new owner's position among them.
        name: its name.
        adapting: how it is fitted and judged.
    """

    core: joining.Cell
    side: str
    everybody: RunConfig
    owner: int
    name: str
    adapting: Adapting

    @property
    def mode(self) -> Mode:
        """What moves."""
        return "scratch" if self.side == SCRATCH else "frozen"

    def identity(self, pool: Path) -> dict[str, Any]:
        """All that decides what is found."""
        return {
            "core": self.core.folder(pool).name,
            "core_rounds": self.core.config.federation.rounds,
            "core_patience": self.core.judging.patience,
            "everybody": self.everybody.fingerprint(),
            "side": self.side,
            "name": self.name,
            **asdict(self.adapting),
        }

    def folder(self, pool: Path) -> Path:
        """Where what is found is kept."""
        content = json.dumps(self.identity(pool), sort_keys=True)
        digits = sha256(content.encode()).hexdigest()[:12]
        return pool / "new-owners" / f"{self.name}-{self.adapting.images}-{self.side}-{digits}"

    def left(self, pool: Path) -> dict[str, Any] | None:
        """What an earlier process has found of this very cell."""
        file = self.folder(pool) / ADAPTED_FILE
        return read_json(file, "losses") if exists(file) else None

    def job(self, pool: Path) -> Job:
        """The process that fits and judges it, when the core's has ended."""
        folder, config = self.folder(pool), self.core.config
        asked = {
            "config": json.loads(config.to_json()),
            "core": None if self.mode == "scratch" else str(self.core.folder(pool)),
            "everybody": json.loads(self.everybody.to_json()),
            "owner": self.owner,
            "mode": self.mode,
            "adapting": asdict(self.adapting),
            "identity": self.identity(pool),
        }
        return Job(
            name=f"{self.name}, {self.adapting.images} images, {self.side} (seed {config.seed})",
            folder=folder,
            command=["srfed.studies.adapted", str(folder)],
            given=json.dumps(asked).encode(),
            threads=config.resources.client_cpus,
            left=lambda: self.left(pool),
            niceness=NICENESS,
        )


def core_jobs(cores: Sequence[joining.Cell], pool: Path) -> list[Job]:
    """The processes that train the cores and find their best rounds."""
    return [replace(core.job(pool), niceness=NICENESS) for core in cores]


def cores(
    owners: str, base: RunConfig, judging: Mapping[str, int], seeds: Sequence[int]
) -> list[joining.Cell]:
    """Every core with every seed: cells of the study of joining, whose runs are the same.

    Args:
        owners: the set's name.
        base: the common settings of the owners that train.
        judging: ``every``, ``samples``, ``test_images`` and ``patience`` of
            :class:`~srfed.studies.judged.Judging`.
        seeds: which.

    Raises:
        UserError: the settings are impossible.
    """
    return joining.cells(owners, base, judging, seeds, OWN_RATES, CORES)


def new_owner_cells(
    trained: Sequence[joining.Cell],
    everybody: RunConfig,
    known: int,
    images: Sequence[int],
    adapting: Mapping[str, int],
) -> list[NewOwnerCell]:
    """Every new owner with every number of images, on every side, with every seed.

    Args:
        trained: the cores.
        everybody: the settings of all owners' images.
        known: how many of them have trained; the others are new.
        images: numbers of training images.
        adapting: the rest of :class:`Adapting`.

    Raises:
        UserError: the images cannot be read, or are too few.
    """
    places = range(known, everybody.federation.clients)
    names = {place: load_task(everybody.data, place).name for place in places}
    # The network of k = 1 has what all sides have, and no small parts beside.
    sides = [(core, core.side) for core in trained]
    sides += [(core, SCRATCH) for core in trained if core.side == PAPER]
    return [
        NewOwnerCell(core, side, everybody, place, name, Adapting(images=count, **adapting))
        for place, name in names.items()
        for count in images
        for core, side in sides
    ]

"""A new run that starts from a trained run's φ, with owners of its own and fresh θ_i."""

import json
from collections.abc import Sequence
from pathlib import Path

from srfed.config import RunConfig
from srfed.data import Task
from srfed.errors import UserError
from srfed.flat import copies
from srfed.model import shared_of
from srfed.networks.partition import Partition, Shared
from srfed.runs.run import TrainedRun
from srfed.storage.run_folder import RunFolder
from srfed.storage.start import Origin, load_start, shared_digest

SECTIONS = ("model", "diffusion")
"""What says which φ it is, and what it has learned to predict."""
FREE = ("model.dropout",)
"""Settings of these that may differ all the same."""


def start_of(source: Path, config: RunConfig, tasks: Sequence[Task]) -> tuple[Origin, Shared]:
    """The averaged φ of a trained run (of its best round, where that is its result), for a new one.

    Args:
        source: the trained run's folder.
        config: of the new run.
        tasks: the new run's.

    Raises:
        UserError: there is no such run, it has no checkpoint, or its φ is another than the new run
            asks for; the text names the setting.
    """
    trained_by = RunFolder.open(source)
    _check_settings(source, trained_by.config, config)
    trained = TrainedRun(source, config.resources)
    _, wanted = shared_of(config, sorted({task.shape[-1] for task in tasks}))
    shared = trained.shared
    for name in dict.fromkeys([*wanted, *shared]):
        found, asked = (
            tuple(each[name].shape) if name in each else None for each in (shared, wanted)
        )
        if found != asked:
            raise UserError(
                f"{source} cannot be started from: {name} of its φ is {found}, and {asked} here; "
                "what meets the images, or numbers the tasks, is shared, so allowed: data.channels "
                "and federation.clients as there"
            )
    kept = Shared(copies(shared))
    origin = Origin(trained_by.path.name, trained_by.lineage, trained.round, shared_digest(kept))
    return origin, kept


def started(run: RunFolder, partition: Partition, shared: Shared) -> Shared:
    """The φ of a run's round 0: what it starts from, else its own initial values ``shared``.

    Raises:
        UserError: what it starts from is damaged or cannot be read.
    """
    found = load_start(run.path)
    return shared if found is None else partition.take_shared(found)


def _check_settings(source: Path, there: RunConfig, here: RunConfig) -> None:
    """Raise UserError where the settings make another φ, or one that predicts something else."""
    theirs, ours = there.decisive_settings(), here.decisive_settings()
    for name in {**theirs, **ours}:
        if name.split(".")[0] not in SECTIONS or name in FREE:
            continue
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{source} cannot be started from: {name} is {json.dumps(theirs.get(name))} there "
                f"and {json.dumps(ours.get(name))} here; allowed: the same"
            )

"""What is done on a node of a Ray cluster: a client's process, what the node must be like to work
for a run, and what of its GPU a client takes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srfed import __version__
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.records import Place
from srfed.work import COUNTS_VARIABLE

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

SHARED = "; a cluster's nodes need the run's folder under the same path (--run-dir)"


@dataclass(frozen=True)
class Wanted:
    """What every node is asked for.

    Attributes:
        version: of srfed.
        folder: the run's; its stores are read and written on every node.
        lineage: the run's, by which a node shows that it sees the same folder.
        images: the data set's folder or file; empty where there is none to read.
    """

    version: str
    folder: str
    lineage: str
    images: str


def unfit(wanted: Wanted) -> str:
    """Why this machine cannot work for the run, in a sentence; empty where it can."""
    if __version__ != wanted.version:
        return f"it has srfed {__version__}, and the run needs {wanted.version}"
    folder = Path(wanted.folder)
    try:
        lineage = json.loads((folder / "run.json").read_bytes())["lineage"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it cannot read {folder}{SHARED}"
    if lineage != wanted.lineage:
        return f"its {folder} holds another run{SHARED}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"it cannot write {folder}{SHARED}"
    if wanted.images and not os.access(wanted.images, os.R_OK):
        return f"it cannot read data.dir = {wanted.images}"
    return ""


@dataclass(frozen=True)
class Seen:
    """What a client's process finds on a GPU.

    Attributes:
        place: where it trains.
        fit: processes that a GPU has memory for; None where nobody has looked.
    """

    place: Place
    fit: int | None = None


def look_at_gpu(config: RunConfig, *, measure: bool) -> Seen | str:
    """Where a client's process trains; under ``measure`` also how many of them a GPU has memory
    for, from one step of the run's own. In words why it cannot train there at all.
    """
    from srfed.device import place_of, resolve_device
    from srfed.federation.measured import processes_that_fit

    try:
        device = resolve_device(config.resources)
        place = place_of(config.resources, device)
        found = measure and device.type == "cuda"
        return Seen(place, processes_that_fit(config, device) if found else None)
    except UserError as error:
        return str(error)


class ClientProcess:
    """A process in which clients answer, one after the other.

    Flower's own, ``ClientAppActor``, does the same; to import it takes 1.4 seconds, the databases
    and the command line of ``flwr.simulation`` with it, here and in every such process.

    Args:
        wanted: of a cluster's node, which may have joined since the run began; None on the run's
            own machine.
        counts: the folder of the run's counts of work; empty where there is none.

    Raises:
        RuntimeError: the node is not fit.
    """

    def __init__(self, wanted: Wanted | None, counts: str) -> None:
        if wanted is not None and (reason := unfit(wanted)):
            raise RuntimeError(reason)
        os.environ[COUNTS_VARIABLE] = counts
        # What it will need, while the server is still getting ready.
        import srfed.federation.flower.client_app  # noqa: F401

    def answer(
        self, app: "ClientApp", message: "Message", context: "Context"
    ) -> "tuple[Message, Context]":
        """The client's reply, and its context, which the app may have changed."""
        return app(message, context), context

"""The server's state between rounds, and its checkpoints: `<run>/server/round-00012/`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from srfed.errors import DamagedError, UserError
from srfed.networks.partition import Shared
from srfed.records import Shape
from srfed.storage.checkpoint import (
    Checkpoint,
    check_tensors,
    find_checkpoints,
    image_shape,
    read_checkpoint,
    remove_checkpoint,
    remove_remains,
    write_checkpoint,
)
from srfed.storage.client_store import NO_PARENT
from srfed.storage.manifest import read_manifest
from srfed.training.part import Part

_GROUPS = ("shared", "shared_average", "optimizer", "shared_moments", "control")
_KINDS = {
    "lineage": str,
    "round": int,
    "shared_steps": int,
    "attempts": dict,
    "clients": list,
}


@dataclass(frozen=True)
class KnownClient:
    """What a run holds a client to, from its first description on, whoever comes under its id
    later.

    Attributes:
        images: m_i.
        test_images: its held-out images.
        key: fingerprint of the SuperNode key that the id belongs to; empty where nodes have no keys
            of their own.
        name: under which that key was registered; may be empty.
        node: where the client was last.
    """

    images: int
    test_images: int
    key: str = ""
    name: str = ""
    node: int = 0


@dataclass(frozen=True)
class BestRound:
    """The best round so far by validation images; its weights are in its own checkpoint.

    Attributes:
        round: its number.
        loss: mean over the clients.
        losses: by client.
        attempts: the accepted attempts after it, which the clients keep.
    """

    round: int
    loss: float
    losses: dict[str, float]
    attempts: dict[str, str]


@dataclass(frozen=True)
class RunState:
    """All that the next round depends on.

    Attributes:
        lineage: the run with all its resumptions.
        round: the last finished round; 0 before the first.
        shared: φ; Adam's moments of it where one party trains it, and its steps are local ones, the
            place in the average's warm-up.
        optimizer: the server optimizer's state.
        attempts: the accepted attempt of each client that ever had one.
        shapes: H, W, C of each client's images.
        clients: ids of all clients that have taken part.
        known: what each of them is held to; those of a checkpoint of an earlier version are learned
            anew.
        minibatches: how many of them are behind each client's accepted attempt.
        control: c of control variates, float64; empty before the first round and without them.
        validation: the last validation loss that each client has told.
        best: the best round by these; None before one was found.
    """

    lineage: str
    round: int
    shared: Part[Shared]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    attempts: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    clients: tuple[str, ...] = ()
    known: dict[str, KnownClient] = field(default_factory=dict)
    minibatches: dict[str, int] = field(default_factory=dict)
    control: dict[str, Tensor] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    best: BestRound | None = None

    def parent(self, client: str) -> str:
        """The attempt that a client is to start from."""
        return self.attempts.get(client, NO_PARENT)


class ServerCheckpoints:
    """The checkpoints of one run, the last ``keep`` of them, and that of the best round.

    Args:
        folder: where they lie, one folder a round.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, state: RunState) -> None:
        """Write a checkpoint durably, then drop the oldest; raises UserError where it cannot."""
        manifest = {
            "lineage": state.lineage,
            "round": state.round,
            "shared_steps": state.shared.steps,
            "attempts": state.attempts,
            "shapes": {client: list(shape) for client, shape in state.shapes.items()},
            "clients": list(state.clients),
            "known": {client: asdict(known) for client, known in state.known.items()},
            "minibatches": state.minibatches,
            "validation": state.validation,
            "best": None if state.best is None else asdict(state.best),
        }
        shared = state.shared
        groups: dict[str, dict[str, Tensor]] = dict(
            zip(
                _GROUPS,
                (
                    shared.weights,
                    shared.average,
                    state.optimizer,
                    shared.moments,
                    state.control,
                ),
                strict=True,
            )
        )
        write_checkpoint(self._path(state.round), Checkpoint(groups, manifest))
        rounds = self.rounds()
        # Later checkpoints than the oldest name the same best round, or one of those that are kept.
        oldest = self._best_round(rounds[-self._keep :][0])
        for number in rounds[: -self._keep]:
            if number != oldest:
                remove_checkpoint(self._path(number))
        remove_remains(self.folder)

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, in order; raises UserError where the folder cannot be
        read.
        """
        names = (
            name.removeprefix("round-")
            for name in find_checkpoints(self.folder)
            if name.startswith("round-")
        )
        return sorted(int(name) for name in names if name.isdecimal())

    def load_last(self) -> RunState:
        """The last checkpoint.

        Raises:
            DamagedError: it is damaged; the text says how to go back one round.
            UserError: there is none, it cannot be read, or it is of another srfed.
        """
        rounds = self.rounds()
        if not rounds:
            raise UserError(
                f"{self.folder} has no checkpoint: the run stopped before its first round ended"
            )
        advice = (
            f"remove {self._path(rounds[-1])} to go back to round {rounds[-2]}"
            if len(rounds) > 1
            else "it is the only one"
        )
        return self._load(rounds[-1], advice)

    def load(self, number: int) -> RunState:
        """The checkpoint after a round; raises as :meth:`load_last`."""
        rounds = self.rounds()
        if number not in rounds:
            raise UserError(
                f"{self.folder} has no checkpoint of round {number}; allowed: "
                f"{', '.join(map(str, rounds)) or 'none'}"
            )
        return self._load(number, "another round may be whole")

    def load_best(self, last: RunState) -> RunState:
        """The state after the best round that a state knows of; the same state where it knows of
        none, or the checkpoint of that was removed.

        Raises:
            DamagedError: its checkpoint is damaged; the text says how to go on.
            UserError: it cannot be read, or is of another srfed.
        """
        best = last.best
        if best is None or best.round == last.round or best.round not in self.rounds():
            return last
        path = self._path(best.round)
        return self._load(best.round, f"remove {path} to have the last round in its place")

    def _load(self, number: int, advice: str) -> RunState:
        path = self._path(number)
        try:
            checkpoint = read_checkpoint(path, _KINDS)
            shapes = _shapes(path, checkpoint.manifest)
        except DamagedError as error:
            raise DamagedError(f"{error}; {advice}") from error
        manifest = checkpoint.manifest
        best = manifest.get("best")
        try:
            known = {
                client: KnownClient(**entry) for client, entry in manifest.get("known", {}).items()
            }
            best = None if best is None else BestRound(**best)
        except (AttributeError, TypeError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
        return RunState(
            shared=Part(
                Shared(checkpoint.group("shared")),
                Shared(checkpoint.group("shared_average")),
                checkpoint.group("shared_moments"),
                manifest["shared_steps"],
            ),
            optimizer=checkpoint.group("optimizer"),
            lineage=manifest["lineage"],
            round=manifest["round"],
            attempts=manifest["attempts"],
            shapes=shapes,
            clients=tuple(manifest["clients"]),
            known=known,
            minibatches=manifest.get("minibatches", {}),
            control=checkpoint.group("control"),
            validation=manifest.get("validation", {}),
            best=best,
        )

    def check(self, state: RunState, shared: Mapping[str, Tensor]) -> None:
        """Raise UserError unless a state's φ, its average, and c if there is one, have the names
        and shapes of the model's ``shared``.
        """
        control = [state.control] if state.control else []
        for tensors in (state.shared.weights, state.shared.average, *control):
            check_tensors(str(self._path(state.round)), tensors, shared)

    def _best_round(self, number: int) -> int | None:
        """The best round as a checkpoint's manifest has it; None where it has none or cannot be
        read, when nobody can go back to it.
        """
        try:
            best = read_manifest(self._path(number)).get("best")
        except UserError:
            return None
        return best.get("round") if isinstance(best, dict) else None

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}"


def _shapes(path: Path, manifest: Mapping[str, Any]) -> dict[str, Shape]:
    """Each client's image shape; a checkpoint of an earlier version has one for all of them."""
    if "shapes" not in manifest:
        shape = image_shape(path, manifest.get("shape"))
        return dict.fromkeys(manifest["clients"], shape)
    if not isinstance(manifest["shapes"], dict):
        raise DamagedError(f"{path} is damaged: 'shapes' is {manifest['shapes']!r}")
    return {client: image_shape(path, shape) for client, shape in manifest["shapes"].items()}

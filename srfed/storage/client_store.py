"""A client's durable state: one folder an attempt, written whole or not at all.

    <state-dir>/<client>/lineages/<lineage>/<attempt>/state.safetensors

The server names the attempt to start from, so a lost reply, a retry or a crash leaves at most an
attempt that nobody refers to; it can never pair θ_i with the φ of another round.

What an attempt removes is decided by descent alone: nothing goes but what it descends from itself,
and what branched off from that. So no message, whatever round it claims, empties a store.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from srfed.errors import DamagedError, UserError
from srfed.files import exists, held, list_folder, make_folder, remove_temporary_files
from srfed.networks.partition import Exclusive
from srfed.storage.checkpoint import (
    Checkpoint,
    find_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    remove_remains,
    write_checkpoint,
)
from srfed.storage.manifest import read_manifest
from srfed.training.part import ClientState, Part
from srfed.units import bytes_in_words

NO_PARENT = "none"
LINEAGES = "lineages"
LONGEST_NAME = 100
PLAIN_NAME = re.compile(rf"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
"""What a client, a lineage or an attempt may be called: it becomes a folder's name."""
MOST_ROUNDS = 1_000_000
_GROUPS = ("exclusive", "exclusive_average", "exclusive_moments", "shared_moments")
_MEMORY = "memory"
"""Its tensors are named "<whose>:<tensor>"; stores of earlier versions have none."""
_KINDS = {"parent": str, "round": int, "steps": int, "exclusive_steps": int}
_UNVERSIONED_LINEAGE = re.compile(r"[0-9a-f]{12}")
"""Lineages of stores from before formats had versions; they lay beside ``models`` and ``samples``.
"""


@dataclass(frozen=True)
class StoreBounds:
    """How much one client's store may hold; what would exceed it is refused.

    Attributes:
        lineages: runs.
        bytes: of all attempts of all runs.
        attempts: of one run; those of an honest one go with its rounds. Of those that nobody ever
            went on with, as a site's whose answers come too late, half as many stay.
    """

    lineages: int = 64
    bytes: int = 64 * 2**30
    attempts: int = 256


class AskedError(UserError):
    """A question whose answer would not stand under its name alone."""


class ClientStore:
    """The attempts of one client in one lineage.

    Args:
        state_dir: the client's own folder for all its state.
        client: its id.
        lineage: the run with all its resumptions.
        keep: rounds whose attempts stay when a later one is stored.
        bounds: of the store with all its lineages.

    Raises:
        UserError: an id that is no plain file name.
    """

    def __init__(
        self,
        state_dir: Path,
        client: str,
        lineage: str,
        keep: int,
        bounds: StoreBounds | None = None,
    ) -> None:
        for name in (client, lineage):
            check_name(name)
        self._client = state_dir / client
        self.folder = self._client / LINEAGES / lineage
        self._keep = keep
        self._bounds = bounds or StoreBounds()

    def has(self, attempt: str) -> bool:
        """Whether there is an attempt of this name, sound or not."""
        return attempt in find_checkpoints(self._present)

    def load(self, attempt: str) -> ClientState:
        """The state that an attempt left; raises UserError where it is missing or damaged."""
        check_name(attempt)
        checkpoint = read_checkpoint(self._present / attempt, _KINDS)
        manifest = checkpoint.manifest
        return ClientState(
            exclusive=Part(
                Exclusive(checkpoint.group("exclusive")),
                Exclusive(checkpoint.group("exclusive_average")),
                checkpoint.group("exclusive_moments"),
                manifest["exclusive_steps"],
            ),
            shared_moments=checkpoint.group("shared_moments"),
            minibatches=manifest["steps"],
            memory=_by_step(checkpoint.group(_MEMORY)),
        )

    def check_descent(self, parent: str, round_number: int, *, training: bool) -> None:
        """Compare a round with that of the attempt that it starts from.

        Args:
            parent: the attempt's name, or "none".
            round_number: the round.
            training: it must be later than the parent's; an evaluation's may be the same.

        Raises:
            UserError: it is not, or is no round at all; the parent is missing or damaged.
        """
        least = 1 if training else 0
        if parent != NO_PARENT:
            check_name(parent)
            least += int(read_manifest(self._present / parent, _KINDS)["round"])
        if not least <= round_number <= MOST_ROUNDS:
            what = "training" if training else "evaluation"
            raise UserError(
                f"{what} round {round_number} is impossible after attempt {parent!r}; allowed: "
                f"{least} to {MOST_ROUNDS}"
            )

    def line(self, attempt: str) -> str:
        """The first attempt of an attempt's line of descent, as far as the store knows it; "none"
        for none.
        """
        if attempt == NO_PARENT:
            return NO_PARENT
        check_name(attempt)
        return str(read_manifest(self._present / attempt, _KINDS).get("line", attempt))

    def check_question(self, attempt: str, parent: str, round_number: int, question: str) -> None:
        """Find out before any work whether the answer to a question could be stored.

        Args:
            attempt, parent, round_number, question: as of :meth:`save`.

        Raises:
            AskedError: the same question was answered under another name, or another one under
                this name.
            UserError: there is no room.
        """
        manifests = self._manifests(self._present)
        mine = manifests.get(attempt)
        if mine is not None and mine.get("question", question) != question:
            raise AskedError("another question was answered under this attempt's name")
        if mine is not None:
            return
        told = {
            str(manifest["question"]): name
            for name, manifest in manifests.items()
            if "question" in manifest
            and (manifest["parent"], manifest["round"]) == (parent, round_number)
        }
        if question in told:
            raise AskedError(f"the same was asked before, as attempt {told[question]}")
        unused = self._never_gone_on_with(manifests, parent, round_number)
        if len(manifests) - len(unused) >= self._bounds.attempts:
            raise UserError(
                f"{self.folder} holds {len(manifests)} attempts, and {self._bounds.attempts} are "
                "the most: remove those that the run does not need"
            )
        check_bounds(self.folder.parent, self.folder.name, 0, self._bounds)

    def save(
        self,
        attempt: str,
        parent: str,
        round_number: int,
        state: ClientState,
        *,
        best: str = NO_PARENT,
        question: str = "",
    ) -> None:
        """Store an attempt durably, then drop those of its ancestors that no kept round refers to.

        Args:
            attempt, parent: names of the new one, and of that which it started from.
            round_number: its round.
            state: what it has left.
            best: the attempt of the run's best round so far, or "none".
            question: what else decided it; where there is a sound attempt of this name that
                answered the same, all stays as it is. Empty where that is not known.

        Raises:
            UserError: it cannot be written, would exceed the store's bounds, or is no later than
                its parent; the store is as it was.
        """
        for name in (attempt, best):
            check_name(name)
        own = state.exclusive
        groups: dict[str, dict[str, Tensor]] = dict(
            zip(
                _GROUPS,
                (own.weights, own.average, own.moments, state.shared_moments),
                strict=True,
            )
        )
        groups[_MEMORY] = {
            f"{step}:{name}": tensor
            for step, tensors in state.memory.items()
            for name, tensor in tensors.items()
        }
        size = sum(tensor.nbytes for members in groups.values() for tensor in members.values())
        # A process that outlives its SuperNode for a moment must not have its half-written folder
        # pruned.
        with held(self._client / "lock", wait=True):
            self._adopt()
            known = set(find_checkpoints(self.folder))
            if question and attempt in known:
                if self._answered(attempt, question):
                    return
                remove_checkpoint(self.folder / attempt)
            # A process that was slow may save when its parent has been dropped already.
            self.check_descent(
                parent if parent in known else NO_PARENT, round_number, training=True
            )
            check_bounds(self.folder.parent, self.folder.name, size, self._bounds)
            manifest = {
                "attempt": attempt,
                "parent": parent,
                "best": best,
                "line": self.line(parent) if parent in known else attempt,
                "round": round_number,
                "steps": state.minibatches,
                "exclusive_steps": own.steps,
                **({"question": question} if question else {}),
            }
            remove_remains(self.folder)
            # What an owner's own commands write has no lock, and is not ours to look at.
            remove_temporary_files(self._client, r"(?!agreement|images).*")
            for pictures in ("samples", "memorisation"):
                remove_temporary_files(self._client / pictures)
            write_checkpoint(self.folder / attempt, Checkpoint(groups, manifest))
            manifests = self._manifests(self.folder)
            for name in {
                *_dispensable(manifests, attempt, round_number - self._keep),
                *self._never_gone_on_with(manifests, parent, round_number, best),
            }:
                remove_checkpoint(self.folder / name)

    def _never_gone_on_with(
        self,
        manifests: dict[str, dict[str, Any]],
        parent: str,
        round_number: int,
        best: str = NO_PARENT,
    ) -> list[str]:
        """The attempts that go so that a store which is full has room, the earliest first; none
        where it is not.

        A server that starts a round from ``parent`` has accepted none of an earlier round that
        started there too, unless it went back: of those from which nothing descends the latest
        stay, half of what the store may hold. So a client whose answers come too late, in any
        number of rounds, is not refused for them; and an attempt that was accepted does not go for
        fewer messages than that.
        """
        if len(manifests) < self._bounds.attempts:
            return []
        named = {best}
        for manifest in manifests.values():
            named |= {str(manifest["parent"]), str(manifest.get("best", NO_PARENT))}
        unused = sorted(
            (_round(manifests, name), name)
            for name, manifest in manifests.items()
            if manifest["parent"] == parent
            and name not in named
            and _round(manifests, name) < round_number
        )
        return [name for _, name in unused[: max(0, len(unused) - self._bounds.attempts // 2)]]

    @property
    def _present(self) -> Path:
        """Where the lineage lies: in its place, or where it was before formats had versions."""
        old = self._client / self.folder.name
        if not exists(self.folder) and _UNVERSIONED_LINEAGE.fullmatch(old.name) and old.is_dir():
            return old
        return self.folder

    def _adopt(self) -> None:
        """Move a lineage of before to its place."""
        found = self._present
        if found != self.folder:
            try:
                make_folder(self.folder.parent)
                os.rename(found, self.folder)
            except OSError as error:
                raise UserError(
                    f"cannot move {found} to {self.folder}: {error.strerror or error}"
                ) from error

    def _answered(self, attempt: str, question: str) -> bool:
        """Whether an attempt is sound, and answers this question; a damaged one does not."""
        try:
            manifest = read_checkpoint(self.folder / attempt, _KINDS).manifest
        except DamagedError:
            return False
        if manifest.get("question") != question:
            raise UserError(f"{self.folder / attempt} answers another question")
        return True

    def _manifests(self, folder: Path) -> dict[str, dict[str, Any]]:
        """By attempt. One that cannot be read or is damaged is left out, and so stays."""
        manifests = {}
        for name in find_checkpoints(folder):
            try:
                manifests[name] = read_manifest(folder / name, _KINDS)
            except UserError:
                continue
        return manifests


def check_bounds(folder: Path, name: str, size: int, bounds: StoreBounds) -> None:
    """Raise UserError where a store has no room for one more thing; the text says what to remove.

    Args:
        folder: the store, with one folder for each run.
        name: the run that wants room.
        size: how much, bytes.
        bounds: of the whole.
    """
    others = [found for found in list_folder(folder) if found != name]
    advice = f"remove folders of runs that are over from {folder}"
    if len(others) >= bounds.lineages:
        raise UserError(
            f"{folder} holds {len(others)} runs, and {bounds.lineages} are the most: {advice}"
        )
    used = sum(_sizes(folder))
    if used + size > bounds.bytes:
        raise UserError(
            f"{folder} holds {bytes_in_words(used)}; {bytes_in_words(size)} more exceed the "
            f"{bytes_in_words(bounds.bytes)} that are the most: {advice}"
        )


def check_name(name: str) -> None:
    """Raise UserError for a name of a client, lineage or attempt that is no plain file name."""
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(
            f"{name[: LONGEST_NAME + 1]!a} is no name for a store; allowed: letters, digits, and . "
            f"_ - inside, no '..', at most {LONGEST_NAME} characters"
        )


def _dispensable(manifests: dict[str, dict[str, Any]], newest: str, horizon: int) -> list[str]:
    """The attempts that no checkpoint of the server refers to any more, now that there is
    ``newest``.

    The server may go back to any of its last rounds, that is, to any ancestor of ``newest`` after
    the horizon, or to the last at or before it: the anchor. The anchor's ancestors go, with all
    that branched off from them. Of those that have no parent only such go as nothing descends from:
    the beginning of another line is not ours to judge.

    What the anchor names as the best stays too, and nothing else does: an attempt after it names
    the same one, or one of those that are kept anyway. Around it there are gaps, so of the same
    line all that is earlier than the anchor goes, which once descended from what has gone.

    Args:
        manifests: of all attempts.
        newest: the attempt just stored.
        horizon: the last round that is no longer kept.
    """
    ancestors = list(_ancestors(manifests, newest))
    anchor = next(
        (place for place, name in enumerate(ancestors) if _round(manifests, name) <= horizon), None
    )
    if anchor is None:
        return []
    children: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        children.setdefault(str(manifest["parent"]), []).append(name)
    oldest = manifests[ancestors[anchor]]
    kept, gone = {*ancestors[: anchor + 1], str(oldest.get("best", NO_PARENT))}, set()
    first = str(manifests[ancestors[-1]]["parent"])
    waiting = [*ancestors[anchor + 1 :], *(children[first] if first != NO_PARENT else [])]
    waiting += [
        name for name in children.get(NO_PARENT, []) if first == NO_PARENT and name not in children
    ]
    waiting += [
        name
        for name, manifest in manifests.items()
        if manifest.get("line", name) == oldest.get("line")
        and _round(manifests, name) < _round(manifests, ancestors[anchor])
    ]
    while waiting:
        name = waiting.pop()
        if name not in kept and name not in gone:
            gone.add(name)
            waiting += children.get(name, [])
    return sorted(gone)


def _ancestors(manifests: dict[str, dict[str, Any]], newest: str) -> Iterator[str]:
    """An attempt and its ancestors, as far as they are known and each is earlier than the one that
    it led to.
    """
    name, number = newest, MOST_ROUNDS + 1
    while name in manifests and _round(manifests, name) < number:
        yield name
        number = _round(manifests, name)
        name = str(manifests[name]["parent"])


def _by_step(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    memory: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        # What a step of one's own is called has a colon, and no tensor's name has.
        step, _, member = name.rpartition(":")
        memory.setdefault(step, {})[member] = tensor
    return memory


def _round(manifests: dict[str, dict[str, Any]], name: str) -> int:
    return int(manifests[name]["round"])


def _sizes(folder: Path) -> Iterator[int]:
    """The sizes of all files below a folder; what goes meanwhile has none."""
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue

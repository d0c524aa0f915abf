"""A client's durable state: one folder an attempt, written whole or not at all.

    <state-dir>/<client>/<lineage>/<attempt>/state.safetensors, manifest.json

The server names the attempt to start from, so a lost reply, a retry or a crash leaves at most an
attempt that nobody refers to; it can never pair θ_i with the φ of another round.
"""

import re
import shutil
from pathlib import Path

from srfed.errors import UserError
from srfed.files import held
from srfed.tensors import Checkpoint, read_checkpoint, read_manifest, remove_checkpoint, write_checkpoint
from srfed.training.local import ClientState

NO_PARENT = "none"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a client, a lineage or an attempt may be called: it becomes a folder's name."""
_GROUPS = ("exclusive", "exclusive_average", "exclusive_moments", "shared_moments")


class ClientStore:
    """The attempts of one client in one lineage.

    Args:
        state_dir: the client's own folder for all its state.
        client: its id.
        lineage: the run with all its resumptions.
        keep: rounds whose attempts stay when a later one is stored.

    Raises:
        UserError: an id that is no plain file name.
    """

    def __init__(self, state_dir: Path, client: str, lineage: str, keep: int) -> None:
        for name in (client, lineage):
            check_name(name)
        self.folder = state_dir / client / lineage
        self._keep = keep

    def load(self, attempt: str) -> ClientState:
        """The state that an attempt left; raises UserError where it is missing or damaged."""
        check_name(attempt)
        checkpoint = read_checkpoint(self.folder / attempt)
        manifest = checkpoint.manifest
        return ClientState(
            **{group: checkpoint.group(group) for group in _GROUPS},
            steps=manifest["steps"],
            exclusive_steps=manifest["exclusive_steps"],
        )

    def save(self, attempt: str, parent: str, round_number: int, state: ClientState) -> None:
        """Store an attempt durably, then drop those that no kept round refers to.

        Raises:
            UserError: it cannot be written; the store is as it was.
        """
        check_name(attempt)
        manifest = {
            "attempt": attempt,
            "parent": parent,
            "round": round_number,
            "steps": state.steps,
            "exclusive_steps": state.exclusive_steps,
        }
        groups = {group: getattr(state, group) for group in _GROUPS}
        # A process that outlives its SuperNode for a moment must not have its half-written folder pruned.
        with held(self.folder.parent / "lock", wait=True):
            write_checkpoint(self.folder / attempt, Checkpoint(groups, manifest))
            self._prune(attempt, round_number)

    def _prune(self, newest: str, round_number: int) -> None:
        """Keep the recent rounds and, of the newest attempt's ancestors, the last before them."""
        horizon = round_number - self._keep
        rounds = {}
        for folder in self.folder.iterdir():
            try:
                rounds[folder.name] = int(read_manifest(folder)["round"])
            except UserError:
                # What a killed process left: a temporary folder, or one that was half removed.
                shutil.rmtree(folder, ignore_errors=True)
        ancestor = newest
        while ancestor in rounds and rounds[ancestor] > horizon:
            ancestor = str(read_manifest(self.folder / ancestor)["parent"])
        for name, number in rounds.items():
            if number <= horizon and name != ancestor:
                remove_checkpoint(self.folder / name)


def check_name(name: str) -> None:
    """Raise UserError for a name of a client, lineage or attempt that is no plain file name."""
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a store; allowed: letters, digits, and . _ - inside, up to 100")

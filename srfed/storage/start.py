"""What a run starts from in place of φ_0: another run's φ, kept in its own folder."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from srfed.errors import DamagedError
from srfed.files import read_json
from srfed.networks.partition import Shared
from srfed.storage.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

START = "start"
"""The folder in a run's folder, and the entry in its run.json."""


@dataclass(frozen=True)
class Origin:
    """Where φ comes from.

    Attributes:
        run: the folder's name, without its path, which would travel with a shared run.
        lineage: of the run.
        round: whose φ it is.
        phi_sha256: of φ, see :func:`shared_digest`.
    """

    run: str
    lineage: str
    round: int
    phi_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shared_digest(shared: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, types and bits of φ's tensors."""
    ordered = {name: shared[name].detach().cpu().contiguous() for name in sorted(shared)}
    return hashlib.sha256(safetensors.torch.save(ordered)).hexdigest()


def save_start(run: Path, origin: Origin, shared: Shared) -> None:
    """Keep φ in a run's folder; raises UserError where that cannot be."""
    write_checkpoint(run / START, Checkpoint({"shared": dict(shared)}, origin.to_json()))


def load_start(run: Path) -> Shared | None:
    """The φ that a run starts from; None where it starts from its own initial values.

    Raises:
        DamagedError: it is missing, or not the one that run.json names.
        UserError: it cannot be read.
    """
    named = read_json(run / "run.json").get(START)
    if named is None:
        return None
    shared = Shared(read_checkpoint(run / START).group("shared"))
    if not isinstance(named, dict) or shared_digest(shared) != named.get("phi_sha256"):
        raise DamagedError(
            f"{run / START} is damaged: its φ is not the one that run.json names; put it back, or "
            "begin another run"
        )
    return shared

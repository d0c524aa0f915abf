"""A site's own copy of its model: the averaged φ that the server last sent, with the site's averaged θ_i.

    <state-dir>/<client>/models/<lineage>/round-00030/

It is written at each evaluation, so the one of the last round is there when training ends.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from srfed.config import RunConfig, parse_config_json
from srfed.errors import UserError
from srfed.tensors import Checkpoint, read_checkpoint, read_manifest, remove_checkpoint, write_checkpoint

MODELS = "models"


def save_site_model(
    folder: Path,
    config: RunConfig,
    lineage: str,
    round_number: int,
    shape: tuple[int, ...],
    shared: Mapping[str, Tensor],
    exclusive: Mapping[str, Tensor],
) -> None:
    """Store the model of a round, then drop those of earlier rounds.

    Args:
        folder: the client's own folder.
        config: the run's configuration.
        lineage: the run with all its resumptions.
        round_number: the round that the model comes from.
        shape: H, W, C of the images.
        shared: the averaged φ.
        exclusive: the averaged θ_i.

    Raises:
        UserError: it cannot be written.
    """
    models = folder / MODELS / lineage
    path = models / f"round-{round_number:05d}"
    if path.exists():
        # The evaluation of this round was asked for before, and a resumed server asks for it again.
        remove_checkpoint(path)
    manifest = {"config": config.to_json(), "round": round_number, "shape": list(shape), "client": folder.name}
    write_checkpoint(path, Checkpoint({"shared": dict(shared), "exclusive": dict(exclusive)}, manifest))
    for old in models.glob("round-*"):
        if old != path:
            remove_checkpoint(old)


class SiteModel:
    """The newest model in a site's store.

    Args:
        folder: the client's own folder, ``<state-dir>/<client>``.

    Raises:
        UserError: there is no model yet, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        found = list((folder / MODELS).glob("*/round-*/manifest.json"))
        if not found:
            raise UserError(
                f"{folder} has no model; name <state-dir>/<client-id> of a site that took part in an evaluation"
            )
        newest = max(found, key=lambda manifest: manifest.stat().st_mtime_ns).parent
        read_manifest(newest)
        self._checkpoint = read_checkpoint(newest)
        manifest = self._checkpoint.manifest
        self.config = parse_config_json(str(manifest["config"]))
        self.round = int(manifest["round"])
        self.client = str(manifest["client"])
        height, width, channels = manifest["shape"]
        self.shape: tuple[int, int, int] = (height, width, channels)

    @property
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averaged φ and the averaged θ_i."""
        return self._checkpoint.group("shared"), self._checkpoint.group("exclusive")

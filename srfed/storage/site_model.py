"""A site's own copy of its model: the averaged φ that the server last sent, with the site's
averaged θ_i.

    <state-dir>/<client>/models/<lineage>/round-00030-4/

It is written at each evaluation, so the one of the last round, or of the best where that is the
run's result, is there when training ends. The
number behind the round counts the models that the site has written; the highest is the newest,
whatever a copy has done to times.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from srfed.config import RunConfig, parse_config_json
from srfed.errors import DamagedError, UserError
from srfed.files import held, list_folder
from srfed.storage.checkpoint import (
    Checkpoint,
    find_checkpoints,
    image_shape,
    read_checkpoint,
    remove_checkpoint,
    remove_remains,
    write_checkpoint,
)
from srfed.storage.client_store import NO_PARENT, StoreBounds, check_bounds, check_name
from srfed.storage.manifest import read_manifest

MODELS = "models"
_KINDS = {"config": str, "round": int, "shape": list, "client": str}


def save_site_model(
    folder: Path,
    config: RunConfig,
    lineage: str,
    round_number: int,
    shape: tuple[int, ...],
    shared: Mapping[str, Tensor],
    exclusive: Mapping[str, Tensor],
    line: str = NO_PARENT,
    bounds: StoreBounds | None = None,
) -> None:
    """Store the model of a round, then drop those that were stored before of the same line of
    descent.

    Args:
        folder: the client's own folder.
        config: the run's configuration.
        lineage: the run with all its resumptions.
        round_number: the round that the model comes from.
        shape: H, W, C of the images.
        shared: the averaged φ.
        exclusive: the averaged θ_i.
        line: the first attempt of θ_i's line of descent; "none" where it is the common
            initialisation.
        bounds: of all models of the site.

    Raises:
        UserError: it cannot be written, or would exceed the bounds.
    """
    check_name(lineage)
    models = folder / MODELS / lineage
    size = sum(tensor.nbytes for part in (shared, exclusive) for tensor in part.values())
    with held(folder / "lock", wait=True):
        check_bounds(models.parent, lineage, size, bounds or StoreBounds())
        remove_remains(models)
        number = 1 + max((number for _, number, _ in _found(folder)), default=0)
        before = [
            path
            for path, _, other in _found(folder)
            if path.parent == models and other in (line, None)
        ]
        manifest = {
            "config": config.to_json(),
            "round": round_number,
            "shape": list(shape),
            "client": folder.name,
            "number": number,
            "line": line,
        }
        groups = {"shared": dict(shared), "exclusive": dict(exclusive)}
        write_checkpoint(
            models / f"round-{round_number:05d}-{number}", Checkpoint(groups, manifest)
        )
        for path in before:
            remove_checkpoint(path)


def check_room(folder: Path, lineage: str, bounds: StoreBounds | None = None) -> None:
    """Raise UserError where a site's own models have no room for those of one more run."""
    check_name(lineage)
    check_bounds(folder / MODELS, lineage, 0, bounds or StoreBounds())


class SiteModel:
    """The newest model in a site's store.

    Args:
        folder: the client's own folder, ``<state-dir>/<client>``.

    Raises:
        UserError: there is no model yet, it is damaged, or which one is the newest is not recorded.
    """

    def __init__(self, folder: Path) -> None:
        found = list(_found(folder))
        if not found:
            raise UserError(
                f"{folder} has no model; name <state-dir>/<client-id> of a site that took part in "
                "an evaluation"
            )
        last = max(number for _, number, _ in found)
        newest = [path for path, number, _ in found if number == last]
        if len(newest) > 1:
            raise UserError(
                f"{folder} has models of an older srfed, which does not record the newest: "
                f"{', '.join(map(str, newest))}; remove all but one"
            )
        self._checkpoint = read_checkpoint(newest[0], _KINDS)
        manifest = self._checkpoint.manifest
        self.path = newest[0]
        self.config = parse_config_json(str(manifest["config"]))
        self.round = int(manifest["round"])
        self.client = str(manifest["client"])
        self.shape = image_shape(self.path, manifest["shape"])

    @property
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averaged φ and the averaged θ_i."""
        return self._checkpoint.group("shared"), self._checkpoint.group("exclusive")


def _found(folder: Path) -> Iterator[tuple[Path, int, str | None]]:
    """All models of a site with their numbers and lines of descent: 0 and None before formats had
    versions.
    """
    for lineage in list_folder(folder / MODELS):
        for name in find_checkpoints(folder / MODELS / lineage):
            path = folder / MODELS / lineage / name
            try:
                manifest = read_manifest(path, _KINDS)
            except DamagedError:
                # Its name says as much, and opening it will say that it is damaged.
                number = name.rpartition("-")[2] if name.count("-") > 1 else "0"
                yield path, int(number) if number.isdecimal() else 0, ""
            else:
                yield path, int(manifest.get("number", 0)), manifest.get("line")

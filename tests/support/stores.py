"""What clients and servers store."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from srfed.storage.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    read_header,
    read_manifest,
    rewrite_manifest,
)
from srfed.storage.server_checkpoints import RunState
from srfed.training.part import ClientState, Part


def client_state(value: float) -> ClientState:
    tensors = {"head.weight": torch.full((64, 64), value)}
    average = {"head.weight": tensors["head.weight"].clone()}
    moments = {"step.head.weight": torch.tensor(value)}
    return ClientState(Part(tensors, average, moments, 1), minibatches=int(value))


def server_state(number: int) -> RunState:
    shared, average = ({"w": torch.full((64, 64), float(number))} for _ in range(2))
    return RunState(
        "lineage",
        number,
        Part(shared, average),
        attempts={"a": f"a-{number}"},
        shapes={"a": (8, 8, 1)},
    )


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint says of itself."""
    manifest = read_manifest(folder)
    change(manifest)
    rewrite_manifest(folder, manifest)


def write_as_before(folder: Path, version: int | None, without: Collection[str] = ()) -> None:
    """Write a checkpoint again as formats before 3 had it, its manifest in a file beside; None: as
    before formats had versions.
    """
    path = folder / STATE_FILE
    with path.open("rb") as file:
        layout = read_header(path, file).about["layout"]
    manifest = read_manifest(folder)
    state = safetensors.torch.save(safetensors.torch.load_file(path), {"layout": layout})
    path.write_bytes(state)
    del manifest["format"]
    content = {key: value for key, value in manifest.items() if key not in without}
    content["sha256"] = hashlib.sha256(state).hexdigest()
    (folder / MANIFEST_FILE).write_text(
        json.dumps(content if version is None else {"format": version, **content})
    )

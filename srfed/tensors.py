"""Tensors on disk: safetensors bytes beside a manifest that says what they are and holds their hash."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from srfed.errors import UserError
from srfed.files import read_json, write_folder

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in named groups, and a manifest of plain values."""

    groups: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group; empty where it was written empty."""
        return self.groups.get(name, {})


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as a new folder, complete or not at all; raises UserError where it cannot."""
    tensors = {
        f"{group}:{name}": tensor.detach().cpu().contiguous()
        for group, members in checkpoint.groups.items()
        for name, tensor in members.items()
    }
    state = safetensors.torch.save(tensors)
    manifest = {**checkpoint.manifest, "sha256": hashlib.sha256(state).hexdigest()}
    write_folder(folder, {STATE_FILE: state, MANIFEST_FILE: (json.dumps(manifest, indent=2) + "\n").encode()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest alone; raises UserError where it is missing or damaged."""
    return read_json(folder / MANIFEST_FILE, "sha256")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; raises UserError where it is missing, truncated or altered."""
    manifest = read_manifest(folder)
    path = folder / STATE_FILE
    try:
        state = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.sha256(state).hexdigest() != manifest["sha256"]:
        raise UserError(f"{path} is damaged ({len(state)} bytes that do not match the hash in {MANIFEST_FILE})")
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = safetensors.torch.load(state)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    # safetensors sorts by size; the manifest-independent order restored here is by name.
    for name in sorted(tensors):
        group, _, member = name.partition(":")
        groups.setdefault(group, {})[member] = tensors[name]
    return Checkpoint(groups, manifest)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, manifest last, so that a half-removed one is never taken for whole."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()

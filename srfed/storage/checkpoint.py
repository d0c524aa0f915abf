"""Tensors on disk: safetensors bytes beside a manifest that says what they are and holds their
hash.

The file holds one flat array a dtype, and the layout of what they are made of: a client's state is
some five hundred small tensors, and writing them one by one took longer than training a step.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from srfed.errors import DamagedError, UserError
from srfed.files import (
    FORMAT,
    check_format,
    json_bytes,
    list_folder,
    read_bytes,
    read_json,
    remove_folder,
    remove_leftovers,
    write_bytes,
    write_folder,
)
from srfed.records import Shape
from srfed.storage import CHECKPOINT_FORMAT

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
_FILES = (STATE_FILE, MANIFEST_FILE)
_LAYOUT = "layout"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in named groups, and a manifest of plain values."""

    groups: dict[str, dict[str, Tensor]]
    manifest: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group; empty where it was written empty."""
        return self.groups.get(name, {})


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as a new folder, complete or not at all; raises UserError where it
    cannot.
    """
    members = [
        (group, name, tensor.detach().cpu())
        for group, tensors in checkpoint.groups.items()
        # By name: bits that are equal make equal files, in whatever order they are at hand.
        for name, tensor in sorted(tensors.items())
    ]
    by_dtype: dict[str, list[Tensor]] = {}
    for _, _, tensor in members:
        by_dtype.setdefault(_dtype_name(tensor), []).append(tensor.reshape(-1))
    flat = {dtype: torch.cat(tensors) for dtype, tensors in by_dtype.items()}
    layout = [
        [group, name, _dtype_name(tensor), list(tensor.shape)] for group, name, tensor in members
    ]
    about = {_LAYOUT: json.dumps(layout, separators=(",", ":"))}
    state = safetensors.torch.save(flat, metadata=about)
    manifest = {**checkpoint.manifest, "sha256": hashlib.sha256(state).hexdigest()}
    write_folder(
        folder, {STATE_FILE: state, MANIFEST_FILE: json_bytes(manifest, version=CHECKPOINT_FORMAT)}
    )


def read_manifest(folder: Path, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a checkpoint's manifest alone.

    Args:
        folder: the checkpoint's.
        kinds: what the manifest must have besides the hash, of these types.

    Raises:
        DamagedError: it is missing or not what was written.
        UserError: it cannot be read, or is of another srfed.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json(path, version=CHECKPOINT_FORMAT)
    # 1 and 2 have the same keys; what is older has fewer.
    version = max(1, int(manifest.get(FORMAT, 0)))
    check_format(path, manifest, version=version, kinds={"sha256": str, **(kinds or {})})
    return manifest


def read_checkpoint(folder: Path, kinds: Mapping[str, type] | None = None) -> Checkpoint:
    """Read a checkpoint; arguments and errors as of :func:`read_manifest`."""
    manifest = read_manifest(folder, kinds)
    path = folder / STATE_FILE
    state = read_bytes(path)
    if hashlib.sha256(state).hexdigest() != manifest["sha256"]:
        raise DamagedError(
            f"{path} is damaged ({len(state)} bytes that do not match the hash in {MANIFEST_FILE})"
        )
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = _members(safetensors.torch.load(state), _header(state))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    # By name, whatever order they were written in.
    for group, name in sorted(tensors):
        groups.setdefault(group, {})[name] = tensors[group, name]
    return Checkpoint(groups, manifest)


def _members(
    stored: Mapping[str, Tensor], header: Mapping[str, str]
) -> dict[tuple[str, str], Tensor]:
    """The tensors of a file by group and name, as views of its flat arrays; raises ValueError where
    these are shorter or longer than the layout says.
    """
    if _LAYOUT not in header:
        return {tuple(name.split(":", 1)): tensor for name, tensor in stored.items()}  # type: ignore[misc]
    members, begin = {}, dict.fromkeys(stored, 0)
    for group, name, dtype, shape in json.loads(header[_LAYOUT]):
        end = begin[dtype] + math.prod(shape)
        members[group, name] = stored[dtype][begin[dtype] : end].view(shape)
        begin[dtype] = end
    for dtype, tensor in stored.items():
        if begin[dtype] != len(tensor):
            raise ValueError(f"{len(tensor)} values of {dtype}, where {begin[dtype]} are named")
    return members


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def find_checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder, damaged ones too, in order; raises UserError where
    it cannot be read.

    A folder with neither state nor manifest is what an interrupted removal has left, and is none.
    """
    return [name for name in list_folder(folder) if set(_FILES) & set(list_folder(folder / name))]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; under its name it is gone at once or not at all."""
    remove_folder(folder, _FILES)


def remove_remains(folder: Path) -> None:
    """Remove what killed processes have left among the checkpoints of a folder; nobody else may be
    writing there.
    """
    remove_leftovers(folder, _FILES)
    sound = find_checkpoints(folder)
    for name in list_folder(folder):
        if name not in sound and (folder / name).is_dir():
            remove_folder(folder / name, ())


def check_tensors(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError unless tensors have the names and shapes of others; ``what`` says whose they
    are.
    """
    for name in sorted(set(tensors) | set(expected)):
        if name not in tensors or name not in expected:
            where = "has no" if name not in tensors else "has a"
            raise UserError(
                f"{what} {where} tensor {name}, which is not what the configuration says"
            )
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise UserError(
                f"{what} has {name} with shape {found}, and the configuration says {wanted}"
            )


def image_shape(path: Path, content: Any) -> Shape:
    """H, W, C as a manifest has them; raises DamagedError, naming ``path``, where it does not."""
    whole = isinstance(content, list) and all(isinstance(extent, int) for extent in content)
    if not whole or len(content) != 3:
        raise DamagedError(f"{path} is damaged: 'shape' is {content!r}")
    height, width, channels = content
    return height, width, channels


def write_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str] | None = None
) -> None:
    """Write named arrays, and words about them, as one safetensors file, atomically; raises
    UserError.
    """
    write_bytes(path, safetensors.numpy.save(dict(arrays), metadata={FORMAT: "1", **(about or {})}))


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read what :func:`write_arrays` wrote: the arrays, and the words.

    Raises:
        DamagedError: it is missing, or no such file.
        UserError: it cannot be read, or is of another srfed.
    """
    content = read_bytes(path)
    try:
        arrays = safetensors.numpy.load(content)
        header = _header(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    check_format(path, header)
    return arrays, header


def _header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + size]).get("__metadata__", {}))

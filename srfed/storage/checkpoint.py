"""Tensors on disk: one safetensors file, whose header says what they are and holds their hash
(:mod:`srfed.storage.manifest`).

It holds one flat array a dtype, and the layout of what they are made of: a client's state is some
five hundred small tensors, and writing them one by one took longer than training a step.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from srfed.errors import DamagedError, UserError
from srfed.files import (
    FORMAT,
    PIECE,
    check_format,
    list_folder,
    opened,
    read_bytes,
    remove_folder,
    remove_leftovers,
    write_bytes,
    write_folder,
)
from srfed.flat import parts, runs
from srfed.records import Shape
from srfed.storage.manifest import (
    LAYOUT,
    MANIFEST_FILE,
    SHA256,
    STATE_FILE,
    header_bytes,
    manifest_of,
    read_header,
    read_manifest,
    stands_beside,
    texts_of,
)

_FILES = (STATE_FILE, MANIFEST_FILE)
_UNKNOWN = "0" * 64
"""Where the hash will stand."""
_DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""safetensors' names, the widest first: so each array begins where its values may."""

Stamp = tuple[int, ...]
MOST_VERIFIED = 10_000
"""Of how many files a process knows that they are what was written."""


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
    write_folder(folder, {STATE_FILE: partial(_write_state, checkpoint)})


def _write_state(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Write straight from the tensors' memory, and hash on the way."""
    by_dtype: dict[str, list[Tensor]] = {}
    entries = []
    for group, tensors in checkpoint.groups.items():
        # By name: bits that are equal make equal files, in whatever order they are at hand.
        for name, tensor in sorted(tensors.items()):
            dtype = _dtype_name(tensor)
            by_dtype.setdefault(dtype, []).append(tensor)
            entries.append((group, name, dtype, tensor.shape))
    layout = _layout_of(tuple(entries))
    arrays, begin = {}, 0
    for dtype, code in _DTYPES.items():
        if dtype in by_dtype:
            count = sum(tensor.numel() for tensor in by_dtype[dtype])
            end = begin + count * by_dtype[dtype][0].element_size()
            arrays[dtype] = {"dtype": code, "shape": [count], "data_offsets": [begin, end]}
            begin = end
    header = header_bytes(arrays, texts_of(checkpoint.manifest, layout, _UNKNOWN))
    file.write(header)
    digest = hashlib.sha256(layout.encode())
    for dtype in arrays:
        for run in runs(tensor.cpu() for tensor in by_dtype[dtype]):
            content = run.view(torch.uint8).numpy().data
            for place in range(0, len(content), PIECE):
                piece = content[place : place + PIECE]
                digest.update(piece)
                file.write(piece)
    sha256 = digest.hexdigest()
    file.seek(header.index(_UNKNOWN.encode()))
    file.write(sha256.encode())
    file.flush()
    _verified.add(_stamp(file), sha256)


@lru_cache(maxsize=64)
def _layout_of(entries: tuple[tuple[str, str, str, tuple[int, ...]], ...]) -> str:
    """A run's states have few layouts."""
    return json.dumps(entries, separators=(",", ":"))


def read_checkpoint(folder: Path, kinds: Mapping[str, type] | None = None) -> Checkpoint:
    """Read a checkpoint; arguments and errors as of :func:`read_manifest`."""
    if stands_beside(folder):
        return _read_of_before(folder, kinds)
    path = folder / STATE_FILE
    with opened(path) as file:
        header = read_header(path, file)
        manifest = manifest_of(path, header, kinds)
        found = _stamp(file)
        content = torch.empty(
            max(0, os.fstat(file.fileno()).st_size - header.size), dtype=torch.uint8
        )
        # A file may become shorter meanwhile.
        content = content[: file.readinto(content.numpy())]  # type: ignore[attr-defined]
    sha256, layout = manifest[SHA256], header.about[LAYOUT]
    if not _verified.has(found, sha256):
        digest = hashlib.sha256(layout.encode())
        digest.update(content.numpy().data)
        if digest.hexdigest() != sha256:
            raise DamagedError(
                f"{path} is damaged ({len(content)} bytes of tensors that do not match the hash "
                "in its header)"
            )
        _verified.add(found, sha256)
    try:
        arrays = dict(_arrays(header.arrays, content))
        return Checkpoint(_groups(_members(arrays, layout)), manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def _arrays(entries: Mapping[str, Any], content: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A file's flat arrays by dtype; raises ValueError where they are not all of the content."""
    place = 0
    for dtype in sorted(entries, key=lambda name: int(entries[name]["data_offsets"][0])):
        begin, end = entries[dtype]["data_offsets"]
        if begin != place or not place <= end <= len(content) or dtype not in _DTYPES:
            raise ValueError(f"{dtype} lies at {begin} to {end} of {len(content)} bytes")
        yield dtype, content[begin:end].view(getattr(torch, dtype))
        place = end
    if place != len(content):
        raise ValueError(f"{len(content)} bytes, where {place} are named")


def _read_of_before(folder: Path, kinds: Mapping[str, type] | None) -> Checkpoint:
    """A checkpoint of format 1 or 2."""
    manifest = read_manifest(folder, kinds)
    path = folder / STATE_FILE
    state = read_bytes(path)
    if hashlib.sha256(state).hexdigest() != manifest[SHA256]:
        raise DamagedError(
            f"{path} is damaged ({len(state)} bytes that do not match the hash in {MANIFEST_FILE})"
        )
    try:
        stored, header = safetensors.torch.load(state), _header(state)
        if LAYOUT in header:
            return Checkpoint(_groups(_members(stored, header[LAYOUT])), manifest)
        members = (((*name.split(":", 1),), tensor) for name, tensor in stored.items())
        return Checkpoint(_groups(dict(members)), manifest)  # type: ignore[arg-type]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


@lru_cache(maxsize=64)
def _entries(layout: str) -> list[tuple[str, str, str, list[int]]]:
    """Group, name, type and shape of each tensor; the states of a run have few layouts."""
    return [(group, name, dtype, shape) for group, name, dtype, shape in json.loads(layout)]


def _members(stored: Mapping[str, Tensor], layout: str) -> dict[tuple[str, str], Tensor]:
    """The tensors of a file by group and name, as views of its flat arrays; raises ValueError where
    these are shorter or longer than the layout says.
    """
    named: dict[str, list[tuple[tuple[str, str], list[int]]]] = {dtype: [] for dtype in stored}
    for group, name, dtype, shape in _entries(layout):
        named[dtype].append(((group, name), shape))
    members: dict[tuple[str, str], Tensor] = {}
    for dtype, tensor in stored.items():
        count = sum(math.prod(shape) for _, shape in named[dtype])
        if len(tensor) != count:
            raise ValueError(f"{len(tensor)} values of {dtype}, where {count} are named")
        views = parts(tensor, [shape for _, shape in named[dtype]])
        members.update(zip((key for key, _ in named[dtype]), views, strict=True))
    return members


def _groups(members: Mapping[tuple[str, str], Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    # By name, whatever order they were written in.
    for group, name in sorted(members):
        groups.setdefault(group, {})[name] = members[group, name]
    return groups


class _Verified:
    """Files that this process has written, or compared with their hash, since they last changed:
    their content need not be hashed again, which takes as long as reading it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Stamp, str] = {}

    def add(self, stamp: Stamp, sha256: str) -> None:
        with self._lock:
            self._found[stamp] = sha256
            if len(self._found) > MOST_VERIFIED:
                del self._found[next(iter(self._found))]

    def has(self, stamp: Stamp, sha256: str) -> bool:
        with self._lock:
            return self._found.get(stamp) == sha256


_verified = _Verified()


def _stamp(file: BinaryIO) -> Stamp:
    """What changes whenever a file does: no copy and no tool sets the time of its last change."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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

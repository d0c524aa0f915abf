"""What a checkpoint says of itself: read, and written anew, without its tensors and without
PyTorch.

A checkpoint is a folder with one safetensors file. Its header holds a flat array for each dtype,
the layout of what these are made of, the SHA-256 of layout and arrays, and the manifest. Before
format 3 the manifest and a SHA-256 of the whole file stood in a file beside it; these are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from srfed.errors import DamagedError
from srfed.files import (
    FORMAT,
    check_format,
    exists,
    opened,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)

CHECKPOINT_FORMAT = 3
"""1 had a tensor for each member of a group, and no layout; 2 and 1 a manifest in a file beside."""
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
"""Of formats 1 and 2."""
SHA256, LAYOUT, MANIFEST = "sha256", "layout", "manifest"
ABOUT = "__metadata__"
"""Where safetensors has what is said of the tensors."""
LONGEST_HEADER = 100_000_000
"""As safetensors' own."""


@dataclass(frozen=True)
class Header:
    """A safetensors file's header.

    Attributes:
        arrays: as safetensors has them, by name.
        about: texts.
        size: where the arrays begin.
    """

    arrays: Mapping[str, Any]
    about: Mapping[str, str]
    size: int


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of an open file, which is then at its arrays; raises DamagedError, naming the
    path, where it has none.
    """
    try:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= LONGEST_HEADER:
            raise ValueError(f"its header would be {size} bytes long")
        return _header_in(file.read(size))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


@lru_cache(maxsize=64)
def _header_in(content: bytes) -> Header:
    """What a client's message makes of its store reads the same few headers a dozen times."""
    arrays = json.loads(content)
    about = arrays.pop(ABOUT, {})
    if not all(isinstance(text, str) for text in about.values()):
        raise ValueError("its header has something other than texts")
    return Header(arrays, about, 8 + len(content))


def header_bytes(arrays: Mapping[str, Any], about: Mapping[str, str]) -> bytes:
    """A safetensors file up to its arrays."""
    text = json.dumps({ABOUT: dict(about), **arrays}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def texts_of(manifest: Mapping[str, Any], layout: str, sha256: str) -> dict[str, str]:
    """What a checkpoint's header says beside its arrays."""
    return {
        FORMAT: str(CHECKPOINT_FORMAT),
        SHA256: sha256,
        MANIFEST: json.dumps(manifest, ensure_ascii=False, separators=(",", ":")),
        LAYOUT: layout,
    }


def manifest_of(
    path: Path, header: Header, kinds: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """The manifest in a header; arguments and errors as of :func:`read_manifest`."""
    about = header.about
    check_format(path, about, MANIFEST, LAYOUT, version=CHECKPOINT_FORMAT, kinds={SHA256: str})
    try:
        manifest = json.loads(about[MANIFEST])
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"{path} is damaged: its manifest is no mapping")
    found = {FORMAT: int(about[FORMAT]), **manifest, SHA256: about[SHA256]}
    # What a manifest has did not change with its place.
    check_format(path, found, version=CHECKPOINT_FORMAT, kinds=kinds)
    return found


def read_manifest(folder: Path, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a checkpoint's manifest alone.

    Args:
        folder: the checkpoint's.
        kinds: what the manifest must have besides the hash, of these types.

    Raises:
        DamagedError: it is missing or not what was written.
        UserError: it cannot be read, or is of another srfed.
    """
    if stands_beside(folder):
        path = folder / MANIFEST_FILE
        manifest = read_json(path, version=CHECKPOINT_FORMAT)
        # 1 and 2 have the same keys; what is older has fewer.
        version = max(1, int(manifest.get(FORMAT, 0)))
        check_format(path, manifest, version=version, kinds={SHA256: str, **(kinds or {})})
        return manifest
    path = folder / STATE_FILE
    with opened(path) as file:
        return manifest_of(path, read_header(path, file), kinds)


def rewrite_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Give a checkpoint another manifest, atomically; its tensors, and their hash, stay.

    Args:
        folder: the checkpoint's.
        manifest: what :func:`read_manifest` gave, with other values.

    Raises:
        DamagedError, UserError: as :func:`read_manifest`, or it cannot be written.
    """
    if stands_beside(folder):
        content = {key: value for key, value in manifest.items() if key != FORMAT}
        write_json(folder / MANIFEST_FILE, content, version=int(manifest.get(FORMAT, 0)))
        return
    path = folder / STATE_FILE
    with opened(path) as file:
        header = read_header(path, file)
    content = {key: value for key, value in manifest.items() if key not in (FORMAT, SHA256)}
    texts = texts_of(content, header.about[LAYOUT], header.about[SHA256])
    write_bytes(path, header_bytes(header.arrays, texts) + read_bytes(path)[header.size :])


def stands_beside(folder: Path) -> bool:
    """Whether a checkpoint's manifest is a file of its own, as before format 3; raises UserError
    where that cannot be known.
    """
    return exists(folder / MANIFEST_FILE)

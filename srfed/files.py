"""Writing that leaves either the old content or the new, never a part of it."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from srfed.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: temporary neighbour, fsync, rename, fsync of the folder.

    Raises:
        UserError: the file cannot be written (no permission, disk full); what stood there stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically; raises as :func:`write_bytes`."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Read a mapping that :func:`write_json` wrote.

    Args:
        path: the file.
        key: a key that it must have.

    Raises:
        UserError: the file cannot be read, is no JSON, or lacks the key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or key not in content:
        raise UserError(f"{path} is damaged: it has no {key!r}")
    return content


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files so that it appears complete or not at all.

    Args:
        path: the folder; it must not exist yet.
        files: content by file name.

    Raises:
        UserError: the folder exists already or cannot be written; nothing is left of the attempt.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(temporary)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def held(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file for this process; the system lets go of it when the process ends, however it ends.

    Args:
        path: the file; it is made, and stays.
        wait: for another process to let go; otherwise that is an error.

    Raises:
        UserError: the file cannot be written, or another process has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise UserError(f"{path.parent} is in use by another process") from error
        yield


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

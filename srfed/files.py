"""Files of ours: written whole or not at all, for their owner's eyes, with the version of their
format.

Writing leaves the old content or the new, never a part of it. Reading tells what is damaged
(DamagedError) from what cannot be read now (UserError). What is made has mode 0600, and 0700 where
it is a folder, whatever the umask.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO
from uuid import uuid4

from srfed import __version__
from srfed.errors import DamagedError, UserError

FORMAT = "format"
"""The key under which each of our files says the version of its format; files of before versions
have none, and are of version 0."""
STREWN = re.compile(
    r"\.DS_Store|\._.*|\.nfs.*|\.fuse_hidden.*|Thumbs\.db|desktop\.ini", re.IGNORECASE
)
"""What operating systems leave in any folder."""

_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""How a file system says that it has no fsync."""
_NO_FOLDER_SYNC = _NO_SYNC | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})

# --- Writing -------------------------------------------------------------------------------------


LONGEST_LOG = 10_000_000
"""Bytes of a log after which a new one begins."""
PIECE = 2**20
"""Bytes that are written at once: where memory is scarce, Linux takes several times as long to find
room for ten times as many.
"""

Content = bytes | Callable[[BinaryIO], None]
"""What a file is to hold, or what writes it."""


def write_bytes(path: Path, content: bytes, *, private: bool = True) -> None:
    """Write all of a file; arguments and errors as of :func:`written_file`."""
    with written_file(path, private=private) as file:
        _write_all(file, content)


@contextmanager
def written_file(path: Path, *, private: bool = True) -> Iterator[IO[bytes]]:
    """A file to be written in the block, atomically: temporary neighbour, fsync, rename, fsync of
    the folder.

    Args:
        path: the file; missing folders above it are made.
        private: for the owner alone; otherwise the umask decides, as for what is to be handed out.

    Raises:
        UserError: the file cannot be written (no permission, disk full, a folder of that name);
            what stood there stays.
    """
    temporary = _temporary(path)
    try:
        _refuse_folder(path)
        make_folder(path.parent, private=private)
        with open(temporary, "wb", opener=_owners if private else None) as file:
            yield file
            file.flush()
            _sync(file.fileno(), _NO_SYNC)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {_why(error)}") from error
        raise
    _sync_folder_of(path)


def write_json(path: Path, content: Mapping[str, Any], *, version: int = 1) -> None:
    """Write a mapping as indented JSON with its format's version, atomically; raises as
    :func:`write_bytes`.
    """
    write_bytes(path, json_bytes(content, version=version))


def json_bytes(content: Mapping[str, Any], *, version: int = 1) -> bytes:
    """What :func:`write_json` writes."""
    return (json.dumps({FORMAT: version, **content}, indent=2, ensure_ascii=False) + "\n").encode()


def append_text(path: Path, text: str) -> None:
    """Append to a log, which is made where it is missing.

    One of more than :data:`LONGEST_LOG` bytes becomes ``<name>.1``, in place of the one before it:
    nobody who can make a party complain may fill its disk.

    Raises:
        UserError: it cannot be written.
    """
    try:
        make_folder(path.parent)
        if path.exists() and path.stat().st_size > LONGEST_LOG:
            path.replace(path.with_name(f"{path.name}.1"))
        with open(path, "a", encoding="utf-8", opener=_owners) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_why(error)}") from error


def write_folder(path: Path, files: Mapping[str, Content]) -> None:
    """Write a folder of files so that it appears complete or not at all.

    Args:
        path: the folder; it must not exist yet.
        files: content by file name.

    Raises:
        UserError: the folder exists already or cannot be written; nothing is left of the attempt.
    """
    temporary = _temporary(path)
    try:
        make_folder(temporary)
        for name, content in files.items():
            with open(temporary / name, "wb", opener=_owners) as file:
                _fill(file, content)
        _sync_folder(temporary)
        os.rename(temporary, path)
    except OSError as error:
        remove_folder(temporary, files)
        raise UserError(f"cannot write {path}: {_why(error)}") from error
    _sync_folder_of(path)


@contextmanager
def written_tree(path: Path, *, private: bool = True) -> Iterator[Path]:
    """A folder with folders in it, to be filled in the block: it appears complete, when that ends,
    or not at all.

    Args:
        path: the folder; it may exist, and must be empty then.
        private: as of :func:`write_bytes`.

    Yields:
        The folder to fill, which has the same name and lies beside; plain writes will do.

    Raises:
        UserError: the folder holds something already, or cannot be written; nothing is left of the
            attempt.
    """
    refuse_used(path)
    temporary = _temporary(path)
    filled = temporary / path.absolute().name
    try:
        try:
            make_folder(temporary.parent, private=private)
            make_folder(temporary)
            make_folder(filled, private=private)
            yield filled
            for place, _, names in os.walk(filled):
                for name in names:
                    with open(os.path.join(place, name), "rb") as file:
                        _sync(file.fileno(), _NO_SYNC)
                _sync_folder(Path(place))
            os.rename(filled, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {_why(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder_of(path)


def refuse_used(path: Path) -> None:
    """Raise UserError where a new folder cannot be made: something else is there, or it holds
    something.
    """
    if exists(path) and (not path.is_dir() or list_folder(path)):
        raise UserError(f"{path} is not an empty folder; name another one, new or empty")


def try_output(path: Path | None) -> None:
    """Find out, before any work, whether a file can be written; None is none.

    Raises:
        UserError: as :func:`write_bytes`; nothing is left of the trial but folders above the file.
    """
    if path is None:
        return
    temporary = _temporary(path)
    try:
        _refuse_folder(path)
        make_folder(path.parent, private=False)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {_why(error)}") from error


Stamp = tuple[int, int, int, int]
"""Of :func:`stamp`."""


# --- Folders -------------------------------------------------------------------------------------


def make_folder(path: Path, *, private: bool = True) -> None:
    """Make a folder, and those above it that are missing; one that is there already keeps its mode.

    Args:
        path: the folder.
        private: what is made is for the owner alone; otherwise the umask decides.

    Raises:
        OSError: it cannot be made, or a file is in its place.
    """
    try:
        os.mkdir(path, _PRIVATE_FOLDER if private else 0o777)
    except FileExistsError:
        if not path.is_dir():
            raise
    except FileNotFoundError:
        make_folder(path.parent, private=private)
        make_folder(path, private=private)
    else:
        if private:
            close_to_others(path)


def new_folder(path: Path) -> Path:
    """Make a folder that nobody else has made: ``path``, or ``path-2`` and so on where that is
    taken.

    Raises:
        UserError: it cannot be made.
    """
    number, candidate = 1, path
    while True:
        try:
            make_folder(path.parent)
            os.mkdir(candidate, _PRIVATE_FOLDER)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise UserError(f"cannot write {candidate}: {_why(error)}") from error
        else:
            close_to_others(candidate)
            return candidate


def list_folder(path: Path) -> list[str]:
    """The names in a folder, in order, without what is temporary or strewn; none where there is no
    folder.

    Raises:
        UserError: it cannot be read, which is not the same as empty.
    """
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {_why(error)}") from error
    return sorted(
        name for name in names if not _TEMPORARY.fullmatch(name) and not STREWN.fullmatch(name)
    )


def remove_folder(path: Path, files: Iterable[str]) -> None:
    """Remove a folder of ours: under its name it is gone at once or not at all.

    What others have put there is not ours to remove, but for what systems strew everywhere; then a
    hidden folder with it is left. Nothing is an error: what cannot be removed now,
    :func:`remove_leftovers` finds later.

    Args:
        path: the folder; it may be gone already.
        files: the names that are ours.
    """
    ours = set(files)
    hidden = path if _TEMPORARY.fullmatch(path.name) else _temporary(path)
    with suppress(OSError):
        if hidden != path:
            os.rename(path, hidden)
        for name in os.listdir(hidden):
            if name in ours or STREWN.fullmatch(name):
                with suppress(OSError):
                    os.unlink(hidden / name)
        hidden.rmdir()


def remove_leftovers(path: Path, files: Iterable[str]) -> None:
    """Remove what killed processes have left of :func:`write_folder` and :func:`remove_folder` in a
    folder.

    Args:
        path: the folder; only one process at a time may write into it.
        files: the names that are ours.
    """
    with suppress(OSError):
        for name in os.listdir(path):
            if _TEMPORARY.fullmatch(name) and (path / name).is_dir():
                remove_folder(path / name, files)


def remove_temporary_files(path: Path, finally_called: str = ".*") -> None:
    """Remove what killed processes have left of :func:`written_file` in a folder: the one sweep.

    Args:
        path: the folder; nobody else may be writing there, so the caller has its lock.
        finally_called: the names that the files were to have, as a regular expression.
    """
    # What cannot be removed takes room, and is tried again next time.
    with suppress(OSError):
        for name in os.listdir(path):
            if _TEMPORARY.fullmatch(name) and re.fullmatch(
                finally_called, name[1 : -len(".12345678.tmp")]
            ):
                with suppress(OSError):
                    os.unlink(path / name)


# --- Reading -------------------------------------------------------------------------------------


def exists(path: Path) -> bool:
    """Whether there is something; raises UserError where that cannot be known, which is not the
    same as nothing.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {_why(error)}") from error
    return True


def stamp(path: Path) -> Stamp | None:
    """What changes whenever a file does, other than its content: inode, size, and the times of its
    last change, of which no copy and no tool sets the second; None where there is no file.

    Raises:
        UserError: it cannot be known.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {_why(error)}") from error
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        DamagedError: there is none.
        UserError: it cannot be read.
    """
    with opened(path) as file:
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to be read in the block; raises as :func:`read_bytes`, whenever it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        kind = (
            DamagedError if isinstance(error, FileNotFoundError | NotADirectoryError) else UserError
        )
        raise kind(f"cannot read {path}: {_why(error)}") from error


def read_json(
    path: Path, *keys: str, version: int = 1, kinds: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Read a mapping that :func:`write_json` wrote.

    Args:
        path: the file.
        keys: what it must have.
        version: the newest format that the caller knows.
        kinds: what it must have, of these types.

    Raises:
        DamagedError: it is missing, no JSON, or lacks a key that its format has.
        UserError: it cannot be read, or is of another srfed; the text says which.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it is no mapping")
    check_format(path, content, *keys, version=version, kinds=kinds)
    return content


def check_format(
    path: Path,
    content: Mapping[str, Any],
    *keys: str,
    version: int = 1,
    kinds: Mapping[str, type] | None = None,
) -> None:
    """Raise as :func:`read_json` unless a file's content is of a format that is known, and
    complete.
    """
    try:
        found = int(content.get(FORMAT, 0))
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path} is damaged: {FORMAT} is {content[FORMAT]!r}") from error
    if found > version:
        raise UserError(
            f"{path} has format {found}, which a newer srfed wrote; srfed {__version__} reads up "
            f"to {version}: install the newer one"
        )
    for key in (*keys, *(kinds or {})):
        if key not in content:
            if found < version:
                raise UserError(
                    f"{path} is of an older srfed (format {found}) and has no {key!r}: use the "
                    "srfed that wrote it"
                )
            raise DamagedError(f"{path} is damaged: it has no {key!r}")
    for key, kind in (kinds or {}).items():
        value = content[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DamagedError(f"{path} is damaged: {key!r} is {value!r}")


# --- For the owner alone --------------------------------------------------------------------------


@contextmanager
def private() -> Iterator[None]:
    """What anybody makes in this process, libraries too, is for the owner alone meanwhile."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def close_to_others(folder: Path) -> None:
    """Give a folder mode 0700; a file system without modes is left as it is."""
    with suppress(OSError):
        os.chmod(folder, _PRIVATE_FOLDER)


def open_to_others(folder: Path) -> str | None:
    """A sentence where others than the owner can look into a folder, or None; no folder is open to
    nobody.
    """
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError:
        return None
    if not mode & 0o077:
        return None
    return (
        f"{folder} can be read by others on this machine (mode {mode:04o}); close it: chmod -R "
        f"go= {folder}"
    )


# --- Locks ---------------------------------------------------------------------------------------


@contextmanager
def held(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file for this process; the system lets go of it when the process ends, however it
    ends.

    On a file system that has no locks nothing is held, which is said once.

    Args:
        path: the file; it is made, and stays.
        wait: for another process to let go; otherwise that is an error.

    Raises:
        UserError: the file cannot be written, or another process has it.
    """
    try:
        make_folder(path.parent)
        descriptor = _owners(path, os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_why(error)}") from error
    with os.fdopen(descriptor, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{path.parent} is in use by another process") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {path}: {_why(error)}") from error
            _say_unlocked(path.parent, _why(error))
        yield


def is_held(path: Path) -> bool:
    """Whether a process has this lock file; looking takes nothing, and on a file system without
    locks nobody seems to.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise UserError(f"cannot read {path}: {_why(error)}") from error
    return False


@lru_cache(maxsize=256)
def _say_unlocked(folder: Path, why: str) -> None:
    with suppress(OSError, ValueError):
        print(
            f"{folder} is on a file system without locks ({why}): see to it that no second process "
            "uses it",
            file=sys.stderr,
            flush=True,
        )


# --- Smaller things ------------------------------------------------------------------------------


def _write_all(file: IO[bytes], content: bytes) -> None:
    for place in range(0, len(content), PIECE):
        file.write(memoryview(content)[place : place + PIECE])


def _fill(file: BinaryIO, content: Content) -> None:
    """Write a file's content, and bring it to disk."""
    if callable(content):
        content(file)
    else:
        _write_all(file, content)
    file.flush()
    _sync(file.fileno(), _NO_SYNC)


def _temporary(path: Path) -> Path:
    absolute = path.absolute()
    return absolute.parent / f".{absolute.name}.{uuid4().hex[:8]}.tmp"


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it")


def _owners(path: str | Path, flags: int) -> int:
    """As os.open, for a file that is made to be its owner's alone, whatever the umask; one that is
    there stays so.
    """
    try:
        descriptor = os.open(path, flags | os.O_EXCL, _PRIVATE_FILE)
    except FileExistsError:
        return os.open(path, flags, _PRIVATE_FILE)
    with suppress(OSError):
        os.fchmod(descriptor, _PRIVATE_FILE)
    return descriptor


def _sync(descriptor: int, unsupported: frozenset[int]) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in unsupported:
            raise


def _sync_folder(path: Path) -> None:
    """Bring a folder's entries to disk, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise
    try:
        _sync(descriptor, _NO_FOLDER_SYNC)
    finally:
        os.close(descriptor)


def _sync_folder_of(path: Path) -> None:
    """The last step of writing, after which the content has its name."""
    try:
        _sync_folder(path.absolute().parent)
    except OSError as error:
        raise UserError(
            f"{path} is written, but whether it is on disk is not known: {_why(error)} for "
            f"{path.absolute().parent}"
        ) from error


def _why(error: OSError) -> str:
    return error.strerror or str(error)

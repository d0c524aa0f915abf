"""Paths as their users write them."""

import os
from pathlib import Path

from srfed.errors import UserError


def user_path(text: str | Path) -> Path:
    """A path whose first part may be ``~`` or ``~name``, a home folder.

    Raises:
        UserError: nobody has this name, no home folder is known, or it is not UTF-8, which neither
            a configuration nor TensorBoard can name.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{os.fsencode(text)!r} is not UTF-8; rename it") from error
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{str(text).split('/')[0]} is nobody's home folder here; name the folder itself"
        ) from error


def home_folder() -> Path:
    """The user's.

    Raises:
        UserError: none is known, as in a container whose user is in no list of users.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise UserError(
            f"no home folder is known: HOME is not set, and user {os.getuid()} is in no list of "
            "users; set HOME, or FLWR_HOME, to a folder"
        ) from error


def flower_home() -> Path:
    """Where Flower keeps what is its own; raises UserError as :func:`home_folder`."""
    named = os.environ.get("FLWR_HOME")
    return Path(named) if named else home_folder() / ".flwr"


def absolute_path(text: str | Path) -> Path:
    """:func:`user_path`, as every process finds it, wherever it stands."""
    return user_path(text).absolute()


def relative(path: Path) -> Path:
    """A path as a user in this folder would write it."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path

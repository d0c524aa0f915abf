"""The one exception that a command turns into a single line and exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from srfed.units import escaped


class UserError(Exception):
    """Something the user can mend: its text names what was given, why it fails and what is allowed.

    Whatever it quotes, a file's or a peer's, it is one printable line of bounded length: it goes to
    terminals, logs and records. Everything else that is raised is a defect of ours and keeps its
    traceback.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(escaped(text))


class DamagedError(UserError):
    """A file that is not what was written: it is missing, cut short or altered, and reading it
    again changes nothing.

    What cannot be read for another reason (no permission, too many open files, a network drive that
    is away) may be sound: that is a plain UserError, and no advice to remove anything follows from
    it.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The words ", did you mean ...?" where a known word is close to this one; else nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def optional(module: str, what: str, extra: str) -> Any:
    """A library that srfed does without, where somebody asks for what needs it.

    Args:
        module: what to import.
        what: what needs it, for the error.
        extra: the extra of srfed that installs it.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module}, which cannot be loaded ({' '.join(str(error).split())}); pip "
            f'install "srfed[{extra}]" installs it'
        ) from error

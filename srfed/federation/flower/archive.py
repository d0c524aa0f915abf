"""The archive (FAB) that a SuperLink hands out with a run: what it may hold, looked at before
anything of it is written or run.

Flower's own program unpacks whatever comes, puts the folder first on Python's path, and imports the
app that its ``pyproject.toml`` names. No code of srfed travels, so none of a stranger's may.
"""

import re
import tomllib
import zipfile
from io import BytesIO
from typing import Any

from srfed.units import printable

CLIENT_APP = "srfed.federation.flower.client_app:app"
"""The app that a site runs."""
PROJECT = "pyproject.toml"
ALLOWED = re.compile(
    r"pyproject\.toml|LICENSE(\.md)?|README\.md|\.info/CONTENT"
    r"|configs/[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.yaml"
)
IN_WORDS = "pyproject.toml, configs/*.yaml, LICENSE, README.md and Flower's .info/CONTENT"
MOST_BYTES = 10 * 2**20
"""Of an archive, and of a file in it: what Flower itself allows an archive."""
MOST_FILES = 1000
COMPONENTS = ("serverapp", "clientapp")


class ForeignArchiveError(Exception):
    """An archive is not one of srfed's; the text says why, in printable words."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def check_archive(content: bytes) -> None:
    """Find that an archive holds configurations, and names srfed's ClientApp.

    What it names as ServerApp is the coordinator's own affair: no site runs it, and its code cannot
    be in the archive either.

    Args:
        content: of the archive, as it came.

    Raises:
        ForeignArchiveError: it does not, or cannot be read.
    """
    if len(content) > MOST_BYTES:
        raise ForeignArchiveError(f"it has {len(content)} bytes, and {MOST_BYTES} are the most")
    try:
        project = _project(content)
        components = project["tool"]["flwr"]["app"]["components"]
        named = {key: components[key] for key in sorted(components)}
    except ForeignArchiveError:
        raise
    except Exception as error:
        # Readers of archives and of TOML raise what they please on what is none.
        raise ForeignArchiveError(f"it cannot be read: {type(error).__name__}, {error}") from error
    if set(named) != set(COMPONENTS):
        raise ForeignArchiveError(
            f"it names the components {list(named)}, where {list(COMPONENTS)} are allowed"
        )
    if named["clientapp"] != CLIENT_APP:
        raise ForeignArchiveError(
            f"its clientapp is {named['clientapp']!r}, where {CLIENT_APP!r} is allowed"
        )


def _project(content: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(names) > MOST_FILES:
            raise ForeignArchiveError(f"it has {len(names)} files, and {MOST_FILES} are the most")
        if foreign := [name for name in names if not ALLOWED.fullmatch(name)]:
            raise ForeignArchiveError(
                f"it holds {foreign[0]!r:.100}{_more(foreign)}, where {IN_WORDS} are allowed"
            )
        if len(set(names)) < len(names):
            raise ForeignArchiveError("it holds a file twice")
        if (size := sum(member.file_size for member in members)) > MOST_BYTES:
            raise ForeignArchiveError(f"it unpacks to {size} bytes, and {MOST_BYTES} are the most")
        with archive.open(PROJECT) as file:
            return tomllib.loads(file.read(MOST_BYTES).decode())


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more like it" if len(names) > 1 else ""

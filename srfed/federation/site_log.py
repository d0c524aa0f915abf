"""A deployed site's own log, ``client.log``: what it refuses, what it cannot do, and why the server
refuses it.

Its owner reads it where the site runs; nothing of it travels.
"""

import sys
from contextlib import suppress
from datetime import UTC, datetime

from srfed.errors import UserError
from srfed.federation.site import Site
from srfed.units import escaped_lines, printable


def write_to_log(site: Site | None, about: str, text: str) -> None:
    """Append to a site's log; where that fails, or the site is unknown, all of it goes to standard
    error.

    A deployed site says the last line there in any case, as that is what its owner's service
    manager shows.

    Args:
        site: whose log; None where a message has not come so far as to know.
        about: what it is about, such as the type of a message.
        text: one line, or a traceback.
    """
    about, lines = printable(about), escaped_lines(text.rstrip()) or [""]
    entry = "\n".join([about, *lines])
    on_terminal = f"{datetime.now(UTC).isoformat(timespec='seconds')} {entry}\n"
    if site is not None:
        with suppress(UserError):
            site.note(entry)
            on_terminal = "" if site.data is None else f"{about}: {lines[-1]} (in {site.log})\n"
    with suppress(OSError, ValueError):
        sys.stderr.write(on_terminal)
        sys.stderr.flush()

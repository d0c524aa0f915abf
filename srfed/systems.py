"""On which systems srfed runs; this file and ``srfed/errors.py`` can be loaded on any."""

import sys

from srfed.errors import UserError

TESTED = "linux"
LACKS = {
    "win32": "Windows, which has neither the file locks (fcntl) that keep two processes out of a "
    "run, nor the signals that stop one; under WSL 2 it does",
    "emscripten": "a browser, which has no processes",
    "wasi": "WASI, which has no processes",
}


def check_system(system: str = sys.platform) -> None:
    """Raise UserError on a system that lacks what srfed is built on."""
    if system in LACKS:
        raise UserError(f"srfed does not run on {LACKS[system]}")


def told_of_system(system: str = sys.platform) -> int:
    """Say where a command is begun on a system that lacks something, or is not tested; returns the
    command's exit status where it ends there, else 0.
    """
    try:
        check_system(system)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not system.startswith(TESTED):
        print(
            f"srfed is tested on Linux alone, and not on {system}: without /proc it shows no "
            "memory and finds no process that a killed site has left; resources.backend = inline "
            "does without Ray",
            file=sys.stderr,
        )
    return 0

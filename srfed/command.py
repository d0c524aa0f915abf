"""What every command has in common: one-line errors with exit code 2, and Ctrl-C."""

import sys
from collections.abc import Callable

from srfed.errors import UserError

INTERRUPTED = 130


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code: 0, 2 after one line about what the user can mend, 130 on Ctrl-C."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    return 0

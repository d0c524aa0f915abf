"""A command in this process: its words and exit code, without a start of Python and torch."""

import io
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess

from srfed.__main__ import main


def run_here(*arguments: object, folder: Path | None = None) -> "CompletedProcess[str]":
    """``srfed`` with these arguments, standing in a folder, where nobody can be asked anything."""
    given, out, err = [*map(str, arguments)], io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), _nobody_at_the_terminal():
        try:
            with chdir(folder or "."):
                code = main(given)
        except SystemExit as ended:
            # argparse ends with a number.
            code = ended.code if isinstance(ended.code, int) else 1
    return CompletedProcess(given, code, out.getvalue(), err.getvalue())


@contextmanager
def _nobody_at_the_terminal() -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before

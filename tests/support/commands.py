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


def deploy_here(*arguments: object, folder: Path | None = None) -> "CompletedProcess[str]":
    """A command of ``srfed deploy``."""
    return run_here("deploy", *arguments, folder=folder)


def assert_one_line(done: "CompletedProcess[str]", *words: str) -> None:
    """Exit code 2, and one line on standard error that has the words."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout
    for word in words:
        assert word in done.stderr

"""Make a run's page again: ``srfed report RUN``."""

from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed report",
        description="Make report.html of what a run's folder has by now: verdict, scores, samples, "
        "curves, settings. It is one file that opens without a network. Of a simulation it shows "
        "real training images beside the samples.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    options = parser.parse_args(arguments)
    return run_command(lambda: _report(options.run))


def _report(path: Path) -> None:
    from srfed.paths import relative
    from srfed.storage.run_folder import RunFolder

    run = RunFolder.open(path)
    from srfed.reporting.report import write_report

    print(relative(write_report(run)))

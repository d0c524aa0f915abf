"""List runs: ``srfed runs [FOLDER]``."""

from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed runs",
        description="List the runs in a folder and below it, the oldest first: whether each is "
        "running, finished, stopped, only begun or damaged, its rounds, when it began (UTC), and "
        "its last scores.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _runs(options.folder))


def _runs(folder: Path) -> None:
    from srfed.runs.listing import list_runs
    from srfed.units import printable

    runs = list_runs(folder)
    if not runs:
        print(f"no run in {folder}")
        return
    rows = [("run", "state", "rounds", "began", "headline")] + [
        (
            printable(str(run.path.relative_to(folder)) if run.path != folder else str(run.path)),
            run.state,
            f"{run.rounds[0]}/{run.rounds[1]}" if run.state != "damaged" else "-",
            run.began or "-",
            printable(run.headline),
        )
        for run in runs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]).rstrip())

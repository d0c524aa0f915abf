"""Runs beside each other: ``srfed compare RUN RUN``."""

from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed compare",
        description="Print one table of two or more runs: the settings that differ, and the last "
        "scores with the 95% interval of each run's difference to the first, over the owners that "
        "both have. The same as a picture goes into a PNG.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or one of several runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison.png"),
        metavar="PNG",
        help="where the picture goes (default comparison.png)",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _compare(options.runs, options.out))


def _compare(paths: Sequence[Path], out: Path) -> None:
    from srfed.reporting.comparison import compare_runs, comparison_table, draw_comparison
    from srfed.runs.listing import run_folders

    # Seeds and sweeps are folders of runs.
    runs = [run for path in paths for run in (sorted(run_folders(path)) or [path])]
    compared = compare_runs(runs)
    print("\n".join(comparison_table(compared)))
    draw_comparison(out, compared)
    print(f"\npicture: {out}")

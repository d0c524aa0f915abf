"""Take a run along: ``srfed share RUN OUT`` copies it without what is its owners' alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed share",
        description="Copy a run's folder to pass on: φ, scores, curves, generated samples and "
        "report.html, without real images and without any θ but those that --task names. What was "
        "left out is said, here and in the copy's README.txt. srfed sample, export, report, "
        "compare and adapt take the copy as a run; nobody can go on with its training.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the copy; a new or empty folder")
    parser.add_argument(
        "--task",
        action="extend",
        nargs="+",
        default=[],
        metavar="TASK",
        help="names or positions of tasks whose θ goes along; repeatable; default: none",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _share(options))


def _share(options: argparse.Namespace) -> None:
    from srfed.files import refuse_used
    from srfed.storage.run_folder import RunFolder

    refuse_used(options.out)
    RunFolder.open(options.run)
    # Importing torch takes seconds: what is wrong with the options is said before.
    from srfed.runs.share import share_run

    told = share_run(options.run, options.out, options.task)
    print(f"{options.out}: φ, scores, curves and generated samples{told.kept}")
    print("left out:")
    for what in told.left_out:
        print(f"  {what}")
    for sentence in told.warnings:
        print(sentence)

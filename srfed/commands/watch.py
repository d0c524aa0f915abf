"""A run's page while it goes on: ``srfed watch RUN``."""

from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed watch",
        description="Serve a run's page on this machine alone while the run goes on; a browser "
        "asks for it again every few seconds. It is what `srfed report` writes, and nothing is "
        "written. Ctrl-C ends it, and not the run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="where to listen (0: one that is free)"
    )
    parser.add_argument(
        "--every", type=int, default=5, metavar="SECONDS", help="from page to page (5)"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _watch(options.run, options.port, options.every))


def _watch(path: Path, port: int, every: int) -> None:
    from srfed.errors import UserError
    from srfed.storage.run_folder import RunFolder

    if every < 1:
        raise UserError(f"--every {every} is impossible; allowed: 1 or more")
    if not 0 <= port < 65536:
        raise UserError(f"--port {port} is impossible; allowed: 0 (one that is free) to 65535")
    run = RunFolder.open(path)
    from srfed.reporting.watch import Watch

    watch = Watch(run, port=port, every=every)
    print(f"open {watch.address}\nCtrl-C ends this, and not the run", flush=True)
    try:
        watch.serve()
    finally:
        watch.let_go()

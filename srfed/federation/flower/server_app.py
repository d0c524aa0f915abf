"""The ServerApp: meet the clients, restore or begin the run, hand over to the strategy."""

import logging
import shlex
import sys
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from srfed.config import load_config
from srfed.errors import UserError
from srfed.federation.flower.exchange import StoppedError
from srfed.federation.flower.federated import Federated
from srfed.federation.flower.identity import ROSTER_FILE, read_roster
from srfed.federation.site import run_folder
from srfed.files import write_bytes, write_json
from srfed.paths import user_path
from srfed.reporting.curves import shown_on_terminal
from srfed.reporting.summary import summarise
from srfed.runs.loop import run_rounds
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Begin the run of a run folder, or go on with it; see :func:`begin_or_go_on`.

    Raises:
        UserError: see :func:`run_federation`.
    """
    logging.getLogger("flwr").addFilter(_without_traceback)
    began = time.monotonic()
    run = begin_or_go_on(context)
    run_federation(grid, run)
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    # What it draws with takes a second to import, which the sites need not wait for.
    from srfed.reporting.report import write_report

    write_report(run)
    print(f"\n{summary}", flush=True)


def begin_or_go_on(context: Context) -> RunFolder:
    """The run that ``flwr run --run-config`` names: new, or one that was stopped.

    ``run-dir`` is its folder, ``config`` a YAML file (absolute, or one of the app's own such as
    "configs/mnist.yaml"; by default what the run was begun with, or the embedded digits), ``set``
    holds overrides, separated by spaces; ``roster`` is a file that maps client ids to public keys,
    which the run keeps.

    Raises:
        UserError: the configuration is impossible, or not the one that the run was begun with; the
            roster is none.
    """
    folder = run_folder(context)
    named, overrides, roster = (
        str(context.run_config.get(key) or "") for key in ("config", "set", "roster")
    )
    keys = read_roster(user_path(roster)) if roster else None
    if (folder / "run.json").exists():
        run = RunFolder.open(folder)
        run = run.reconfigure(
            load_config(_config_file(named) or run.config_file, shlex.split(overrides))
        )
    else:
        run = RunFolder.create(folder, load_config(_config_file(named), shlex.split(overrides)))
    if keys is not None:
        write_json(folder / ROSTER_FILE, {"keys": keys})
    return run


def _config_file(name: str) -> Path | None:
    """A configuration file by its path, or by its name in the app's folder, which Flower puts on
    Python's path.
    """
    if not name:
        return None
    candidates = [Path(folder) / name for folder in sys.path]
    return next((file for file in candidates if file.is_file()), Path(name))


def _without_traceback(record: logging.LogRecord) -> bool:
    """Flower logs whatever ends a ServerApp with its traceback; what the user can mend takes one
    line.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | StoppedError):
        record.msg, record.args, record.exc_info = f"error: {error}", None, None
    return True


def run_federation(grid: Grid, run: RunFolder, *, fixed: bool = False) -> None:
    """Train and evaluate until the last round, and show it on the terminal.

    Args:
        grid: where the clients are.
        run: the run's folder.
        fixed: the clients are those of a simulation; one that does not fit is not waited for.

    Raises:
        UserError: too few clients, a damaged checkpoint, a round that fails, a folder in use.
        StoppedError: the user asked to stop.
    """
    run_rounds(run, Federated(grid, run, fixed=fixed), shown_on_terminal(run))

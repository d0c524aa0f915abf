"""The ServerApp: meet the clients, restore or begin the run, hand over to the strategy."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from srfed.config import load_config
from srfed.errors import UserError
from srfed.federation.aggregation import Aggregator, UpdateSum
from srfed.federation.flower.exchange import StoppedError
from srfed.federation.flower.federated import Federated
from srfed.federation.flower.identity import ROSTER_FILE, read_roster
from srfed.federation.run_config import Value, said_overrides, says
from srfed.federation.site import run_folder
from srfed.files import write_bytes, write_json
from srfed.paths import user_path
from srfed.reporting.curves import shown_on_terminal
from srfed.reporting.summary import summarise
from srfed.runs.loop import run_rounds
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

STILL_SECONDS = 0.5
"""A simulation's nodes are complete when there are no more of them after this time."""


def server_app(aggregator: Aggregator = UpdateSum) -> ServerApp:
    """A ServerApp that makes the mean update in this way."""
    own = ServerApp()

    @own.main()
    def serve(grid: Grid, context: Context) -> None:
        main(grid, context, aggregator)

    return own


def main(grid: Grid, context: Context, aggregator: Aggregator = UpdateSum) -> None:
    """Begin the run of a run folder, or go on with it; see :func:`begin_or_go_on`.

    Raises:
        UserError: see :func:`run_federation`.
    """
    logging.getLogger("flwr").addFilter(_without_traceback)
    began = time.monotonic()
    run = begin_or_go_on(context, grid.run.override_config, simulated_nodes(grid))
    if not context.run_config.get("run-dir"):
        print(f"the run's folder is {run.path}", flush=True)
    run_federation(grid, run, aggregator=aggregator)
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    # What it draws with takes a second to import, which the sites need not wait for.
    from srfed.reporting.report import write_report

    write_report(run)
    print(f"\n{summary}", flush=True)


def begin_or_go_on(
    context: Context, typed: Mapping[str, Value] | None = None, nodes: int | None = None
) -> RunFolder:
    """The run that ``flwr run --run-config`` names: new, or one that was stopped.

    ``run-dir`` is its folder, ``config`` a YAML file (absolute, or one of the app's own such as
    "configs/mnist.yaml"; by default what the run was begun with, or the app's own table), ``set``
    holds overrides, separated by spaces, and every setting is a key of its own besides; ``roster``
    is a file that maps client ids to public keys, which the run keeps.

    Args:
        context: of the ServerApp.
        typed: what of its run configuration was typed.
        nodes: the nodes of Flower's simulation; None where the nodes are real. There are as many
            clients as nodes where nobody has said how many.

    Raises:
        UserError: the configuration is impossible, or not the one that the run was begun with, or
            not that of so many nodes; the roster is none.
    """
    folder = run_folder(context)
    named, roster = (str(context.run_config.get(key) or "") for key in ("config", "roster"))
    keys = read_roster(user_path(roster)) if roster else None
    found = RunFolder.open(folder) if (folder / "run.json").exists() else None
    overrides = said_overrides(
        context.run_config, typed or {}, table_counts=not named and found is None
    )
    if nodes and not named and found is None and not says(overrides, "federation", "clients"):
        overrides.append(f"federation.clients={nodes}")
    file = _config_file(named)
    if found is not None:
        config = load_config(file or found.config_file, overrides)
    else:
        config = load_config(file, overrides)
    if nodes and nodes != config.federation.clients:
        raise UserError(
            f"federation.clients = {config.federation.clients} needs as many simulated SuperNodes, "
            f"and there are {nodes}; run it with --federation-config "
            f"num-supernodes={config.federation.clients}"
        )
    run = RunFolder.create(folder, config) if found is None else found.reconfigure(config)
    if keys is not None:
        write_json(folder / ROSTER_FILE, {"keys": keys})
    return run


def simulated_nodes(grid: Grid) -> int | None:
    """How many nodes Flower's simulation has, which makes them one by one while this waits; None
    where the nodes are real.
    """
    if not isinstance(grid, InMemoryGrid):
        return None
    seen, count = 0, len(list(grid.get_node_ids()))
    while not count or count != seen:
        time.sleep(STILL_SECONDS)
        seen, count = count, len(list(grid.get_node_ids()))
    return count


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


def run_federation(
    grid: Grid, run: RunFolder, *, fixed: bool = False, aggregator: Aggregator = UpdateSum
) -> None:
    """Train and evaluate until the last round, and show it on the terminal.

    Args:
        grid: where the clients are.
        run: the run's folder.
        fixed: the clients are those of a simulation; one that does not fit is not waited for.
        aggregator: makes the mean update of a round's accepted ones.

    Raises:
        UserError: too few clients, a damaged checkpoint, a round that fails, a folder in use.
        StoppedError: the user asked to stop.
    """
    federated = Federated(grid, run, fixed=fixed, aggregator=aggregator)
    run_rounds(run, federated, shown_on_terminal(run))


app = server_app()

"""The Ray grid: Flower's simulation engine, its clients in parallel processes."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import ray
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from srfed.config import RunConfig
from srfed.cores import usable_cores
from srfed.environment import surroundings_kept
from srfed.errors import UserError
from srfed.evaluation.metrics.own import OwnMetrics
from srfed.federation import report_nothing
from srfed.federation.flower.client_app import app as own_client_app
from srfed.federation.flower.exchange import stop_requested
from srfed.federation.flower.federated import Federated
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.interrupts import SIGNALS, Interrupted
from srfed.observer import Observer
from srfed.runs.loop import run_rounds
from srfed.storage.run_folder import RunFolder
from srfed.work import COUNTS_VARIABLE, counted_together

INSTEAD = "resources.backend = inline (--backend inline) does without Ray"


def run_on_ray(
    run: RunFolder,
    observers: Iterable[Observer] = (),
    client_app: ClientApp = own_client_app,
    metrics: OwnMetrics | None = None,
) -> None:
    """The whole run under Flower's Ray simulation.

    As many clients run at once as ``resources`` leaves room for, each on its own threads.

    Raises:
        UserError: Ray cannot start, or cannot start the clients; otherwise as
            :func:`srfed.runs.loop.run_rounds`.
    """
    resources, clients = run.config.resources, run.config.federation.clients
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        run_rounds(run, Federated(grid, run, fixed=True, metrics=metrics), observers)

    with run.in_use(), _nothing_left_behind(), counted_together():
        client_gpus = _start_ray(run)
        try:
            run_simulation(
                server_app,
                client_app,
                num_supernodes=clients,
                backend_config={
                    "client_resources": {"num_cpus": resources.client_cpus, "num_gpus": client_gpus}
                },
            )
        except RuntimeError as error:
            # Flower's engine has ended, and the server, in its own thread, would go on waiting for
            # clients.
            stop_requested.set()
            if not isinstance(error.__cause__, RuntimeError):
                raise
            raise UserError(
                f"the simulation under Ray has ended: {_first_reason(error)}; {INSTEAD}"
            ) from error


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """What Flower and Ray change in this process is put back: environment, log level, warnings."""
    log = logging.getLogger("flwr")
    level = log.level
    # What happens to a client is in the run's own lines, what ends the simulation in the error.
    log.setLevel(logging.CRITICAL)
    try:
        with surroundings_kept():
            # What a run before this one has put back.
            report_nothing()
            # Ray announces a change of what clients without a GPU see; here they are to see none.
            warnings.filterwarnings(
                "ignore", message=".*accelerator visible devices", category=FutureWarning
            )
            yield
    finally:
        log.setLevel(level)


def _start_ray(run: RunFolder) -> float:
    """Start a Ray of the simulation's own, here and now, whatever RAY_ADDRESS says; Flower then
    finds it.

    Returns:
        The share of a GPU of each client.

    Raises:
        UserError: it does not start, or there is no room for a client.
    """
    config = run.config
    resources, clients = config.resources, config.federation.clients
    cores = min(resources.cpus or usable_cores(), clients * resources.client_cpus)
    # Ray's processes do not inherit what Python has put on its path since it started.
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray takes SIGTERM for itself, and aborts; a signal is to stop the run between two replies.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    main_thread = threading.current_thread() is threading.main_thread()
    try:
        ray.init(
            address="local",
            num_cpus=cores,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={
                "env_vars": {
                    "PYTHONPATH": path,
                    STATE_DIR_VARIABLE: str(run.clients),
                    COUNTS_VARIABLE: os.environ.get(COUNTS_VARIABLE, ""),
                    # Each actor would start its own pool of threads for all cores before the first
                    # message arrives.
                    "OMP_NUM_THREADS": str(resources.client_cpus),
                }
            },
        )
    except SystemExit:
        raise Interrupted(signal.SIGTERM) from None
    except Exception as error:
        # Ray raises what its parts raise: OSError, ValueError, ConnectionError, RuntimeError and
        # its own.
        reason = _first_reason(error)
        shorter = "; name a shorter folder in TMPDIR" if "AF_UNIX path length" in reason else ""
        raise UserError(f"Ray cannot start: {reason}{shorter}; {INSTEAD}") from error
    finally:
        for number, handler in handlers.items() if main_thread else ():
            signal.signal(number, handler)
    return client_share(config, ray.cluster_resources().get("GPU", 0.0), cores)  # type: ignore[no-untyped-call]


def client_share(config: RunConfig, gpus: float, cores: int) -> float:
    """The share of a GPU of each client: what the run says, or equal ones for as many clients as
    the cores run at once.

    Args:
        config: the run's configuration.
        gpus: GPUs that Ray finds.
        cores: cores for all clients together.

    Raises:
        UserError: the run asks for more than there is.
    """
    resources, asked = config.resources, config.resources.client_gpus
    if asked is not None and asked > gpus:
        raise UserError(
            f"resources.client_gpus = {asked} is above the {gpus:g} GPUs that Ray finds"
        )
    if resources.device == "cpu":
        return 0.0
    if resources.device == "cuda" and not gpus:
        raise UserError("resources.device = cuda, but Ray finds no GPU here; allowed: auto, cpu")
    if asked is not None:
        return asked
    # Ray counts shares in ten-thousandths; rounded down, so that all fit.
    at_once = max(1, min(config.federation.clients, cores // resources.client_cpus))
    return min(1.0, int(10_000 * gpus / at_once) / 10_000)


def _first_reason(error: BaseException) -> str:
    """What began it, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__

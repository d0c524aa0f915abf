"""The Ray grid: Flower's simulation engine, its clients in parallel processes."""

import logging
import os
import signal
import sys
import warnings

import ray
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from srfed.command import SIGNALS, Interrupted
from srfed.config import RunConfig
from srfed.cores import usable_cores
from srfed.errors import UserError
from srfed.federation.exchange import stop_requested
from srfed.federation.server_app import RUN_DIR_VARIABLE
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.reporting.run_directory import RunDirectory

INSTEAD = "resources.backend = inline (--backend inline) does without Ray"


def run_on_ray(run: RunDirectory, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run both apps under Flower's Ray simulation until the server is done; raises what the server raises.

    As many clients run at once as ``resources`` leaves room for, each on its own threads.

    Raises:
        UserError: Ray cannot start, or cannot start the clients.
    """
    resources, clients = run.config.resources, run.config.federation.clients
    # Ray's processes inherit the environment, and Flower's simulation takes no run configuration.
    os.environ[RUN_DIR_VARIABLE] = str(run.path)
    os.environ[STATE_DIR_VARIABLE] = str(run.clients)
    # Each actor would start its own pool of threads for all cores before the first message arrives.
    os.environ["OMP_NUM_THREADS"] = str(resources.client_cpus)
    # What happens to a client is in the run's own lines, what ends the simulation in the error.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # Ray announces a change of what clients without a GPU see; here they are to see none.
    warnings.filterwarnings("ignore", message=".*accelerator visible devices", category=FutureWarning)
    with run.in_use():
        _start_ray(run.config)
        try:
            run_simulation(
                server_app,
                client_app,
                num_supernodes=clients,
                backend_config={
                    "client_resources": {"num_cpus": resources.client_cpus, "num_gpus": resources.client_gpus}
                },
            )
        except RuntimeError as error:
            # Flower's engine has ended, and the server, in its own thread, would go on waiting for clients.
            stop_requested.set()
            if not isinstance(error.__cause__, RuntimeError):
                raise
            raise UserError(f"the simulation under Ray has ended: {_first_reason(error)}; {INSTEAD}") from error


def _start_ray(config: RunConfig) -> None:
    """Start a Ray of the simulation's own, here and now, whatever RAY_ADDRESS says; Flower then finds it.

    Raises:
        UserError: it does not start, or there is no room for a client.
    """
    resources, clients = config.resources, config.federation.clients
    # Ray's processes do not inherit what Python has put on its path since it started.
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray takes SIGTERM for itself, and aborts; a signal is to stop the run between two replies.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(
            address="local",
            num_cpus=min(resources.cpus or usable_cores(), clients * resources.client_cpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except SystemExit:
        raise Interrupted(signal.SIGTERM) from None
    except Exception as error:
        # Ray raises what its parts raise: OSError, ValueError, ConnectionError, RuntimeError and its own.
        reason = _first_reason(error)
        shorter = "; name a shorter folder in TMPDIR" if "AF_UNIX path length" in reason else ""
        raise UserError(f"Ray cannot start: {reason}{shorter}; {INSTEAD}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if resources.client_gpus > gpus:
        raise UserError(f"resources.client_gpus = {resources.client_gpus} is above the {gpus:g} GPUs that Ray finds")


def _first_reason(error: BaseException) -> str:
    """What began it, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__

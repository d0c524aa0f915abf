"""The Ray grid: Flower's simulation engine, its clients in parallel processes."""

import logging
import os
import warnings

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from srfed.federation.server_app import RUN_DIR_VARIABLE
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.reporting.run_directory import RunDirectory


def run_on_ray(run: RunDirectory, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run both apps under Flower's Ray simulation until the server is done; raises what the server raises.

    As many clients run at once as ``resources`` leaves room for, each on its own threads.
    """
    resources, clients = run.config.resources, run.config.federation.clients
    cores = resources.cpus or os.cpu_count() or 1
    # Ray's processes inherit the environment, and Flower's simulation takes no run configuration.
    os.environ[RUN_DIR_VARIABLE] = str(run.path)
    os.environ[STATE_DIR_VARIABLE] = str(run.clients)
    # Each actor would start its own pool of threads for all cores before the first message arrives.
    os.environ["OMP_NUM_THREADS"] = str(resources.client_cpus)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # Ray announces a change of what clients without a GPU see; here they are to see none.
    warnings.filterwarnings("ignore", message=".*accelerator visible devices", category=FutureWarning)
    with run.in_use():
        run_simulation(
            server_app,
            client_app,
            num_supernodes=clients,
            backend_config={
                "init_args": {
                    "num_cpus": min(cores, clients * resources.client_cpus),
                    "include_dashboard": False,
                    "log_to_driver": False,
                    "logging_level": logging.ERROR,
                },
                "client_resources": {"num_cpus": resources.client_cpus, "num_gpus": resources.client_gpus},
            },
        )

"""A whole run with its clients in Ray's processes."""

from collections.abc import Iterable

from flwr.clientapp import ClientApp
from ray.exceptions import RayError

from srfed.errors import UserError
from srfed.evaluation.metrics.own import OwnMetrics
from srfed.federation.flower.client_app import app as own_client_app
from srfed.federation.flower.federated import Federated
from srfed.federation.flower.in_process import identity_kept
from srfed.federation.flower.ray_grid import RayGrid, reason_of_death
from srfed.federation.flower.ray_head import INSTEAD
from srfed.federation.flower.ray_start import started_ray
from srfed.observer import Observer
from srfed.runs.loop import run_rounds
from srfed.storage.run_folder import RunFolder
from srfed.work import counted_together


def run_on_ray(
    run: RunFolder,
    observers: Iterable[Observer] = (),
    client_app: ClientApp = own_client_app,
    metrics: OwnMetrics | None = None,
) -> None:
    """The whole run under Ray: one of its own, or the cluster at ``resources.ray_address``.

    As many clients run at once as ``resources`` leaves room for, each on its own threads.

    Raises:
        UserError: Ray cannot start, or cannot start the clients; otherwise as
            :func:`srfed.runs.loop.run_rounds`.
    """
    with (
        run.in_use(),
        started_ray(run) as (room, wanted, folder),
        counted_together(folder),
        identity_kept(),
    ):
        try:
            clients = run.config.federation.clients
            grid = RayGrid(client_app, clients, run.clients, room, wanted)
            federated = Federated(grid, run, fixed=True, metrics=metrics, place=room.place)
            run_rounds(run, federated, observers)
        except RayError as error:
            raise UserError(
                f"the simulation under Ray has ended: {reason_of_death(error)}; {INSTEAD}"
            ) from error

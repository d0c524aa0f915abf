"""Simulate a federation on this machine: ``python -m srfed.simulate --clients 10``."""

from collections.abc import Sequence
from pathlib import Path

from srfed.command import run_command, stopping_gently
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.storage.run_folder import RunFolder
from srfed.train_command import check_training, train_by_command, training_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = training_parser(
        "srfed.simulate",
        "Train one diffusion model over n simulated clients that never share an image.",
    )
    parser.add_argument("--backend", metavar="NAME", help="ray or inline (resources.backend)")
    options = parser.parse_args(arguments)
    further = {"resources.backend": options.backend}
    return run_command(lambda: train_by_command("srfed.simulate", options, further, check, _run))


def check(
    config: RunConfig, record: Path | None = None, *, allow_changed_images: bool = False
) -> None:
    """Look for everything that would fail later; raises UserError as :func:`check_training`
    does.
    """
    if config.training.method != "federated":
        raise UserError(
            f"training.method = {config.training.method} is for python -m srfed.centralise"
        )
    check_training(config, record, allow_changed_images=allow_changed_images)


def _run(run: RunFolder) -> None:
    """Start the apps on the configured backend; a signal stops between two replies."""
    from srfed.federation.flower.client_app import app as client_app
    from srfed.federation.flower.exchange import StoppedError, stop_requested
    from srfed.federation.flower.in_process import run_inline
    from srfed.federation.flower.server_app import app as server_app

    with stopping_gently(stop_requested, StoppedError):
        if run.config.resources.backend == "ray":
            from srfed.federation.flower.ray import run_on_ray

            run_on_ray(run, server_app, client_app)
        else:
            run_inline(run, server_app, client_app)


if __name__ == "__main__":
    raise SystemExit(main())

"""The front door: train a run, open one, and work with what it has learned."""

from collections.abc import Iterable

from srfed.observer import Observer
from srfed.runs.loop import run_rounds
from srfed.storage.run_folder import RunFolder


def train_run(run: RunFolder, observers: Iterable[Observer] = ()) -> None:
    """Train what a run's folder asks for, to its last evaluation, as its configuration says.

    Args:
        run: the folder; where there is a checkpoint, the run goes on from it.
        observers: told what happens; without one nothing is printed.

    Raises:
        UserError: the run cannot be finished; and whatever an observer raises. All finished rounds
            are on disk.
    """
    if run.config.training.method != "federated":
        from srfed.runs.centralised import Centralised

        run_rounds(run, Centralised(run), observers)
    elif run.config.resources.backend == "ray":
        from srfed.federation.flower.ray import run_on_ray

        run_on_ray(run, observers)
    else:
        from srfed.federation.flower.in_process import run_in_process

        run_in_process(run, observers)

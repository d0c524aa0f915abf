"""What is looked at before a run begins, so that nothing fails later; and whether it has ended."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srfed.config import RunConfig
from srfed.config.choices import UPDATE_STEPS, make
from srfed.cores import check_resources
from srfed.errors import UserError
from srfed.files import held
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import LOCK, RunFolder

if TYPE_CHECKING:
    import torch

    from srfed.data import Task


def check_simulation(
    config: RunConfig,
    record: Path | None = None,
    *,
    allow_changed_images: bool = False,
    meanwhile: Callable[[RunConfig], None] | None = None,
) -> list["Task"]:
    """As :func:`check_training`, of a federation, and say which images hold next to nothing; raises
    UserError for a centralised method.
    """
    if config.training.method != "federated":
        raise UserError(f"training.method = {config.training.method} is for srfed centralise")
    tasks = check_training(
        config, record, allow_changed_images=allow_changed_images, meanwhile=meanwhile
    )
    return _told(config, tasks)


def check_centralised(
    config: RunConfig, record: Path | None = None, *, allow_changed_images: bool = False
) -> list["Task"]:
    """As :func:`check_training`, centralised, and say which images hold next to nothing; raises
    UserError for a federation.
    """
    if config.training.method == "federated":
        raise UserError(
            "training.method = federated is for python -m srfed.simulate; allowed here: pooled, "
            "one_task, balanced"
        )
    return _told(config, check_training(config, record, allow_changed_images=allow_changed_images))


def check_training(
    config: RunConfig,
    record: Path | None = None,
    *,
    allow_changed_images: bool = False,
    meanwhile: Callable[[RunConfig], None] | None = None,
) -> list["Task"]:
    """Look for everything that would fail later, before anything is written or started.

    Args:
        config: the run's configuration.
        record: of the images that the run was begun with; None for a new run.
        allow_changed_images: put other images on record, and say so, instead of refusing them.
        meanwhile: begins what can start while PyTorch is imported, when settings and images are
            known to be right.

    Returns:
        The tasks.

    Raises:
        UserError: data, batch size, device, partition, parts of one's own, feature network or cores
            do not fit; images have changed.
    """
    if config.data.dataset == "sites":
        raise UserError(
            "data.dataset = sites is for deployed sites (docs/deployment.md); for a simulation "
            "name a data set, for example --set data.dataset=folder --data-dir DIR"
        )
    # Importing torch takes seconds: what is wrong with settings and images is said before.
    from srfed.data import load_recorded_tasks, load_tasks, record_tasks
    from srfed.data.tasks import check_one_shape

    training = config.training
    check_resources(config.resources, federated=training.method == "federated")
    if record is None:
        tasks = load_tasks(config.data, config.federation.clients)
    else:
        tasks = load_recorded_tasks(
            config.data,
            config.federation.clients,
            record,
            _say_on_stderr if allow_changed_images else None,
        )
    check_held_out(config, tasks)
    if meanwhile is not None:
        meanwhile(config)
    import torch

    from srfed.device import check_share_of_gpu, device_of_clients, resolve_device
    from srfed.evaluation.features.load import load_feature_network
    from srfed.evaluation.generation import build_sampler
    from srfed.model import build_objective, shared_of
    from srfed.runs.repeatable import check_repeatable
    from srfed.training.centralised import centralised_orders
    from srfed.training.minibatches import MinibatchOrder

    if training.method == "federated":
        where = device_of_clients(config.resources)
        check_share_of_gpu(config.resources)
    else:
        where = resolve_device(config.resources)
    # What is only looked at needs no GPU, and the driver of a Ray run is to hold no part of one.
    device = torch.device("cpu")
    if training.method != "federated":
        check_one_shape(tasks, f"training.method = {training.method}")
        centralised_orders(config, {task.name: len(task.train) for task in tasks})
    for task in tasks:
        if training.method == "federated":
            MinibatchOrder.of(
                training, len(task.train), training.batch_size, config.seed, task.name
            )
    shared_of(config, sorted({task.shape[-1] for task in tasks}))
    objective = build_objective(config, device)
    for shape in sorted({task.shape for task in tasks}):
        check_repeatable(config, objective, shape, where)
    build_sampler(config.sampling)
    for step in config.updates.steps:
        make(UPDATE_STEPS, step, config.updates)
    if where.type == "cuda" and config.resources.backend == "inline":
        _try_stack(config, tasks, where)
    load_feature_network(
        config.evaluation.feature_network, config.evaluation.inception_weights, device
    )
    if record is not None:
        if not record.exists():
            _say_on_stderr(
                f"the run has no record of its images, so they cannot be compared; {record} is "
                "begun now"
            )
        with held(record.parent / LOCK, wait=False):
            record_tasks(record, tasks)
    return tasks


def check_held_out(config: RunConfig, tasks: Sequence["Task"]) -> None:
    """Raise UserError where the tasks' images are too few for a score.

    In ``samples`` mode all tasks together need two of either side; in ``statistics`` mode each
    does, as the mean of one image's features is that image's.
    """
    each = config.evaluation.mode == "statistics"
    groups = [[task] for task in tasks] if each else [tasks]
    for group in groups:
        sides = {
            "training": sum(len(task.train) for task in group),
            "held-out": sum(len(task.test) for task in group),
        }
        for side, count in sides.items():
            if count < 2:
                who = f"task {group[0].name}" if len(group) == 1 else "all tasks together"
                why = (
                    "evaluation.mode = statistics needs 2 of each task"
                    if each
                    else "a score needs 2 of all tasks together"
                )
                raise UserError(
                    f"data.test_fraction = {config.data.test_fraction} gives {count} {side} "
                    f"image{'' if count == 1 else 's'} of {who}, and {why}; allowed: a share that "
                    "leaves 2, more images, or a split of your own"
                    + (", or evaluation.mode=samples" if each else "")
                )


def _try_stack(config: RunConfig, tasks: Sequence["Task"], device: "torch.device") -> None:
    """Raise UserError where a stack is too large for the memory of the GPU that it trains on."""
    from srfed.room import release
    from srfed.training.one_step import take_one_step

    if config.resources.owners_stacked == 1:
        return
    take_one_step(config, tasks, device)
    release()


def finished(run: RunFolder) -> bool:
    """Whether the run has its last evaluation, and so nothing is left to do."""
    last = run.config.federation.rounds
    # A checkpoint that was removed takes the run back, whatever its log says.
    return run.last_round == last and any(
        line["final"] and line["round"] == last for line in MetricsLog(run.metrics).evaluations()
    )


def _told(config: RunConfig, tasks: list["Task"]) -> list["Task"]:
    from srfed.data import describe_contents

    for line in describe_contents(config.data, tasks):
        _say_on_stderr(line)
    return tasks


def _say_on_stderr(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)

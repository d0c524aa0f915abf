"""One step of a run before it begins: whether there is memory for it, and how much it takes."""

from collections.abc import Sequence
from math import prod

import torch

from srfed.config import RunConfig
from srfed.data import Task
from srfed.device import memory_layout
from srfed.flat import copies
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.training.local import Job, LocalTrainer, train_owners
from srfed.training.part import initial_state
from srfed.training.step import LocalStep


def take_one_step(config: RunConfig, tasks: Sequence[Task], device: torch.device) -> None:
    """Take the largest step of a federation, with the images of all its tasks on the device, as a
    process of simulated clients has them; nothing of it is kept.

    Args:
        config: of a simulation; where it has a stack, the step is of as many owners.
        tasks: all of its tasks.
        device: where.

    Raises:
        UserError: there is not enough memory; the text says what would fit.
    """
    one_step = {"local_steps": 1, "local_epochs": None, "exclusive_steps": None}
    short = config.model_copy(update={"training": config.training.model_copy(update=one_step)})
    # The first has the largest minibatch.
    by_size = sorted(tasks, key=lambda task: (prod(task.shape), len(task.train)), reverse=True)
    model = build_model(short, by_size[0].shape[-1])
    partition = build_partition(short, model)
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    state = initial_state(model, partition)
    layout = memory_layout(short.resources)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    objective = build_objective(short, device)
    alone = LocalStep(short, model, partition, objective)
    jobs = [
        Job(
            LocalTrainer(
                short, model, partition, objective, task.name, task.train, task.index, alone
            ),
            1,
            shared,
            state,
        )
        for task in by_size
    ]
    stack = short.resources.owners_stacked
    if stack == 1:
        jobs[0].trainer.run_alone(jobs[0])
        return
    together = [job for job in jobs if job.form == jobs[0].form][:stack]
    # One by itself is put beside itself, as in training.
    together = [*together, *together][: max(2, len(together))]
    step = LocalStep(short, model, partition, objective, len(together))
    train_owners(short, step, together)

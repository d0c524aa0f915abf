"""How many processes of simulated clients a GPU has memory for."""

from math import prod

import torch

from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.federation.worker import Worker
from srfed.training.local import Job

CONTEXT = 2**29
"""Bytes of a GPU that a process takes beside its tensors, about: CUDA's context and kernels."""


def processes_that_fit(config: RunConfig, device: torch.device) -> int:
    """Take one step of the run, and see how many processes that do so have room on the GPU.

    A process serves many clients, and keeps the images of each on the GPU, so those of all are
    there. What others hold of the GPU is not counted as room. This process is not to have used the
    GPU before.

    Args:
        config: of a simulation.
        device: the GPU.

    Returns:
        At least 1.

    Raises:
        UserError: images cannot be read, or there is not enough memory for a single step.
    """
    one_step = {"local_steps": 1, "local_epochs": None, "exclusive_steps": None}
    short = config.model_copy(update={"training": config.training.model_copy(update=one_step)})
    tasks = load_tasks(config.data, config.federation.clients)
    # The first has the largest minibatch.
    tasks.sort(key=lambda task: (prod(task.shape), len(task.train)), reverse=True)
    worker = Worker(short, tasks[0].shape[-1])
    trainers = [worker.new_trainer(task.name, task.train, task.index) for task in tasks]
    shared, state = worker.beginning
    jobs = [Job(trainer, 1, shared, state) for trainer in trainers]
    if (most := config.resources.owners_stacked) == 1:
        trainers[0].run_alone(jobs[0])
    else:
        worker.run_together([job for job in jobs if job.form == jobs[0].form][:most])
    taken = torch.cuda.max_memory_reserved(device) + CONTEXT
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, (free + taken) // taken)

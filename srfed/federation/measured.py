"""How many processes of simulated clients a GPU has memory for."""

import torch

from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.training.one_step import take_one_step

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
    take_one_step(config, load_tasks(config.data, config.federation.clients), device)
    taken = torch.cuda.max_memory_reserved(device) + CONTEXT
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, (free + taken) // taken)

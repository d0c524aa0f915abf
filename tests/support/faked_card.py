"""A GPU that is made up, for processes of Ray's: it has a name and 80 GiB, of which a step takes
30. What is computed on it is computed on the CPU.
"""

from collections.abc import Sequence

import torch

from srfed.config import RunConfig
from srfed.data import Task
from srfed.federation import measured
from srfed.federation.flower import ray_node
from srfed.federation.measured import CONTEXT
from srfed.training.one_step import take_one_step

GIB = 2**30
CPU = torch.device("cpu")


def on_the_cpu(config: RunConfig, tasks: Sequence[Task], device: torch.device) -> None:
    """The real step, not on the device that is made up."""
    assert device.type == "cuda"
    take_one_step(config, tasks, CPU)


def look_at_gpu(config: RunConfig, *, measure: bool) -> ray_node.Seen | str:
    """The real one, in a process of its own."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    torch.cuda.max_memory_reserved = lambda device=None: 30 * GIB - CONTEXT
    torch.cuda.mem_get_info = lambda device=None: (50 * GIB, 80 * GIB)
    measured.take_one_step = on_the_cpu
    return ray_node.look_at_gpu(config, measure=measure)

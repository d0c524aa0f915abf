"""A GPU that is made up, for processes of Ray's: it has a name and 80 GiB, of which a step takes
30. What is computed on it is computed on the CPU.
"""

import torch

from srfed.config import RunConfig
from srfed.federation import worker
from srfed.federation.flower import ray_node
from srfed.federation.measured import CONTEXT

GIB = 2**30


def look_at_gpu(config: RunConfig, *, measure: bool) -> ray_node.Seen | str:
    """The real one, in a process of its own."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    torch.cuda.max_memory_reserved = lambda device=None: 30 * GIB - CONTEXT
    torch.cuda.mem_get_info = lambda device=None: (50 * GIB, 80 * GIB)
    worker.resolve_device = lambda resources: torch.device("cpu")
    return ray_node.look_at_gpu(config, measure=measure)

"""Where and how a run computes: its device, its arithmetic, and work captured as CUDA graphs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from srfed.config import ResourcesConfig
from srfed.errors import UserError
from srfed.records import Place

WARM_UP_CALLS = 3
"""Before a capture, so that libraries have chosen their algorithms and made their workspaces (CUDA
semantics).
"""


def resolve_device(resources: ResourcesConfig) -> torch.device:
    """The device of ``resources.device``.

    Raises:
        UserError: CUDA, or a precision that needs it, is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if resources.device == "cuda" and not available:
        raise UserError(
            "resources.device = cuda, but PyTorch finds no CUDA device here; allowed: auto, cpu"
        )
    device = torch.device("cpu")
    if available and resources.device != "cpu":
        # With its index, because tensors have one and devices are compared. Who only asks, as the
        # driver of a Ray run, is not to hold a part of the GPU's memory for having asked.
        held = torch.cuda.is_initialized()
        device = torch.device("cuda", torch.cuda.current_device() if held else 0)
    if resources.precision != "float32" and device.type == "cpu":
        raise UserError(
            f"resources.precision = {resources.precision} needs CUDA, and there is none here; "
            "allowed: float32"
        )
    return device


def device_of_clients(resources: ResourcesConfig) -> torch.device:
    """Where simulated clients train, as far as this machine can tell: for a share of no GPU, and
    for the nodes of somebody's cluster, which say so themselves, the CPU. Raises UserError as
    :func:`resolve_device`.
    """
    elsewhere = resources.ray_address is not None
    if elsewhere or (resources.backend == "ray" and resources.client_gpus == 0):
        return torch.device("cpu")
    return resolve_device(resources)


def gpus_here() -> int:
    """How many GPUs this process may use; to ask takes nothing of their memory."""
    return torch.cuda.device_count()


def check_share_of_gpu(resources: ResourcesConfig) -> None:
    """Raise UserError where clients under a Ray of the run's own are to have more GPUs than there
    are.
    """
    asked, here = resources.client_gpus, gpus_here()
    if resources.backend == "ray" and resources.ray_address is None and (asked or 0) > here:
        raise UserError(
            f"resources.client_gpus = {asked} is above the {here} GPUs that PyTorch finds here; "
            "allowed: null" + (", or at most 1" if here else ", 0")
        )


def place_of(resources: ResourcesConfig, device: torch.device) -> Place:
    """The device and the precision of who trains in this process, which begins to use the GPU for
    its name.
    """
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return Place(f"{device.type}{name}", resources.precision)


def memory_layout(resources: ResourcesConfig) -> torch.memory_format:
    """How images and weights lie in memory."""
    return torch.channels_last if resources.channels_last else torch.contiguous_format


def autocast(resources: ResourcesConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context in which forward passes run: bfloat16 autocast where the run asks for it."""
    if resources.precision != "bfloat16":
        return nullcontext()
    # No cache of cast weights: each is used once a pass, and a captured pass must cast them anew.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def most_in_a_program(device: str, channels: int) -> int:
    """How many owners' networks go through one program, at most, for images of so many channels.

    A CPU's library sums a convolution otherwise where the owners' images have eight channels
    together, or more: an owner's bits would depend on who else is there.
    """
    return sys.maxsize if device.startswith("cuda") else max(2, 7 // channels)


def batched_attention(device: torch.device) -> AbstractContextManager[None]:
    """The context in which attention of several owners' networks at once is one call: for a CPU's
    fused kernel torch would call it owner by owner, and warn.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def arithmetic(resources: ResourcesConfig, device: torch.device) -> Iterator[None]:
    """Within it, a GPU multiplies and repeats itself as ``precision`` and ``deterministic`` say; a
    CPU always does.

    PyTorch's own default takes TF32 (10 bits of mantissa) for convolutions and float32 for matrix
    products. What was set before is set again afterwards, as these are switches of the whole
    process.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    repeatable = cudnn.deterministic
    try:
        for switch in switches:
            switch.fp32_precision = "ieee" if resources.precision == "float32" else "tf32"
        cudnn.deterministic = resources.deterministic
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
        cudnn.deterministic = repeatable


class Captured:
    """A function of tensors whose kernels are queued as one: a CUDA graph for each shape of its
    arguments.

    Small networks wait for Python to queue their kernels far longer than the kernels take. On a CPU
    a call is a call of the function.

    Args:
        function: (tensors) -> a tensor. What else it reads or writes must stay where it is in
            memory; it may not wait for the device, and may draw from the default generator only.
        device: where the arguments are.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._graphs: dict[
            tuple[object, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]
        ] = {}

    def prepare(self, *arguments: Tensor) -> None:
        """Capture for arguments like these, if not done yet; the function is called, with all that
        it changes.
        """
        if self._device.type == "cuda" and _shapes(arguments) not in self._graphs:
            self._capture(arguments)

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's result; on CUDA it is overwritten by the next call of the same shapes."""
        if self._device.type != "cuda":
            return self._function(*arguments)
        self.prepare(*arguments)
        graph, inputs, output = self._graphs[_shapes(arguments)]
        for there, given in zip(inputs, arguments, strict=True):
            there.copy_(given, non_blocking=True)
        graph.replay()
        return output

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        inputs = tuple(argument.detach().clone() for argument in arguments)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                self._function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, Flower's and Ray's, may go on using the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._function(*inputs)
        self._graphs[_shapes(arguments)] = graph, inputs, output


def captured_forward(
    model: Callable[..., Tensor], resources: ResourcesConfig, device: torch.device
) -> Captured:
    """A model's forward pass, captured where there is CUDA, in the run's arithmetic and precision
    (of 16 bits under autocast); weights may change in place.
    """

    def forward(*arguments: Tensor) -> Tensor:
        with arithmetic(resources, device), autocast(resources, device):
            return model(*arguments)

    return Captured(forward, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from the CPU to a GPU without waiting for what is queued there."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _shapes(arguments: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple((argument.shape, argument.stride(), argument.dtype) for argument in arguments)

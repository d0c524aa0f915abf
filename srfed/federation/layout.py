"""What tensors a message holds, without their values: name, dtype, shape, in their order."""

import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from srfed.flat import joined

Layout = list[tuple[str, str, tuple[int, ...]]]


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Name, dtype and shape of tensors, in their order."""
    return [
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def layout_bytes(layout: Layout) -> bytes:
    """A layout as it travels: JSON, one way to write it."""
    return json.dumps(layout, separators=(",", ":")).encode()


def value_count(layout: Layout) -> int:
    """How many values tensors of a layout have together."""
    return sum(math.prod(shape) for _, _, shape in layout)


def value_bytes(layout: Layout) -> int:
    """Bytes of all values of a layout's tensors."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in layout)


def zeros_of(layout: Layout) -> dict[str, Tensor]:
    """Tensors of a layout, of zeros."""
    return {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in layout}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, where a value is not finite."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        by_type.setdefault(tensor.dtype, []).append(tensor)
    # What is not finite stays so in a sum, which takes a tenth of the time; a sum of finite values
    # may overflow.
    if all(bool(joined(members).sum().isfinite()) for members in by_type.values()):
        return
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} has values that are not finite")

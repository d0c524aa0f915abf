"""Tensors that lie one after another in memory: what is many by name is copied, written and added
as one.

A client's state is some five hundred small tensors, and a call for each takes longer than their
bytes do.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def runs(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The values of tensors, in order, as few flat tensors as can be had without a copy of those
    that lie one after another.

    Args:
        tensors: of one type, on the CPU; one whose values are not in their order is copied.
    """
    found: list[Tensor] = []
    first: Tensor | None = None
    # Of each tensor as little is asked as can be: there are thousands in every message.
    size = end = limit = 0
    for tensor in tensors:
        count = tensor.numel()
        if not count:
            continue
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        begin, length = whole.data_ptr(), count * whole.itemsize
        # What is within the first one's own memory is read through that, whoever else has it.
        if first is not None and begin == end and begin + length <= limit:
            size += count
        else:
            if first is not None:
                found.append(first.as_strided((size,), (1,)))
            first, size = whole.detach(), count
            memory = first.untyped_storage()
            limit = memory.data_ptr() + memory.nbytes()
        end = begin + length
    if first is not None:
        found.append(first.as_strided((size,), (1,)))
    return found


def joined(tensors: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """All values of CPU tensors as one flat tensor, which shares their memory if they lie one after
    another.

    Args:
        tensors: of one type.
        dtype: of the result where there are none.
    """
    found = runs(tensors)
    if not found:
        return torch.zeros(0, dtype=dtype)
    return found[0] if len(found) == 1 else torch.cat(found)


def parts(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes, one after another, as views of a flat one that is as long as all of
    them.
    """
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [piece.view(tuple(shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def zeros_in_a_row(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Zeros of these shapes, one after another in memory."""
    return parts(torch.zeros(sum(math.prod(shape) for shape in shapes)), shapes)


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors for a device: what lies on the CPU goes to a GPU in one copy for each type, from
    pinned memory and without waiting for what is queued there; for a CPU they are as they are.
    """
    if device.type == "cpu" or any(tensor.device.type != "cpu" for tensor in tensors):
        return list(tensors)
    return sent_as_one(tensors, device)


def sent_as_one(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on a device, those of one type one after another in its memory."""
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(place)
    found: dict[int, Tensor] = {}
    for dtype, members in places.items():
        flat = joined((tensors[place] for place in members), dtype)
        if device.type == "cuda":
            flat = flat.pin_memory()
        there = flat.to(device, non_blocking=True)
        found.update(
            zip(members, parts(there, [tensors[place].shape for place in members]), strict=True)
        )
    return [found[place] for place in range(len(tensors))]


@torch.no_grad()
def copies(tensors: Mapping[str, Tensor], *, by_name: bool = False) -> dict[str, Tensor]:
    """Contiguous CPU copies, for each type one after another in memory: in this order, or in that
    of their names, in which they are stored.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name in sorted(tensors) if by_name else tensors:
        names.setdefault(tensors[name].dtype, []).append(name)
    found: dict[str, Tensor] = {}
    for dtype, members in names.items():
        originals = [tensors[name].detach() for name in members]
        if originals[0].device.type != "cpu":
            # Once over the bus, and not once a tensor.
            flat = _brought(torch.cat([tensor.reshape(-1) for tensor in originals]))
            places = parts(flat, [tensor.shape for tensor in originals])
        else:
            flat = torch.empty(sum(tensor.numel() for tensor in originals), dtype=dtype)
            places = parts(flat, [tensor.shape for tensor in originals])
            torch._foreach_copy_(places, originals)
        found.update(zip(members, places, strict=True))
    return {name: found[name] for name in tensors}


def copies_of_groups(
    *groups: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """:func:`copies` of several groups of tensors, those from a device as one.

    Args:
        groups: groups by name, in their own order; then those whose tensors are to lie in the order
            of their names.
    """
    ordered = {
        name: sorted(tensors) if place else list(tensors)
        for place, some in enumerate(groups)
        for name, tensors in some.items()
    }
    given = {name: tensors for some in groups for name, tensors in some.items()}
    first = next((t for tensors in given.values() for t in tensors.values()), None)
    if first is None or first.device.type == "cpu":
        return {
            name: copies(tensors, by_name=place > 0)
            for place, some in enumerate(groups)
            for name, tensors in some.items()
        }
    together = copies(
        {
            f"{name} {member}": given[name][member]
            for name, members in ordered.items()
            for member in members
        }
    )
    return {
        name: {member: together[f"{name} {member}"] for member in tensors}
        for name, tensors in given.items()
    }


def _brought(flat: Tensor) -> Tensor:
    """A device's tensor on the CPU: by way of pinned memory, which is too dear to be kept."""
    if flat.device.type != "cuda":
        return flat.cpu()
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    pinned.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(flat.device).synchronize()
    return pinned.clone()

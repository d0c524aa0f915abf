"""The last look at what leaves an owner: none of it is a piece of what must not.

Names, types and sizes say what values are called, and not what they are: a mistake could put θ_i
under φ's names. So the bytes that are about to leave are searched for those of θ_i, its average,
the optimizer's moments and the owner's images, of which not even sixteen in a row may be among
them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srfed.data import Task, to_model_range
from srfed.data.images import Images
from srfed.flat import runs
from srfed.training.part import ClientState

WINDOW = 16
"""Bytes."""
WHOLE = 2**20
"""Bytes of a tensor of which every value begins a window; of a longer one so many do, evenly
spaced: of 64 MiB every 256th byte, so that a piece of 272 bytes is found."""
MOST_IMAGES = 2**20
"""Bytes of images that are looked for; of more of them, whole images, evenly spaced."""
LEAST_BYTES, LEAST_VALUES = 8, 3
"""Different ones in a window that can prove something: black, zeros, and what one step makes of
zeros are alike everywhere."""
_AT_ONCE = 2**20
_LARGEST_TABLE = 25
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)

_states: ContextVar[list[ClientState] | None] = ContextVar("states", default=None)

Words = NDArray[np.uint64]
_NONE: Words = np.empty(0, np.uint64)


class PrivateError(Exception):
    """What is about to leave holds what must not."""


@contextmanager
def looked_after() -> Iterator[list[ClientState]]:
    """The states that the block comes to know of, for a look at what it wants to send."""
    states: list[ClientState] = []
    token = _states.set(states)
    try:
        yield states
    finally:
        _states.reset(token)


def stays_here(state: ClientState) -> ClientState:
    """Note that a state must not leave; returns it."""
    if (states := _states.get()) is not None:
        states.append(state)
    return state


def look(
    tensors: Mapping[str, Tensor],
    numbers: Iterable[float],
    states: Iterable[ClientState],
    task: Task,
    came: Callable[[], Iterable[Tensor]],
    *,
    images: bool,
) -> None:
    """Search what is about to leave.

    Args:
        tensors: of all its records.
        numbers: its numbers, in their order.
        states: what the owner keeps.
        task: the owner's images.
        came: gives what came with the request, which is no secret.
        images: whether images are looked for among the tensors; generated ones, of few grey levels,
            may share a row of pixels with real ones.

    Raises:
        PrivateError: there is something.
    """
    told = [*_parts(np.array([*numbers], np.float64))]
    sent = [part for array in _flat(tensors.values()) for part in _parts(array)]
    found = [
        *_common([*_of_states(states)], [*told, *sent]),
        *_common([*_of_images(task)], [*told, *(sent if images else [])]),
    ]
    if not found:
        return
    # Read only now, as there is hardly ever anything.
    others = _common(found, [part for array in _flat(came()) for part in _parts(array)])
    public = {part.data.tobytes() for part in others}
    for secret in found:
        if secret.data.tobytes() not in public:
            place = "numbers" if _common([secret], told) else "tensors"
            raise PrivateError(f"{WINDOW} bytes of {secret.what} among the {place} of a reply")


@dataclass(frozen=True)
class _Part:
    """Bytes of which each ``every``-th begins a window of sixteen; of values of ``size`` bytes."""

    data: NDArray[np.uint8]
    every: int
    size: int
    what: str = ""

    def windows(self) -> Iterator[tuple[Words, Words]]:
        """Both halves of the windows, some windows at a time."""
        for start in range(0, 8, self.every):
            rest = self.data[start:]
            words = rest[: len(rest) // 8 * 8].view(np.uint64)
            step = max(1, self.every // 8)
            for begin in range(0, len(words) - 1, _AT_ONCE):
                piece = words[begin : begin + _AT_ONCE + 1]
                yield piece[:-1:step], piece[1::step]


def _flat(tensors: Iterable[Tensor]) -> Iterator[NDArray[np.generic]]:
    """The values of tensors, as few arrays as there can be."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.detach().cpu())
    for members in kinds.values():
        yield from (flat.numpy() for flat in runs(members))


def _part(values: NDArray[np.generic], every: int, what: str = "") -> _Part:
    flat = np.ascontiguousarray(values).reshape(-1)
    return _Part(flat.view(np.uint8), every, flat.itemsize, what)


def _parts(array: NDArray[np.generic]) -> Iterator[_Part]:
    """What leaves: bytes from each byte, larger values from each fourth; doubles besides as the
    single ones that they may be made of.
    """
    yield _part(array, 1 if array.itemsize == 1 else 4)
    if array.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            yield _part(array.astype(np.float32), 4)


def _of_states(states: Iterable[ClientState]) -> Iterator[_Part]:
    for state in states:
        own = state.exclusive
        kinds = {
            "θ_i": own.weights,
            "θ_i's average": own.average,
            "an optimizer's moments": {**own.moments, **state.shared_moments},
        }
        for what, tensors in kinds.items():
            short: dict[torch.dtype, list[Tensor]] = {}
            for tensor in tensors.values():
                values = tensor.detach().cpu().reshape(-1)
                if values.nbytes <= WHOLE:
                    short.setdefault(values.dtype, []).append(values)
                else:
                    yield _part(values.numpy(), 16 * -(-values.nbytes // (4 * WHOLE)), what)
            # As one: some hundred calls each for a few values would take longer than the search.
            for members in short.values():
                yield _part(torch.cat(members).numpy(), 4, what)


def _of_images(task: Task) -> Iterator[_Part]:
    """As they lie there, and as the network sees them."""
    for images in (task.train, task.test, task.validation):
        if images.size:
            chosen = _some(images)
            yield _part(chosen, 1, "an image")
            yield _part(to_model_range(chosen).contiguous().numpy(), 4, "an image")


def _some(images: Images) -> Images:
    return np.ascontiguousarray(images[:: -(-images.size // MOST_IMAGES)])


def _common(known: Sequence[_Part], hay: Sequence[_Part]) -> list[_Part]:
    """One part for each telling window of the known ones that the others have too."""
    # Of the two, what leaves is less than what is kept, and a small table stays near the processor.
    table, likely = _Table(hay), []
    for part in known:
        pairs = _likely([part], table)
        likely.append(pairs[_telling(pairs, part.size)])
    asked = _Table(np.concatenate([_hashed(*pairs.T) for pairs in likely] or [_NONE]))
    # In order, so that each is found in few steps.
    there = np.sort(_hashed(*_likely(hay, asked).T))
    return [
        _Part(pair.view(np.uint8), 16, part.size, part.what)
        for part, pairs in zip(known, likely, strict=True)
        for pair in np.unique(pairs[_among(_hashed(*pairs.T), there)], axis=0)
    ]


def _likely(parts: Iterable[_Part], table: "_Table") -> Words:
    """The windows that a table may have, N x 2."""
    pairs = [np.empty((0, 2), np.uint64)]
    for part in parts:
        for first, second in part.windows():
            chosen = table.has(_hashed(first, second))
            chosen &= first != second  # all alike, mostly
            pairs.append(np.stack([first[chosen], second[chosen]], axis=1))
    return np.concatenate(pairs)


class _Table:
    """Which hashes there may be; what it has not is not there."""

    def __init__(self, content: Sequence[_Part] | Words) -> None:
        hashes = (
            [content]
            if isinstance(content, np.ndarray)
            else (_hashed(*halves) for part in content for halves in part.windows())
        )
        count = (
            len(content)
            if isinstance(content, np.ndarray)
            else sum(len(part.data) // part.every for part in content)
        )
        bits = min(_LARGEST_TABLE, max(10, count.bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._marked = np.zeros(1 << bits, np.bool_)
        for some in hashes:
            self._marked[some >> self._shift] = True

    def has(self, hashes: Words) -> NDArray[np.bool_]:
        there: NDArray[np.bool_] = self._marked[hashes >> self._shift]
        return there


def _among(hashes: Words, ordered: Words) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    same: NDArray[np.bool_] = ordered[places] == hashes
    return same


def _hashed(first: Words, second: Words) -> Words:
    hashed: Words = first * _FACTORS[0] + second * _FACTORS[1]
    return hashed


def _telling(pairs: Words, size: int) -> NDArray[np.bool_]:
    """Whether windows could not be anybody's."""
    if size == 1:
        members, least = pairs.view(np.uint8).reshape(-1, 16), LEAST_BYTES
    else:
        words = pairs.view(np.uint32).reshape(-1, 4)
        # Without sign and the last digits: all that one step makes of zeros looks alike.
        members, least = (words & np.uint32(0x7FFFFFFF)) >> np.uint32(16), LEAST_VALUES
    ordered = np.sort(members, axis=1)
    different: NDArray[np.int64] = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return different >= least

"""Quantisation: each value in 8 or 4 bits, times one scale a tensor.

Rounding is stochastic, so a code is right on average (Alistarh et al., 2017, QSGD); and what it
takes away is not lost: the client keeps it and adds it to its next update (Seide et al., 2014;
Karimireddy et al., 2019, error feedback).
"""

import math

import torch
from torch import Tensor

from srfed.federation.layout import Layout
from srfed.federation.updates import Delta, Length, Memory

SCALES = ".scales"
"""The tensor of all scales, in the order of the others. No module's tensor begins with a dot."""
BIAS = 8
"""What is added to a code of 4 bits, so that it is not negative."""


class Quantise:
    """Codes from -q to q, q = 127 or 7, of x + e: the update, and what was left of the last one.

    The scale is max |x + e| / q. What is kept, the next e, is x + e less what the server decodes,
    and never more than one scale a value.
    """

    def __init__(self, *, quantise_bits: int) -> None:
        self._bits = quantise_bits
        self._most = 2 ** (self._bits - 1) - 1

    def layout(self, layout: Layout) -> Layout:
        codes: Layout = [
            (name, "int8", shape)
            if self._bits == 8
            else (name, "uint8", ((math.prod(shape) + 1) // 2,))
            for name, _, shape in layout
        ]
        return [*codes, (SCALES, "float32", (len(layout),))]

    def encode(
        self, delta: Delta, memory: Memory, generator: torch.Generator
    ) -> tuple[Delta, Memory]:
        encoded, left, scales = Delta({}), {}, []
        for name, tensor in delta.items():
            whole = tensor + memory[name] if memory else tensor
            scale = _scale(whole, self._most)
            codes = _round(whole, scale, self._most, generator)
            left[name] = (whole.double() - _values(codes, scale).double()).to(tensor.dtype)
            encoded[name] = codes if self._bits == 8 else _pack(codes)
            scales.append(scale)
        encoded[SCALES] = torch.tensor(scales, dtype=torch.float32)
        return encoded, left

    def decode(self, delta: Delta, layout: Layout) -> Delta:
        scales = delta[SCALES].tolist()
        decoded = Delta({})
        for (name, dtype, shape), scale in zip(layout, scales, strict=True):
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"the scale of {name!r} is {scale!r}, not finite and at least 0")
            codes = delta[name] if self._bits == 8 else _unpack(delta[name], shape)
            if codes is None or (codes.numel() and int(codes.min()) < -self._most):
                raise ValueError(
                    f"a code of {name!r} is impossible; allowed: -{self._most} to {self._most}"
                )
            decoded[name] = _values(codes, scale).to(getattr(torch, dtype))
        return decoded

    def longest(self, length: Length, layout: Layout) -> Length:
        """Of values that are at most v, scales are at most v / (q - 1), whatever was kept: s ≤ (v +
        s) / q. So what was kept and what is rounded add at most as much to a value, each.
        """
        count = sum(math.prod(shape) for _, _, shape in layout)
        scale = length.value / (self._most - 1)
        added = 2 * scale * math.sqrt(count) if count else 0.0
        return Length(length.norm + added, length.value + 2 * scale)

    def in_words(self) -> str:
        return f"in {self._bits} bits a value"


def _scale(tensor: Tensor, most: int) -> float:
    """max |x| / q as a float32, rounded up, so that no code is above q; NaN where a value is."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    scale = torch.tensor(largest / most, dtype=torch.float32)
    if float(scale) * most < largest:
        scale = torch.nextafter(scale, torch.tensor(math.inf))
    return float(scale)


def _round(tensor: Tensor, scale: float, most: int, generator: torch.Generator) -> Tensor:
    """Codes whose mean over the draws is the value; the draws are made whatever the values are."""
    draws = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if scale == 0 or not math.isfinite(scale):
        return torch.zeros(tensor.shape, dtype=torch.int8)
    exact = tensor.double() / scale
    low = exact.floor()
    return (low + (draws < exact - low)).clamp(-most, most).to(torch.int8)


def _values(codes: Tensor, scale: float) -> Tensor:
    return (codes.double() * scale).float()


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low four bits; an odd count has a 0 behind it."""
    flat = torch.nn.functional.pad(codes.flatten() + BIAS, (0, codes.numel() % 2), value=BIAS)
    pairs = flat.to(torch.uint8).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The codes of bytes; None where what is behind an odd count is no 0."""
    codes = torch.stack([packed & 15, packed >> 4], dim=1).flatten().to(torch.int8) - BIAS
    count = math.prod(shape)
    return codes[:count].reshape(shape) if not bool(codes[count:].any()) else None

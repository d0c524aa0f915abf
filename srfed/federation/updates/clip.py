"""Clipping: an update longer than a norm is shortened to it, in its own direction."""

import torch

from srfed.federation.layout import Layout
from srfed.federation.updates import Delta, Length, Memory, norm_of

ROUNDING = 1e-6
"""What a float32 product may be off, relative to it, and more."""


class Clip:
    """Δ · min(1, c / ‖Δ‖), over all tensors together."""

    def __init__(self, *, clip_norm: float) -> None:
        self._norm = clip_norm

    def layout(self, layout: Layout) -> Layout:
        return layout

    def encode(
        self, delta: Delta, memory: Memory, generator: torch.Generator
    ) -> tuple[Delta, Memory]:
        norm = norm_of(delta)
        # Not `<=`: values that are not finite stay what they are, and the server says so.
        if not norm > self._norm:
            return delta, {}
        factor = self._norm / norm
        return Delta({name: (factor * t.double()).to(t.dtype) for name, t in delta.items()}), {}

    def decode(self, delta: Delta, layout: Layout) -> Delta:
        return delta

    def longest(self, length: Length, layout: Layout) -> Length:
        most = self._norm * (1 + ROUNDING)
        return Length(min(length.norm, most), min(length.value, most))

    def in_words(self) -> str:
        return f"shortened to norm {self._norm:g}"

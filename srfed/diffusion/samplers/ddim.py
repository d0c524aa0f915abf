"""DDIM (Song et al. 2021)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from srfed.diffusion.process import Process
from srfed.diffusion.sampler import Denoise, DrawNoise, Sampler


class Ddim(Sampler):
    """Along the ε that fits the predicted x_0.

    With eta = 1 and a step for each timestep it is ancestral sampling with posterior variance.

    Args:
        eta: 0 (deterministic, nothing is drawn) to 1 (the noise of ancestral sampling; one draw a
            step, none in the last).

    Raises:
        ValueError: eta is outside 0..1.
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} is impossible; it must lie in 0..1")
        self._eta = eta

    def walk(
        self,
        denoise: Denoise,
        process: Process,
        times: Sequence[float],
        x: Tensor,
        draw: DrawNoise,
    ) -> Iterator[Tensor]:
        for t, s in pairwise(times):
            x = self.step(process, x, denoise(x, t), t, s, draw)
            yield x

    def step(
        self, process: Process, x: Tensor, image: Tensor, t: float, s: float, draw: DrawNoise
    ) -> Tensor:
        """x_s of x_t and the x_0 that is predicted from it, for those who denoise themselves."""
        (signal, noise), (signal_after, noise_after) = process.levels(t), process.levels(s)
        # Eq. (3) solved for ε at the predicted x_0: where that was clamped, the network's own ε
        # would pull x_s off the path to it.
        predicted = (x - signal * image) / noise
        # σ² = η² (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s)   (Song et al., 16)
        step = noise**2 - (signal / signal_after) ** 2 * noise_after**2
        variance = self._eta**2 * noise_after**2 / noise**2 * step
        # x_s = sqrt(ᾱ_s) x_0 + sqrt(1 - ᾱ_s - σ²) ε + σ z   (Song et al., 12)
        x = signal_after * image + math.sqrt(noise_after**2 - variance) * predicted
        if variance:
            x = x + math.sqrt(variance) * draw(x)
        return x

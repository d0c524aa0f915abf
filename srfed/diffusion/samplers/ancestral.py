"""Ancestral sampling: Algorithm 2 of the paper."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from srfed.diffusion.process import Process
from srfed.diffusion.sampler import Denoise, DrawNoise, Sampler


class Ancestral(Sampler):
    """x_s ~ q(x_s | x_t, x_0) at the predicted x_0, over every timestep; one draw a step, none in
    the last.

    Args:
        variance: σ_t², that of the step, β_t, or the posterior's, β̃_t.

    Raises:
        ValueError: another variance.
    """

    every_timestep = True

    def __init__(self, variance: Literal["beta", "posterior"] = "beta") -> None:
        if variance not in ("beta", "posterior"):
            raise ValueError(f"variance {variance!r} is unknown; allowed: beta, posterior")
        self._variance = variance

    def walk(
        self,
        denoise: Denoise,
        process: Process,
        times: Sequence[float],
        x: Tensor,
        draw: DrawNoise,
    ) -> Iterator[Tensor]:
        for t, s in pairwise(times):
            image = denoise(x, t)
            (signal, noise), (signal_after, noise_after) = process.levels(t), process.levels(s)
            kept = signal / signal_after
            # 1 - ᾱ_t / ᾱ_s, which is β_t where s = t - 1.
            beta = noise**2 - kept**2 * noise_after**2
            # Line 5 of the printed Algorithm 2 divides by sqrt(ᾱ_t), a misprint: eq. (6), which it
            # restates, divides by sqrt(α_t), and is this mean of q(x_{t-1} | x_t, x_0) (Ho et al.
            # 2020, eq. 7); only in this form can the predicted x_0 be clamped.
            # μ = (sqrt(ᾱ_{t-1}) β_t x_0 + sqrt(α_t) (1 - ᾱ_{t-1}) x_t) / (1 - ᾱ_t)
            mean = signal_after * beta * image + kept * noise_after**2 * x
            mean = mean / noise**2
            variance = beta if self._variance == "beta" else beta * noise_after**2 / noise**2
            # x_{t-1} = μ + σ_t z, and z = 0 at t = 1   (5), Algorithm 2
            x = mean if s == 0 else mean + math.sqrt(variance) * draw(x)
            yield x

"""DPM-Solver++(2M), a second-order solver of the reverse process's ODE (Lu et al. 2022)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from srfed.diffusion.process import Process
from srfed.diffusion.sampler import Denoise, DrawNoise, Sampler


class DpmSolver(Sampler):
    """Two predictions of x_0, this step's and the last's, make one step of second order.

    Deterministic: nothing is drawn. The first step is of first order, as it has no predecessor, and
    so is the last, which ends at x_0 (Lu et al., algorithm 2).
    """

    def walk(
        self,
        denoise: Denoise,
        process: Process,
        times: Sequence[float],
        x: Tensor,
        draw: DrawNoise,
    ) -> Iterator[Tensor]:
        before: tuple[Tensor, float] | None = None
        for t, s in pairwise(times):
            image = denoise(x, t)
            (signal, noise), (signal_after, noise_after) = process.levels(t), process.levels(s)
            if s == 0:
                yield signal_after * image
                return
            # h = λ_s - λ_t with λ = ln(signal / noise)
            length = math.log(signal_after / noise_after) - math.log(signal / noise)
            direction = image
            if before is not None:
                image_before, length_before = before
                # D = (1 + 1 / 2r) x_0 - 1 / 2r x_0', r = h' / h   (algorithm 2, line 7)
                weight = length / (2 * length_before)
                direction = (1 + weight) * image - weight * image_before
            # x_s = σ_s / σ_t x_t - α_s (e^-h - 1) D
            x = noise_after / noise * x - signal_after * math.expm1(-length) * direction
            before = image, length
            yield x

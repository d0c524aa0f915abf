"""Noise schedules β_1..β_T and what follows from them, in float64."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variances of the forward process, eq. (2), and what the equations derive from them.

    Attributes:
        betas: float64 (T,) on the CPU, each in [1e-12, 1), so that 1 - β_t stays below 1; ``betas[t
            - 1]`` is β_t.

    Raises:
        ValueError: ``betas`` has another shape, type or range, or leaves ᾱ_T below 1e-30, where the
            prediction of x_0, which divides by its root, would overflow.
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) == 0 or self.betas.dtype != torch.float64:
            raise ValueError(
                f"betas has shape {tuple(self.betas.shape)} and type {self.betas.dtype}; it must "
                "be (T,), T ≥ 1, and float64"
            )
        low, high = float(self.betas.min()), float(self.betas.max())
        if not (low >= 1e-12 and high < 1):
            raise ValueError(f"betas run from {low:.3g} to {high:.3g}; each must lie in [1e-12, 1)")
        if self.alpha_bars[-1] < 1e-30:
            raise ValueError(
                f"betas up to {high:.3g} over {self.timesteps} timesteps leave ᾱ_T = "
                f"{self.alpha_bars[-1]:.3g}; it must be at least 1e-30"
            )

    @property
    def timesteps(self) -> int:
        """T, the length of the diffusion."""
        return len(self.betas)

    @cached_property
    def alphas(self) -> Tensor:
        """α_t = 1 - β_t, float64 (T,)."""
        return 1 - self.betas

    @cached_property
    def alpha_bars(self) -> Tensor:
        """ᾱ_t = Π_{s≤t} α_s, float64 (T,); sqrt(ᾱ_t) is what is left of the image in x_t, eq.
        (3).
        """
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def posterior_variances(self) -> Tensor:
        """β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t, float64 (T,); β̃_1 = 0 because ᾱ_0 = 1."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])
        return (1 - before) / (1 - self.alpha_bars) * self.betas


def linear_schedule(
    timesteps: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    scale: Literal["none", "match_1000"] = "match_1000",
) -> NoiseSchedule:
    """β_t growing linearly from β_1 to β_T (Ho et al. 2020).

    The usual 1e-4..0.02 was made for T = 1000. At T = 500 it leaves sqrt(ᾱ_T) = 0.080 of the image
    in x_T, so sampling would start from a distribution never seen in training; ``match_1000``
    leaves 0.006.

    Args:
        timesteps: T, at least 1.
        beta_start: β_1 before scaling.
        beta_end: β_T before scaling.
        scale: ``match_1000`` multiplies every β by 1000/T; ``none`` takes them as they are.

    Raises:
        ValueError: T is below 1, a β or ᾱ_T leaves its range, or the scale is unknown.
    """
    _check_timesteps(timesteps)
    if scale not in ("none", "match_1000"):
        raise ValueError(f"scale {scale!r} is unknown; allowed: none, match_1000")
    factor = 1000 / timesteps if scale == "match_1000" else 1.0
    return NoiseSchedule(
        torch.linspace(factor * beta_start, factor * beta_end, timesteps, dtype=torch.float64)
    )


def cosine_schedule(timesteps: int) -> NoiseSchedule:
    """ᾱ_t following a squared cosine (Nichol & Dhariwal 2021, eq. 17), β_t capped at 0.999.

    The ᾱ_t that result are products of the capped α_t; they leave the cosine where the cap acts, at
    the last timestep.

    Args:
        timesteps: T, at least 1.

    Raises:
        ValueError: T is below 1.
    """
    _check_timesteps(timesteps)

    def alpha_bar(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, timesteps + 1)]
    return NoiseSchedule(torch.tensor(betas, dtype=torch.float64))


def build_schedule(
    timesteps: int,
    schedule: Literal["linear", "cosine"],
    beta_start: float,
    beta_end: float,
    beta_scale: Literal["none", "match_1000"],
) -> NoiseSchedule:
    """Make the schedule that a run's ``diffusion`` settings name; the arguments bear the settings'
    names.

    Raises:
        ValueError: the schedule is unknown, or its own arguments are impossible.
    """
    if schedule == "cosine":
        return cosine_schedule(timesteps)
    if schedule == "linear":
        return linear_schedule(timesteps, beta_start, beta_end, beta_scale)
    raise ValueError(f"schedule {schedule!r} is unknown; allowed: linear, cosine")


def _check_timesteps(timesteps: int) -> None:
    if timesteps < 1:
        raise ValueError(f"timesteps {timesteps} is impossible; it must be at least 1")

"""How well a model removes noise from held-out images: the yardstick by which models are compared.

Eq. (7) on images that nobody was trained on, at moments that are the same for all, with noise that
is the same for all: a draw has its own name, so two models are asked the very same questions, and
what they differ by is not luck. It is taken in ε-space whatever a network predicts, so objectives
can be compared too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from srfed.config.sampling import most_at_once
from srfed.data import to_model_range
from srfed.data.images import Images
from srfed.diffusion.process import Denoiser, Process
from srfed.randomness import derive_generator

Losses = npt.NDArray[np.float64]
"""Images x moments."""
MOMENTS = 8
"""Timesteps at which a model is asked."""
BANDS: Mapping[str, slice] = {"low": slice(0, 3), "middle": slice(3, 5), "high": slice(5, 8)}
"""Moments by how much noise there is."""
LARGEST_LOSS = 1e6
"""The mean squared error of predicted noise is of the order of 1, of a network that diverges
perhaps of thousands.
"""
RESAMPLES = 2_000
CONFIDENCE = 0.95


def moments(timesteps: int) -> list[int]:
    """The timesteps T (k + 1/2) / 8, rounded half up, at least 1."""
    return [max(1, (timesteps * (2 * k + 1) + MOMENTS) // (2 * MOMENTS)) for k in range(MOMENTS)]


@torch.no_grad()
def denoising_losses(
    denoiser: Denoiser,
    process: Process,
    images: Images,
    *,
    task: str,
    seed: int,
    batch_size: int | None = None,
) -> Losses:
    """The squared error of ε̂ = (x_t - signal x̂_0) / noise, mean over the values of each image.

    The noise depends on the seed, the task, the image's number and the moment alone: not on the
    model, nor on how many images there are or are asked for at once.

    Args:
        denoiser: E[x_0 | x_t] of a model, on the process's device, in evaluation mode.
        process: its forward process.
        images: held-out images, uint8 N x H x W x C.
        task: the task's name.
        seed: of the noise; the same for all models that are compared.
        batch_size: pairs of image and moment at once; None takes as many as are sampled at once.

    Returns:
        float64, N x 8: image by image, at :func:`moments`.

    Raises:
        ValueError: the images are not uint8 N x H x W x C, or the batch size is below 1.
    """
    if batch_size is None:
        batch_size = most_at_once(*images.shape[1:3])
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is impossible; allowed: 1 or more")
    originals = to_model_range(images)
    times = [process.time_of(timestep) for timestep in moments(process.timesteps)]
    # (signal / noise)², float64, by moment.
    ratios = torch.tensor([(s / n) ** 2 for s, n in map(process.levels, times)], dtype=torch.double)
    pairs = [(number, k) for number in range(len(images)) for k in range(MOMENTS)]
    losses = torch.empty(len(pairs), dtype=torch.double)
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        clean = originals[[number for number, _ in part]]
        noise = torch.stack(
            [
                torch.randn(
                    originals.shape[1:],
                    generator=derive_generator(seed, "denoising loss", task, number, k),
                )
                for number, k in part
            ]
        )
        clean, noise = clean.to(process.device), noise.to(process.device)
        at = torch.tensor(
            [times[k] for _, k in part], dtype=process.time_dtype, device=process.device
        )
        found = denoiser(process.add_noise(clean, at, noise), at)
        error = (clean.double() - found.double()).square().mean(dim=(1, 2, 3)).cpu()
        # ε̂ - ε = (x_t - signal x̂_0) / noise - ε = signal (x_0 - x̂_0) / noise, by eq. (3).
        losses[first : first + len(part)] = ratios[[k for _, k in part]] * error
    return losses.view(len(images), MOMENTS).numpy()


def trivial_loss(images: Images, process: Process) -> float:
    """What :func:`denoising_losses` are expected to be, on average, of the best linear predictor
    that knows of the images nothing but the mean and the variance of all their values: Wiener's,
    x̂_0 = μ + k (x_t - signal μ), whose loss is signal² σ² / (signal² σ² + noise²).

    A network whose loss is above has learned nothing of the images yet.

    Args:
        images: uint8 N x H x W x C, at least one.
        process: the forward process.
    """
    variance = float(to_model_range(images).double().var(correction=0))
    losses = []
    for timestep in moments(process.timesteps):
        signal, noise = process.levels(process.time_of(timestep))
        of_signal = signal**2 * variance
        losses.append(of_signal / (of_signal + noise**2))
    return math.fsum(losses) / len(losses)


def mean_loss(losses: Losses) -> float:
    """Over images and moments."""
    return float(losses.mean())


def comparable_loss(losses: Losses) -> float:
    """The mean over images and moments by which rounds are compared: a model that has diverged has
    the largest there is, not one that no number is below.
    """
    loss = mean_loss(losses)
    return min(loss, LARGEST_LOSS) if math.isfinite(loss) else LARGEST_LOSS


def loss_by_band(losses: Losses) -> dict[str, float]:
    """Over images and the moments of each of :data:`BANDS`."""
    return {name: float(losses[:, band].mean()) for name, band in BANDS.items()}


@dataclass(frozen=True)
class Ratio:
    """One model's loss over another's, above 1 where the second is better.

    Attributes:
        value: on the images there are.
        low, high: where it lies with a confidence of 95% if other held-out images had been drawn;
            nothing is said of other trainings.
    """

    value: float
    low: float
    high: float


def paired_ratio(first: Sequence[Losses], second: Sequence[Losses], *, seed: int) -> Ratio:
    """The ratio of two models' mean losses on the same images, with its interval.

    Whole images are drawn with replacement, the same for both models, as often as there are; the
    interval is between percentiles (Efron and Tibshirani 1993, chapter 13).

    Args:
        first, second: of each task its losses, as :func:`denoising_losses` gives them with the same
            seed; every task counts alike, and its images are drawn apart from the others'.
        seed: of the draws.

    Raises:
        ValueError: the two sides differ in tasks or images, or there is none.
    """
    shapes = [[losses.shape for losses in side] for side in (first, second)]
    if shapes[0] != shapes[1] or not all(shape[0] for shape in shapes[0]) or not shapes[0]:
        raise ValueError(f"need the same images on both sides, got {shapes[0]} and {shapes[1]}")
    generator = np.random.default_rng(seed)
    means = np.zeros((2, RESAMPLES))
    for one, other in zip(first, second, strict=True):
        drawn = generator.integers(len(one), size=(RESAMPLES, len(one)))
        for row, losses in zip(means, (one, other), strict=True):
            row += losses.mean(axis=1)[drawn].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means[0] / means[1], [tail, 1 - tail])
    value = math.fsum(map(mean_loss, first)) / math.fsum(map(mean_loss, second))
    return Ratio(value, float(low), float(high))

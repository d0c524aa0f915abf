"""SSIM-rec@t*: how well the model brings a test image back from a shallow timestep."""

from typing import Literal

import torch
from torch import Tensor

from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.sampler import drawn_from, sample
from srfed.diffusion.samplers.ancestral import Ancestral
from srfed.evaluation.metrics.ssim import ssim
from srfed.randomness import derive_generator


def ssim_of_reconstructions(
    denoiser: Denoiser,
    process: Process,
    images: Tensor,
    timestep: int,
    *,
    variance: Literal["beta", "posterior"],
    seed: int,
    task: str,
) -> float:
    """Diffuse images to x_t*, run Algorithm 2 back to x_0, and compare (see docs/evaluation.md).

    Args:
        denoiser: E[x_0 | x_t] of (φ, θ_i), in evaluation mode.
        process: the forward process, on the images' device.
        images: test images of task i, N x C x H x W in [-1, 1], N at least 1.
        timestep: t*, in 1..T.
        variance: σ_t² of Algorithm 2.
        seed: the run's seed.
        task: the task's name.

    Returns:
        The mean SSIM over the images, at most 1.
    """
    generator = derive_generator(seed, "reconstruction", task, timestep)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    time = process.time_of(timestep)
    times = torch.full((len(images),), time, dtype=process.time_dtype, device=images.device)
    restored = sample(
        Ancestral(variance),
        denoiser,
        process,
        process.add_noise(images, times, noise),
        drawn_from(generator),
        steps=process.timesteps,
        from_timestep=timestep,
    ).images
    return float(ssim((images + 1) / 2, (restored.clamp(-1, 1) + 1) / 2).mean())

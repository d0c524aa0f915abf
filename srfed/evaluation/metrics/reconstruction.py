"""SSIM-rec@t*: how well the model brings a test image back from a shallow timestep."""

from typing import Literal

import torch
from torch import Tensor

from srfed.diffusion.process import Diffusion, PredictNoise
from srfed.diffusion.sampling import ancestral_sample
from srfed.evaluation.metrics.ssim import ssim
from srfed.randomness import derive_generator


def ssim_of_reconstructions(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    images: Tensor,
    timestep: int,
    *,
    variance: Literal["beta", "posterior"],
    seed: int,
    task: str,
) -> float:
    """Diffuse images to x_t*, run Algorithm 2 back to x_0, and compare (see docs/evaluation.md).

    Args:
        predict_noise: ε of (φ, θ_i), in evaluation mode.
        diffusion: the forward process, on the images' device.
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
    timesteps = torch.full((len(images),), timestep, dtype=torch.long, device=images.device)
    restored = ancestral_sample(
        predict_noise,
        diffusion,
        diffusion.add_noise(images, timesteps, noise),
        generator,
        from_timestep=timestep,
        variance=variance,
    ).images
    return float(ssim((images + 1) / 2, (restored.clamp(-1, 1) + 1) / 2).mean())

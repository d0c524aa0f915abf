"""Generating a task's images: noise from named seeds, the reverse process, uint8."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srfed.config import SamplingConfig
from srfed.data import to_uint8
from srfed.data.images import Images
from srfed.diffusion.process import Diffusion, PredictNoise
from srfed.diffusion.sampling import Sampled, ancestral_sample, ddim_sample
from srfed.randomness import derive_generator


@dataclass(frozen=True, eq=False)
class Generated:
    """Generated images.

    Attributes:
        images: uint8 N x H x W x C.
        strip: uint8 K x H x W x C, the first image on its way from x_T to x_0; empty if not asked
            for.
    """

    images: Images
    strip: Images


def generate(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    sampling: SamplingConfig,
    *,
    count: int,
    shape: tuple[int, ...],
    seed: int,
    task: str,
    strip_steps: int = 0,
) -> Generated:
    """Generate ``count`` images of one task.

    The images depend on (seed, task, count) and on ``sampling`` alone. x_T is drawn for whole
    batches, so with DDIM at η = 0 asking for more images leaves the first ones as they were.

    Args:
        predict_noise: ε of (φ, θ_i), on the diffusion's device, in evaluation mode.
        diffusion: the forward process.
        sampling: sampler, steps, batch size.
        count: number of images.
        shape: H, W, C of one image.
        seed: the run's seed, or another for other images.
        task: the task's name.
        strip_steps: pictures in the strip, evenly spaced from T to 0.
    """
    height, width, channels = shape
    record = strip_timesteps(diffusion.timesteps, strip_steps)
    images = [np.empty((0, height, width, channels), np.uint8)]
    strip = images[0]
    for batch, first in enumerate(range(0, count, sampling.batch_size)):
        generator = derive_generator(seed, "samples", task, batch)
        wanted = min(sampling.batch_size, count - first)
        size = (sampling.batch_size, channels, height, width)
        start = torch.randn(size, generator=generator)[:wanted].to(diffusion.device)
        sampled = sample(
            predict_noise, diffusion, sampling, start, generator, record if first == 0 else []
        )
        images.append(to_uint8(sampled.images))
        if first == 0 and record:
            strip = np.concatenate([to_uint8(sampled.states[timestep][:1]) for timestep in record])
    return Generated(np.concatenate(images), strip)


def sample(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    sampling: SamplingConfig,
    start: Tensor,
    generator: torch.Generator,
    record: list[int],
) -> Sampled:
    """Run the configured sampler from x_T."""
    if sampling.sampler == "ancestral":
        return ancestral_sample(
            predict_noise,
            diffusion,
            start,
            generator,
            variance=sampling.variance,
            clip=sampling.clip,
            record=record,
        )
    return ddim_sample(
        predict_noise,
        diffusion,
        start,
        generator,
        steps=sampling.steps,
        eta=sampling.eta,
        clip=sampling.clip,
        record=record,
    )


def strip_timesteps(timesteps: int, steps: int) -> list[int]:
    """The timesteps of a strip of ``steps`` pictures: T first, 0 last, evenly spaced; none where
    steps is below 2.
    """
    return [round(timesteps * (1 - k / (steps - 1))) for k in range(steps)] if steps > 1 else []

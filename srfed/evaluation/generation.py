"""Generating a task's images: noise from named seeds, the reverse process, uint8."""

from dataclasses import dataclass

import numpy as np
import torch

from srfed.config import SamplingConfig
from srfed.config.choices import SAMPLERS, make
from srfed.config.evaluation import strip_timesteps
from srfed.data import to_uint8
from srfed.data.images import Images
from srfed.diffusion.guidance import guided
from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.sampler import Sampler, drawn_for_each, sample
from srfed.errors import UserError, is_short_of_memory
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
    denoiser: Denoiser,
    process: Process,
    sampling: SamplingConfig,
    *,
    count: int,
    shape: tuple[int, ...],
    seed: int,
    task: str,
    strip_steps: int = 0,
) -> Generated:
    """Generate ``count`` images of one task.

    Each image has draws of its own, so it depends on (seed, task, its number) and on the sampler
    alone: not on how many are asked for, nor on how many are sampled at once, which are half as
    many from where memory is short.

    Args:
        denoiser: E[x_0 | x_t] of (φ, θ_i), on the process's device, in evaluation mode; it is
            guided here, if that is asked for.
        process: the forward process.
        sampling: sampler, steps, guidance, batch size.
        count: number of images.
        shape: H, W, C of one image.
        seed: the run's seed, or another for other images.
        task: the task's name.
        strip_steps: pictures in the strip, evenly spaced from T to 0.

    Raises:
        UserError: the model's weights have diverged.
        ValueError: guidance is asked for, and the denoiser has no guide.
    """
    height, width, channels = shape
    sampler, drawn_with = build_sampler(sampling), guided(denoiser, sampling.guidance)
    record = strip_timesteps(process.timesteps, strip_steps)
    images = [np.empty((0, height, width, channels), np.uint8)]
    strip = images[0]
    first, at_once = 0, sampling.images_at_once(height, width)
    while first < count:
        numbers = range(first, min(first + at_once, count))
        draw = drawn_for_each([derive_generator(seed, "samples", task, n) for n in numbers])
        try:
            noise = draw(
                torch.empty((len(numbers), channels, height, width), device=process.device)
            )
            sampled = sample(
                sampler,
                drawn_with,
                process,
                process.start(noise),
                draw,
                steps=sampling.steps,
                clip=sampling.clip,
                record=record if first == 0 else [],
            )
        except (MemoryError, RuntimeError) as error:
            if len(numbers) == 1 or not is_short_of_memory(error):
                raise
            at_once = len(numbers) // 2
            continue
        if not bool(sampled.images.isfinite().all()):
            raise UserError(
                f"the model of {task} has diverged: its samples are no numbers; train it with "
                "a lower training.learning_rate or training.gradient_clip"
            )
        images.append(to_uint8(sampled.images))
        if first == 0 and record:
            strip = np.concatenate([to_uint8(sampled.states[timestep][:1]) for timestep in record])
        first = numbers.stop
    return Generated(np.concatenate(images), strip)


def build_sampler(sampling: SamplingConfig) -> Sampler:
    """The sampler of ``sampling.sampler``, with its constants."""
    sampler: Sampler = make(SAMPLERS, sampling.sampler, sampling)
    return sampler

"""Generating a task's images: noise from named seeds, the reverse process, uint8."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from srfed.config import SamplingConfig
from srfed.config.choices import SAMPLERS, make
from srfed.config.evaluation import strip_timesteps
from srfed.data.images import Images, to_levels
from srfed.diffusion.guidance import guided
from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.sampler import Sampled, Sampler, drawn_for_each, sample
from srfed.errors import UserError
from srfed.memory import is_short_of_memory
from srfed.randomness import derive_generator
from srfed.room import aside


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
        UserError: the model's weights have diverged, or there is not enough memory.
        ValueError: guidance is asked for, and the denoiser has no guide.
    """
    sampler, drawn_with = build_sampler(sampling), guided(denoiser, sampling.guidance)
    record = strip_timesteps(process.timesteps, strip_steps)
    height, width, channels = shape
    parts = [torch.empty((0, height, width, channels), dtype=torch.uint8, device=process.device)]
    strip, finite = parts[0], []

    def draw_images(numbers: Sequence[int]) -> Sampled:
        draw = drawn_for_each([derive_generator(seed, "samples", task, n) for n in numbers])
        noise = draw(torch.empty((len(numbers), channels, height, width), device=process.device))
        return sample(
            sampler,
            drawn_with,
            process,
            process.start(noise),
            draw,
            steps=sampling.steps,
            clip=sampling.clip,
            record=record if 0 in numbers else [],
        )

    first, at_once, short = 0, sampling.images_at_once(height, width), False
    while first < count:
        numbers = range(first, min(first + at_once, count))
        work = partial(draw_images, numbers)
        try:
            sampled = aside(work) if short else work()
        except (MemoryError, RuntimeError) as error:
            if not is_short_of_memory(error):
                raise
            sampled = None
        # Not in the handler: what was raised holds the tensors that it was raised over.
        if sampled is None:
            short, at_once = True, len(numbers) // 2
            if not at_once:
                raise UserError(
                    f"task {task}: there is not enough memory ({process.device}) to sample one "
                    f"image of {height} x {width}; allowed: smaller images, or a smaller network"
                )
            continue
        finite.append(sampled.images.isfinite().all())
        parts.append(to_levels(sampled.images))
        if first == 0 and record:
            strip = torch.cat([to_levels(sampled.states[timestep][:1]) for timestep in record])
        first = numbers.stop
    if finite and not bool(torch.stack(finite).all()):
        raise UserError(
            f"the model of {task} has diverged: its samples are no numbers; train it with "
            "a lower training.learning_rate or training.gradient_clip"
        )
    # Once from the device, and not once a batch.
    levels = torch.cat([*parts, strip]).cpu().numpy()
    return Generated(levels[:count], levels[count:])


def build_sampler(sampling: SamplingConfig) -> Sampler:
    """The sampler of ``sampling.sampler``, with its constants."""
    sampler: Sampler = make(SAMPLERS, sampling.sampler, sampling)
    return sampler

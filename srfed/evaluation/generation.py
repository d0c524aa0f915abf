"""Generating a task's images: noise from named seeds, the reverse process, uint8."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from srfed.config import SamplingConfig
from srfed.config.choices import SAMPLERS, make
from srfed.config.evaluation import strip_timesteps
from srfed.data.images import Images, to_levels
from srfed.device import most_in_a_program
from srfed.diffusion.guidance import guided
from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.sampler import Sampled, Sampler, drawn_for_each, sample
from srfed.errors import UserError
from srfed.memory import is_short_of_memory
from srfed.randomness import derive_generator
from srfed.room import aside
from srfed.units import tasks_in_words


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


CPU_IMAGES = 16
"""Of one owner at once, up to which it pays on a CPU to sample owners together."""


def owners_at_once(
    sampling: SamplingConfig, device: str, *, count: int, shape: tuple[int, ...]
) -> int:
    """How many owners generate so many images each as one program, at most: as many as sample
    together what one may sample at once. 1: each by itself.

    Args:
        sampling: the run's settings.
        device: "cpu", or what begins with "cuda".
        count: images of each owner.
        shape: H, W, C of one image.
    """
    height, width, channels = shape
    if device == "cpu" and count > CPU_IMAGES:
        return 1
    most = sampling.images_at_once(height, width) // max(1, count)
    return max(1, min(most, most_in_a_program(device, channels)))


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
    give_back: Callable[[], None] | None = None,
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
        give_back: called where memory is short, before fewer are sampled at once: gives back what
            else was taken of it.

    Raises:
        UserError: the model's weights have diverged, or there is not enough memory.
        ValueError: guidance is asked for, and the denoiser has no guide.
    """
    (generated,) = generate_together(
        denoiser,
        process,
        sampling,
        count=count,
        shape=shape,
        seed=seed,
        tasks=[task],
        strip_steps=strip_steps,
        give_back=give_back,
    )
    if isinstance(generated, UserError):
        raise generated
    return generated


def generate_together(
    denoiser: Denoiser,
    process: Process,
    sampling: SamplingConfig,
    *,
    count: int,
    shape: tuple[int, ...],
    seed: int,
    tasks: Sequence[str],
    strip_steps: int = 0,
    give_back: Callable[[], None] | None = None,
) -> list[Generated | UserError]:
    """Generate ``count`` images of each of several tasks; otherwise as :func:`generate`.

    Args:
        denoiser: E[x_0 | x_t] of all of them, of as many images of each, one task's after the
            other's.

    Returns:
        Those of each task; the error where its model has diverged, which is not the others'.
    """
    sampler, drawn_with = build_sampler(sampling), guided(denoiser, sampling.guidance)
    record = strip_timesteps(process.timesteps, strip_steps)
    height, width, channels = shape
    empty = (len(tasks), 0, height, width, channels)
    # Tasks x images, from here on.
    parts = [torch.empty(empty, dtype=torch.uint8, device=process.device)]
    strip, finite = parts[0], [torch.ones(len(tasks), dtype=torch.bool, device=process.device)]

    def of_each(images: Tensor) -> Tensor:
        return torch.unflatten(images, 0, (len(tasks), -1))

    def draw_images(numbers: Sequence[int]) -> Sampled:
        draw = drawn_for_each(
            [derive_generator(seed, "samples", task, n) for task in tasks for n in numbers]
        )
        batch = (len(tasks) * len(numbers), channels, height, width)
        noise = draw(torch.empty(batch, device=process.device))
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
            short = True
            if give_back is not None:
                give_back()
                give_back = None
                continue
            at_once = len(numbers) // 2
            if not at_once:
                raise UserError(
                    f"{tasks_in_words(tasks)}: there is not enough memory ({process.device}) to "
                    f"sample one image of {height} x {width}"
                    + (" of each" if len(tasks) > 1 else "")
                    + "; allowed: smaller images, or a smaller network"
                )
            continue
        finite.append(of_each(sampled.images).isfinite().flatten(1).all(dim=1))
        parts.append(of_each(to_levels(sampled.images)))
        if first == 0 and record:
            states = [of_each(sampled.states[timestep])[:, 0] for timestep in record]
            strip = torch.stack([to_levels(state) for state in states], dim=1)
        first = numbers.stop
    # Once from the device, and not once a batch.
    levels = torch.cat([*parts, strip], dim=1).cpu().numpy()
    sound = torch.stack(finite).all(dim=0).tolist()
    return [
        Generated(images[:count], images[count:])
        if whole
        else UserError(
            f"the model of {task} has diverged: its samples are no numbers; train it with "
            "a lower training.learning_rate or training.gradient_clip"
        )
        for task, images, whole in zip(tasks, levels, sound, strict=True)
    ]


def build_sampler(sampling: SamplingConfig) -> Sampler:
    """The sampler of ``sampling.sampler``, with its constants."""
    sampler: Sampler = make(SAMPLERS, sampling.sampler, sampling)
    return sampler

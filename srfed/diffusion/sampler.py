"""The reverse process: a sampler walks a denoiser from noise to x_0.

The coefficients of a step are Python numbers computed in float64, so no step waits for the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from srfed.diffusion.process import Denoiser, Process, check_images

DrawNoise = Callable[[Tensor], Tensor]
"""x -> z ~ N(0, I) of its shape, type and device."""
Denoise = Callable[[Tensor, float], Tensor]
"""(x_t, t) -> E[x_0 | x_t], all images at one time."""


class Sampler(ABC):
    """One way through the reverse process; ``srfed/config/choices.py`` names it.

    Its constructor takes, of the section ``sampling``, the settings whose names it has.

    Attributes:
        every_timestep: takes all T steps, whatever number is asked for.
    """

    every_timestep: ClassVar[bool] = False

    @abstractmethod
    def walk(
        self,
        denoise: Denoise,
        process: Process,
        times: Sequence[float],
        x: Tensor,
        draw: DrawNoise,
    ) -> Iterator[Tensor]:
        """Yield x at each of ``times`` after the first.

        Args:
            denoise: E[x_0 | x_t], clamped where that is asked for.
            process: the forward process.
            times: from the time of ``x`` down to 0.
            x: x at the first of them, (N, C, H, W).
            draw: the source of z.
        """


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a run of the reverse process gave.

    Attributes:
        images: x_0, (N, C, H, W), of the start's type. Its last step predicts x_0, so ``clip``
            keeps it in [-1, 1]; without it nothing does.
        states: for each timestep r asked for, x (N, C, H, W) at the latest visited time not after
            that of r, as it can be looked at.
    """

    images: Tensor
    states: dict[int, Tensor]


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoiser: Denoiser,
    process: Process,
    start: Tensor,
    draw: DrawNoise,
    *,
    steps: int,
    from_timestep: int | None = None,
    clip: bool = True,
    record: Sequence[int] = (),
) -> Sampled:
    """Run the reverse process from x_t at ``from_timestep`` to x_0.

    Args:
        sampler: takes the steps.
        denoiser: the model.
        process: the forward process, on the device of ``start``.
        start: x_t at ``from_timestep``, (N, C, H, W); when that is None,
            :meth:`~srfed.diffusion.process.Process.start` of N(0, I).
        draw: the source of z.
        steps: 1..T; at most ``from_timestep`` are taken.
        from_timestep: where the start stands, 1..T; None is pure noise.
        clip: clamp each predicted x_0 to [-1, 1].
        record: timesteps, 0..``from_timestep``, whose states are wanted.

    Raises:
        ValueError: a shape, type, device, timestep or step count does not fit.
    """
    check_images("start", start, process.device)
    top = process.timesteps if from_timestep is None else from_timestep
    count = process.timesteps if sampler.every_timestep else steps
    times = process.path(count, from_timestep)
    for timestep in record:
        if not 0 <= timestep <= top:
            raise ValueError(f"record asks for timestep {timestep}; it must lie in 0..{top}")
    stops = {
        timestep: next(place for place, time in enumerate(times) if time <= first)
        for timestep, first in ((timestep, process.time_of(timestep)) for timestep in record)
    }

    def denoise(x: Tensor, time: float) -> Tensor:
        at = torch.full((len(x),), time, dtype=process.time_dtype, device=x.device)
        image = denoiser(x, at)
        return image.clamp(-1, 1) if clip else image

    x, kept, wanted = start, {0: start}, set(stops.values())
    for place, x in enumerate(sampler.walk(denoise, process, times, start, draw), start=1):
        if place in wanted:
            kept[place] = x
    states = {
        timestep: process.as_picture(kept[place], times[place]) for timestep, place in stops.items()
    }
    return Sampled(images=x, states=states)


def drawn_from(generator: torch.Generator) -> DrawNoise:
    """z from one generator for all images, on their device or on the CPU, where the draws are the
    same for every device.
    """

    def draw(x: Tensor) -> Tensor:
        if generator.device.type not in ("cpu", x.device.type):
            raise ValueError(f"generator is on {generator.device}, the images on {x.device}")
        return to_place_of(
            torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype), x
        )

    return draw


def drawn_for_each(generators: Sequence[torch.Generator]) -> DrawNoise:
    """z of each image from its own generator on the CPU, so that an image does not depend on those
    beside it.
    """

    def draw(x: Tensor) -> Tensor:
        drawn = torch.empty(x.shape, dtype=x.dtype)
        for place, generator in enumerate(generators):
            torch.randn(x.shape[1:], generator=generator, out=drawn[place])
        return to_place_of(drawn, x)

    return draw


def to_place_of(drawn: Tensor, x: Tensor) -> Tensor:
    """Draws on the device of ``x``; from the CPU to a GPU without waiting for what is queued
    there.
    """
    if drawn.device == x.device:
        return drawn
    return drawn.pin_memory().to(x.device, non_blocking=True)

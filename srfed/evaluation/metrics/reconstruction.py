"""SSIM-rec@t*: how well the model brings a test image back from a shallow timestep."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.sampler import DrawNoise, drawn_from, sample
from srfed.diffusion.samplers.ancestral import Ancestral
from srfed.diffusion.samplers.ddim import Ddim
from srfed.evaluation.metrics.ssim import ssim
from srfed.randomness import derive_generator


def ssim_of_reconstructions(
    denoiser: Denoiser,
    process: Process,
    images: Tensor,
    timesteps: Sequence[int],
    *,
    steps: int | None,
    variance: Literal["beta", "posterior"],
    batch_size: int,
    seed: int,
    task: str,
) -> dict[int, float]:
    """Diffuse images to x_t of each timestep, take them back to x_0, and compare (see
    docs/evaluation.md).

    Args:
        denoiser: E[x_0 | x_t] of (φ, θ_i), in evaluation mode.
        process: the forward process, on the images' device.
        images: test images of task i, N x C x H x W in [-1, 1], N at least 1.
        timesteps: the t*, each in 1..T.
        steps: of deterministic DDIM, at most t*, from all timesteps at once; None runs Algorithm 2
            from one after the other.
        variance: σ_t² of Algorithm 2.
        batch_size: images that the denoiser is given at once, which changes nothing but rounding.
        seed: the run's seed.
        task: the task's name.

    Returns:
        The mean SSIM over the images by timestep, at most 1.
    """
    diffused: dict[int, Tensor] = {}
    draws: dict[int, DrawNoise] = {}
    for timestep in timesteps:
        generator = derive_generator(seed, "reconstruction", task, timestep)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        times = _times(process, process.time_of(timestep), len(images))
        diffused[timestep] = process.add_noise(images, times, noise)
        draws[timestep] = drawn_from(generator)
    if steps is None:
        # The draws of a step are one for all images, and no image has its own: so all are walked
        # together, and it is the network, which needs the memory, that sees them in batches.
        ancestral, in_batches = Ancestral(variance), partial(_in_batches, denoiser, batch_size)
        restored = {
            timestep: sample(
                ancestral,
                in_batches,
                process,
                start,
                draws[timestep],
                steps=process.timesteps,
                from_timestep=timestep,
            ).images
            for timestep, start in diffused.items()
        }
    else:
        each = max(1, batch_size // len(diffused))
        parts = [
            _in_few_steps(
                denoiser, process, {t: x[first : first + each] for t, x in diffused.items()}, steps
            )
            for first in range(0, len(images), each)
        ]
        restored = {t: torch.cat([part[t] for part in parts]) for t in diffused}
    original = (images + 1) / 2
    return {
        timestep: float(ssim(original, (image.clamp(-1, 1) + 1) / 2).mean())
        for timestep, image in restored.items()
    }


def _in_batches(denoiser: Denoiser, batch_size: int, x: Tensor, times: Tensor) -> Tensor:
    """E[x_0 | x_t] of so many images at once."""
    if len(x) <= batch_size:
        return denoiser(x, times)
    parts = zip(x.split(batch_size), times.split(batch_size), strict=True)
    # A captured pass gives the same memory each time.
    return torch.cat([denoiser(part, at).clone() for part, at in parts])


@torch.no_grad()
def _in_few_steps(
    denoiser: Denoiser, process: Process, diffused: Mapping[int, Tensor], steps: int
) -> dict[int, Tensor]:
    """x_0 of the images of each timestep, all of them in one batch until they have arrived."""
    ddim, states = Ddim(eta=0.0), dict(diffused)  # which draws nothing
    count = min(steps, process.timesteps)
    paths = {timestep: process.path(count, timestep) for timestep in diffused}
    for place in range(max(map(len, paths.values())) - 1):
        moves = {t: path[place : place + 2] for t, path in paths.items() if place + 1 < len(path)}
        times = [_times(process, now, len(states[t])) for t, (now, _) in moves.items()]
        x = torch.cat([states[t] for t in moves])
        images = denoiser(x, torch.cat(times)).clamp(-1, 1).split([len(one) for one in times])
        for (timestep, (now, then)), image in zip(moves.items(), images, strict=True):
            x = states[timestep]
            states[timestep] = ddim.step(process, x, image, now, then, torch.randn_like)
    return states


def _times(process: Process, time: float, count: int) -> Tensor:
    return torch.full((count,), time, dtype=process.time_dtype, device=process.device)

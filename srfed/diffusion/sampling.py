"""The reverse process: ancestral sampling (Algorithm 2) and DDIM.

The coefficients of a step are Python numbers computed in float64, so no step waits for the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from srfed.diffusion.process import Diffusion, PredictNoise, check_images, check_prediction

_Step = Callable[[Tensor, Tensor, int, int], Tensor]
"""(x_t, predicted noise, t, the next timestep s < t) -> x_s."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a run of the reverse process gave.

    Attributes:
        images: x_0, (N, C, H, W), of the start's type. Its last step predicts x_0, so ``clip``
            keeps it in [-1, 1]; without it nothing does.
        states: for each timestep r asked for, x_t (N, C, H, W) at the largest visited t ≤ r.
    """

    images: Tensor
    states: dict[int, Tensor]


def ancestral_sample(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    start: Tensor,
    generator: torch.Generator,
    *,
    from_timestep: int | None = None,
    variance: Literal["beta", "posterior"] = "beta",
    clip: bool = True,
    record: Sequence[int] = (),
) -> Sampled:
    """Run Algorithm 2 over every timestep, from x_t at ``from_timestep`` down to x_0.

    Args:
        predict_noise: ε_ψ.
        diffusion: the schedule, on the device of ``start``.
        start: x_t at ``from_timestep``, (N, C, H, W); N(0, I) when that is T.
        generator: source of z, on the device of ``start`` or on the CPU, where the draws are the
            same for every device; one draw a step, none in the last.
        from_timestep: where the start stands, 1..T; None is T.
        variance: σ_t², β_t or the posterior β̃_t.
        clip: clamp each predicted x_0 to [-1, 1].
        record: timesteps, 0..``from_timestep``, whose states are wanted.

    Raises:
        ValueError: a shape, type, device or timestep does not fit.
    """
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance {variance!r} is unknown; allowed: beta, posterior")
    top = _check_start(diffusion, start, generator, from_timestep)
    schedule = diffusion.schedule
    betas: list[float] = [0.0, *schedule.betas.tolist()]
    alpha_bars: list[float] = [1.0, *schedule.alpha_bars.tolist()]
    variances: list[float] = (
        betas if variance == "beta" else [0.0, *schedule.posterior_variances.tolist()]
    )

    def step(x: Tensor, noise: Tensor, t: int, s: int) -> Tensor:
        # Line 5 of the printed Algorithm 2 divides by sqrt(ᾱ_t), a misprint: eq. (6), which it
        # restates, divides by sqrt(α_t).
        alpha, beta, alpha_bar, before = 1 - betas[t], betas[t], alpha_bars[t], alpha_bars[s]
        if clip:
            # Eq. (6) is the mean of q(x_{t-1} | x_t, x_0) at the predicted x_0 (Ho et al. 2020, eq.
            # 7); only in this form can that x_0 be clamped.
            image = _predict_image(x, noise, alpha_bar).clamp(-1, 1)
            # μ = (sqrt(ᾱ_{t-1}) β_t x_0 + sqrt(α_t) (1 - ᾱ_{t-1}) x_t) / (1 - ᾱ_t)
            mean = math.sqrt(before) * beta * image + math.sqrt(alpha) * (1 - before) * x
            mean = mean / (1 - alpha_bar)
        else:
            # μ = (x_t - β_t / sqrt(1 - ᾱ_t) ε_ψ) / sqrt(α_t)   (6)
            mean = (x - beta / math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha)
        # x_{t-1} = μ + σ_t z, and z = 0 at t = 1   (5), Algorithm 2
        return mean if s == 0 else mean + math.sqrt(variances[t]) * _draw(x, generator)

    return _reverse(predict_noise, start, list(range(top, -1, -1)), step, record)


def ddim_timesteps(from_timestep: int, steps: int) -> list[int]:
    """The timesteps DDIM visits: ``steps`` equal strides from ``from_timestep`` to 0, rounded half
    up.

    Both ends are included, so the list is one longer than the steps. More steps than timesteps are
    cut to one step a timestep.
    """
    steps = min(steps, from_timestep)
    return [(2 * from_timestep * (steps - i) + steps) // (2 * steps) for i in range(steps + 1)]


def ddim_sample(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    start: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    eta: float = 0.0,
    from_timestep: int | None = None,
    clip: bool = True,
    record: Sequence[int] = (),
) -> Sampled:
    """Run DDIM (Song et al. 2021) from x_t at ``from_timestep`` to x_0 over :func:`ddim_timesteps`.

    With eta = 1 and a step for each timestep it is :func:`ancestral_sample` with posterior
    variance.

    Args:
        predict_noise: ε_ψ.
        diffusion: the schedule, on the device of ``start``.
        start: x_t at ``from_timestep``, (N, C, H, W); N(0, I) when that is T.
        generator: source of z, on the device of ``start`` or on the CPU; unused when eta is 0, else
            one draw a step and none in the last.
        steps: 1..T; at most ``from_timestep`` are taken.
        eta: 0 (deterministic) to 1 (the noise of ancestral sampling).
        from_timestep: where the start stands, 1..T; None is T.
        clip: clamp each predicted x_0 to [-1, 1] and take the ε that fits the clamped x_0.
        record: timesteps, 0..``from_timestep``, whose states are wanted.

    Raises:
        ValueError: a shape, type, device, timestep, step count or eta does not fit.
    """
    if not 1 <= steps <= diffusion.timesteps:
        raise ValueError(f"steps {steps} is impossible; it must lie in 1..{diffusion.timesteps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is impossible; it must lie in 0..1")
    top = _check_start(diffusion, start, generator, from_timestep)
    alpha_bars: list[float] = [1.0, *diffusion.schedule.alpha_bars.tolist()]

    def step(x: Tensor, noise: Tensor, t: int, s: int) -> Tensor:
        now, then = alpha_bars[t], alpha_bars[s]
        image = _predict_image(x, noise, now)
        if clip:
            image = image.clamp(-1, 1)
            # Eq. (3) solved for ε; the network's own ε would pull x_s off the path to the clamped
            # x_0.
            noise = (x - math.sqrt(now) * image) / math.sqrt(1 - now)
        # σ² = η² (1 - ᾱ_s) / (1 - ᾱ_t) (1 - ᾱ_t / ᾱ_s)   (Song et al., 16)
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        # x_s = sqrt(ᾱ_s) x_0 + sqrt(1 - ᾱ_s - σ²) ε + σ z   (Song et al., 12)
        mean = math.sqrt(then) * image + math.sqrt(1 - then - variance) * noise
        return mean if variance == 0 else mean + math.sqrt(variance) * _draw(x, generator)

    return _reverse(predict_noise, start, ddim_timesteps(top, steps), step, record)


@torch.no_grad()
def _reverse(
    predict_noise: PredictNoise, start: Tensor, path: list[int], step: _Step, record: Sequence[int]
) -> Sampled:
    for timestep in record:
        if not 0 <= timestep <= path[0]:
            raise ValueError(f"record asks for timestep {timestep}; it must lie in 0..{path[0]}")
    stops = {timestep: next(t for t in path if t <= timestep) for timestep in record}
    wanted = set(stops.values())
    x, kept = start, {path[0]: start}
    for t, s in pairwise(path):
        noise = predict_noise(x, torch.full((len(x),), t, dtype=torch.long, device=x.device))
        check_prediction(noise, x)
        # Before any arithmetic: a 16-bit prediction times a number would be rounded to 16 bits
        # again.
        x = step(x, noise.to(x.dtype), t, s)
        if s in wanted:
            kept[s] = x
    return Sampled(images=x, states={timestep: kept[t] for timestep, t in stops.items()})


def _predict_image(x: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """Eq. (3) solved for x_0."""
    return (x - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)


def _draw(x: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
    if drawn.device == x.device:
        return drawn
    # Pinned, so that the copy waits in the device's queue and not here.
    return drawn.pin_memory().to(x.device, non_blocking=True)


def _check_start(
    diffusion: Diffusion, start: Tensor, generator: torch.Generator, from_timestep: int | None
) -> int:
    check_images("start", start, diffusion.device)
    if generator.device.type not in ("cpu", start.device.type):
        raise ValueError(f"generator is on {generator.device}, start on {start.device}")
    top = diffusion.timesteps if from_timestep is None else from_timestep
    if not 1 <= top <= diffusion.timesteps:
        raise ValueError(
            f"from_timestep {top} is impossible; it must lie in 1..{diffusion.timesteps}"
        )
    return top

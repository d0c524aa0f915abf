"""Every objective and sampler against closed forms, and against diffusers where it has the same.

For images N(m, s²) the best denoiser is known at every noise level:
E[x_0 | x_t] = m + a s² (x_t - a m) / (a² s² + b²) with x_t = a x_0 + b ε.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from srfed.config.choices import OBJECTIVES, SAMPLERS, chosen
from srfed.diffusion.objective import Objective
from srfed.diffusion.objectives.edm import TIME_SCALE, PreconditionedDenoising
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.diffusion.objectives.velocity import VelocityPrediction
from srfed.diffusion.process import Denoiser, VarianceExploding
from srfed.diffusion.sampler import Sampler, drawn_for_each, drawn_from, sample
from srfed.diffusion.samplers.ancestral import Ancestral
from srfed.diffusion.samplers.ddim import Ddim
from srfed.diffusion.samplers.dpm_solver import DpmSolver
from srfed.diffusion.schedule import linear_schedule

MEAN, DEVIATION = 0.4, 0.3
T = 60
SHAPE = (3, 2, 4, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def made(name: str, timesteps: int = 500) -> Objective:
    return chosen(OBJECTIVES, name)(linear_schedule(timesteps))


def exact(objective: Objective) -> Denoiser:
    """The best denoiser of N(MEAN, DEVIATION²)."""

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        signal, noise = objective.process.levels(float(times[0]))
        total = (signal * DEVIATION) ** 2 + noise**2
        return MEAN + signal * DEVIATION**2 / total * (x - signal * MEAN)

    return denoise


# Objectives


@pytest.mark.parametrize("timestep", [1, 30, 250, 500])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_minimiser_of_the_loss_is_the_best_denoiser(name: str, timestep: int) -> None:
    """At one time the best network is a line in what it is shown; least squares on the loss itself
    finds it.
    """
    objective, count = made(name), 200_000
    time = objective.process.time_of(timestep)
    images = MEAN + DEVIATION * normal(count, 1, 1, 1)
    times = torch.full((count,), time, dtype=objective.process.time_dtype)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, _: Tensor) -> Tensor:
        return weights[0] * x + weights[1]

    def loss() -> Tensor:
        return objective.loss(network, images, times, normal(count, 1, 1, 1, seed=1)).mean()

    # A quadratic's minimum, by one step of Newton's.
    (gradient,) = torch.autograd.grad(loss(), weights, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, weights, retain_graph=True)[0] for g in gradient])
    with torch.no_grad():
        weights -= torch.linalg.solve(hessian, gradient)
    signal, noise = objective.process.levels(time)
    spread = math.sqrt((signal * DEVIATION) ** 2 + noise**2)
    x = signal * MEAN + spread * torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    found = objective.denoiser(network)(x, times[:9]).detach()
    # An estimate from so many images is off by some multiple of s / sqrt(N) at most.
    torch.testing.assert_close(
        found, exact(objective)(x, times[:9]), rtol=0, atol=8 * DEVIATION / math.sqrt(count)
    )


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_perfect_network_has_no_loss_and_gives_the_image_back(name: str) -> None:
    objective, images, noise = made(name), normal(*SHAPE).clamp(-1, 1), normal(*SHAPE, seed=1)
    times = objective.draw_times(3, generator(2))
    signal, spread = objective.process.coefficients(times, images)
    total = spread**2 + 0.25
    targets = {
        "noise": noise,
        "velocity": signal * noise - spread * images,
        # F = (x_0 - c_skip x) / c_out of Karras et al., with σ_data = 1/2
        "edm": (images - 0.25 / total * (images + spread * noise)) * total.sqrt() / (spread / 2),
    }
    losses = objective.loss(lambda x, t: targets[name], images, times, noise)
    torch.testing.assert_close(losses, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-20)
    x = objective.process.add_noise(images, times, noise)
    torch.testing.assert_close(objective.denoiser(lambda x, t: targets[name])(x, times), images)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_16_bit_prediction_is_widened_before_any_arithmetic(name: str) -> None:
    objective = made(name)
    x, times = normal(*SHAPE).float(), objective.draw_times(3, generator())
    narrow = objective.denoiser(lambda x, t: x.sin().bfloat16())(x, times)
    wide = objective.denoiser(lambda x, t: x.sin().bfloat16().float())(x, times)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_prediction_of_another_shape_is_refused(name: str) -> None:
    objective, images = made(name), torch.zeros(SHAPE)
    times = objective.draw_times(3, generator())
    for use in (
        lambda network: objective.loss(network, images, times, images),
        lambda network: objective.denoiser(network)(images, times),
    ):
        with pytest.raises(ValueError, match=r"the network returned \(3, 1, 4, 5\)"):
            use(lambda x, t: x[:, :1])


def test_velocity_is_that_of_diffusers() -> None:
    images, noise, times = normal(T, 1, 3, 3), normal(T, 1, 3, 3, seed=1), torch.arange(1, T + 1)
    theirs = scheduler(DDPMScheduler(T)).get_velocity(images, noise, times - 1)
    losses = VelocityPrediction(linear_schedule(T)).loss(lambda x, t: theirs, images, times, noise)
    assert float(losses.max()) < 1e-13


def test_edm_is_table_1_of_karras_et_al() -> None:
    """The loss λ(σ) ‖D - x_0‖² with D = c_skip x + c_out F, each factor written out."""
    objective = PreconditionedDenoising(linear_schedule(T), sigma_data=0.4)
    images, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    sigma = torch.tensor([0.01, 0.5, 30.0])
    shown: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        shown.extend([x, time])
        return x.tanh()

    losses = objective.loss(network, images, sigma, noise)
    for i, s in enumerate(sigma.double().tolist()):
        x = images[i] + s * noise[i]
        c_in, c_skip = 1 / math.sqrt(s**2 + 0.4**2), 0.4**2 / (s**2 + 0.4**2)
        c_out = s * 0.4 / math.sqrt(s**2 + 0.4**2)
        weight = (s**2 + 0.4**2) / (s * 0.4) ** 2
        denoised = c_skip * x + c_out * (c_in * x).tanh()
        assert float(losses[i]) == pytest.approx(
            float(weight * (denoised - images[i]).square().mean()), rel=1e-9
        )
        torch.testing.assert_close(shown[0][i], c_in * x)
        assert float(shown[1][i]) == pytest.approx(1000 * math.log(s) / 4, rel=1e-6)
    assert TIME_SCALE == 250


def test_edm_draws_log_normal_noise_levels() -> None:
    objective = PreconditionedDenoising(
        linear_schedule(T), log_sigma_mean=-0.7, log_sigma_deviation=0.9
    )
    drawn = objective.draw_times(50_000, generator()).log()
    assert float(drawn.mean()) == pytest.approx(-0.7, abs=5 * 0.9 / math.sqrt(50_000))
    assert float(drawn.std()) == pytest.approx(0.9, rel=5 / math.sqrt(100_000))


# The exploding process


def test_the_times_of_edm_are_eq_5_of_karras_et_al() -> None:
    process = VarianceExploding(linear_schedule(500), sigma_min=0.01, sigma_max=50.0, rho=5.0)
    path = process.path(8)
    assert path[-1] == 0.0
    expected = [(50 ** (1 / 5) + i / 7 * (0.01 ** (1 / 5) - 50 ** (1 / 5))) ** 5 for i in range(8)]
    assert path[:-1] == pytest.approx(expected)


def test_a_timestep_is_the_noise_level_of_its_ratio_of_noise_to_signal() -> None:
    schedule = linear_schedule(500)
    process = VarianceExploding(schedule)
    for t in (1, 50, 499):
        alpha_bar = float(schedule.alpha_bars[t - 1])
        assert process.time_of(t) == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar))
        assert process.path(500, t)[0] == pytest.approx(process.time_of(t))
        assert len(process.path(500, t)) == t + 1
    assert process.time_of(0) == 0.0
    quarters = process.quarter(torch.tensor([process.time_of(t) for t in (1, 125, 126, 375, 500)]))
    assert quarters.tolist() == [0, 0, 1, 2, 3]


def test_a_noise_level_of_nothing_is_refused() -> None:
    process, images = VarianceExploding(linear_schedule(T)), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="noise levels run from 0 to 2; they must be above 0"):
        process.add_noise(images, torch.tensor([0.0, 1.0, 2.0]), images)


# Samplers


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_sampler_gives_the_gaussian_of_every_objective(name: str, sampler: str) -> None:
    objective, count = made(name), 20_000
    walker = Ddim(0.5) if sampler == "ddim" else chosen(SAMPLERS, sampler)()
    start = objective.process.start(normal(count, 1, 1, 1))
    images = sample(
        walker,
        exact(objective),
        objective.process,
        start,
        drawn_from(generator(1)),
        steps=250,
        clip=False,
    ).images
    # Five standard errors, and 1 % of s for the finite number of steps.
    assert float(images.mean()) == pytest.approx(
        MEAN, abs=5 * DEVIATION / math.sqrt(count) + 0.01 * DEVIATION
    )
    assert float(images.std()) == pytest.approx(
        DEVIATION, abs=5 * DEVIATION / math.sqrt(2 * count) + 0.01 * DEVIATION
    )


def test_a_solver_of_second_order_errs_by_the_square_of_the_step() -> None:
    """The ODE of a Gaussian ends at m + s z; each doubling of the steps divides the error by four,
    and DDIM's by two. Seen where the steps are small, before the last one, which is of first order.
    """
    objective = PreconditionedDenoising(linear_schedule(500), sigma_min=0.05, sigma_max=5.0)
    process, z = objective.process, normal(1000, 1, 1, 1)
    start = MEAN + math.sqrt(DEVIATION**2 + 25) * z
    end = MEAN + math.sqrt(DEVIATION**2 + 0.05**2) * z

    def error(sampler: Sampler, steps: int) -> float:
        times = process.path(steps)[:-1]
        assert times[-1] == pytest.approx(0.05)
        exactly = exact(objective)
        walked = sampler.walk(
            lambda x, t: exactly(x, torch.full((len(x),), t)),
            process,
            times,
            start,
            drawn_from(generator()),
        )
        *_, x = walked
        return float((x - end).abs().max())

    for sampler, order in ((DpmSolver(), 2), (Ddim(0.0), 1)):
        errors = [error(sampler, steps) for steps in (41, 81, 161)]
        rates = [math.log2(a / b) for a, b in pairwise(errors)]
        assert rates == pytest.approx([order] * 2, abs=0.25), f"{type(sampler).__name__} {errors}"


def scheduler(theirs: Any, timesteps: int = T) -> Any:
    """A diffusers scheduler with its tables in float64, so that only formulas can differ from
    ours.
    """
    betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
    theirs.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return theirs


def network(x: Tensor, t: Tensor) -> Tensor:
    phase = t.view(-1, 1, 1, 1) / T
    return torch.tanh(x + 0.5 * x.roll(1, dims=3)) * (1.2 - phase) + 0.3 * torch.sin(3 * x + phase)


@pytest.mark.parametrize("clip", [True, False])
def test_ancestral_sampling_of_velocity_is_ddpm_scheduler(clip: bool) -> None:
    theirs = scheduler(
        DDPMScheduler(
            T, variance_type="fixed_large", clip_sample=clip, prediction_type="v_prediction"
        )
    )
    x, draws = normal(*SHAPE), generator(7)
    for index in range(T - 1, -1, -1):
        predicted = network(x, torch.full((3,), index + 1))
        x = theirs.step(predicted, index, x, generator=draws).prev_sample
    ours = VelocityPrediction(linear_schedule(T))
    sampled = sample(
        Ancestral(),
        ours.denoiser(network),
        ours.process,
        normal(*SHAPE),
        drawn_from(generator(7)),
        steps=1,
        clip=clip,
    )
    torch.testing.assert_close(sampled.images, x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_velocity_is_ddim_scheduler(eta: float) -> None:
    theirs = scheduler(
        DDIMScheduler(T, timestep_spacing="trailing", prediction_type="v_prediction")
    )
    theirs.set_timesteps(12)
    x, draws = normal(*SHAPE), generator(7)
    for index in theirs.timesteps.tolist():
        predicted = network(x, torch.full((3,), index + 1))
        x = theirs.step(
            predicted, index, x, eta=eta, use_clipped_model_output=True, generator=draws
        ).prev_sample
    ours = VelocityPrediction(linear_schedule(T))
    sampled = sample(
        Ddim(eta),
        ours.denoiser(network),
        ours.process,
        normal(*SHAPE),
        drawn_from(generator(7)),
        steps=12,
    )
    torch.testing.assert_close(sampled.images, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "objective"), [("epsilon", NoisePrediction), ("v_prediction", VelocityPrediction)]
)
def test_dpm_solver_is_dpm_solver_multistep_scheduler(
    kind: str, objective: Callable[[Any], Objective]
) -> None:
    theirs = DPMSolverMultistepScheduler(
        T,
        trained_betas=(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).numpy(),
        prediction_type=kind,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    # More steps than diffusers lowers the order of besides the last.
    theirs.set_timesteps(20)
    x = normal(*SHAPE)
    for index in theirs.timesteps:
        predicted = network(x, torch.full((3,), int(index) + 1))
        x = theirs.step(predicted, index, x).prev_sample
    ours = objective(linear_schedule(T))
    sampled = sample(
        DpmSolver(),
        ours.denoiser(network),
        ours.process,
        normal(*SHAPE),
        drawn_from(generator(7)),
        steps=20,
        clip=False,
    )
    # Their tables are float32.
    torch.testing.assert_close(sampled.images, x, rtol=1e-4, atol=1e-4)


def test_draws_of_its_own_make_an_image_independent_of_those_beside_it() -> None:
    objective = NoisePrediction(linear_schedule(T))

    def images(numbers: list[int]) -> Tensor:
        draw = drawn_for_each([generator(n) for n in numbers])
        start = draw(torch.empty(len(numbers), *SHAPE[1:], dtype=torch.float64))
        return sample(
            Ddim(1.0), objective.denoiser(network), objective.process, start, draw, steps=9
        ).images

    together = images([5, 6, 7])
    torch.testing.assert_close(together[1:2], images([6]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])

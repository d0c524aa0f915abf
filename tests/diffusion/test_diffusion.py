"""The diffusion room against closed forms and against diffusers, whose timestep index is t - 1."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from srfed.diffusion.objective import Objective
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.diffusion.process import VariancePreserving
from srfed.diffusion.sampler import Sampled, Sampler, drawn_from, sample
from srfed.diffusion.samplers.ancestral import Ancestral
from srfed.diffusion.samplers.ddim import Ddim
from srfed.diffusion.schedule import NoiseSchedule, build_schedule, cosine_schedule, linear_schedule

T = 60
SHAPE = (3, 2, 4, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed nonlinear ε that depends on the timestep and on neighbouring pixels."""
    phase = t.view(-1, 1, 1, 1) / T
    return torch.tanh(x + 0.5 * x.roll(1, dims=3)) * (1.2 - phase) + 0.3 * torch.sin(3 * x + phase)


def diffusion(timesteps: int = T) -> NoisePrediction:
    return NoisePrediction(linear_schedule(timesteps))


def walk(
    sampler: Sampler,
    network: Any,
    objective: Objective,
    start: Tensor,
    draws: torch.Generator,
    **options: Any,
) -> Sampled:
    return sample(
        sampler, objective.denoiser(network), objective.process, start, drawn_from(draws), **options
    )


def ancestral_sample(
    network: Any,
    objective: Objective,
    start: Tensor,
    generator: torch.Generator,
    *,
    variance: Literal["beta", "posterior"] = "beta",
    **options: Any,
) -> Sampled:
    """All timesteps, whatever number of steps is said."""
    return walk(Ancestral(variance), network, objective, start, generator, steps=1, **options)


def ddim_sample(
    network: Any,
    objective: Objective,
    start: Tensor,
    generator: torch.Generator,
    *,
    eta: float = 0.0,
    **options: Any,
) -> Sampled:
    return walk(Ddim(eta), network, objective, start, generator, **options)


def ddim_timesteps(top: int, steps: int) -> list[float]:
    return VariancePreserving(linear_schedule(max(70, top, steps))).path(steps, top)


def exact(scheduler: Any, timesteps: int = T) -> Any:
    """A diffusers scheduler with its table in float64, so that only formulas can differ from
    ours.
    """
    betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return scheduler


# Schedules


@pytest.mark.parametrize(("scale", "left"), [("none", "0.080"), ("match_1000", "0.006")])
def test_linear_schedule_leaves_the_stated_part_of_the_image(
    scale: Literal["none", "match_1000"], left: str
) -> None:
    assert f"{linear_schedule(500, scale=scale).alpha_bars[-1].sqrt():.3f}" == left


def test_match_1000_multiplies_every_beta() -> None:
    plain, matched = linear_schedule(500, scale="none"), linear_schedule(500, scale="match_1000")
    torch.testing.assert_close(matched.betas, 2 * plain.betas)
    assert plain.betas[0] == pytest.approx(1e-4)
    assert plain.betas[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("timesteps", [10, 500, 1000])
def test_cosine_betas_are_diffusers_squaredcos_cap_v2(timesteps: int) -> None:
    theirs = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2").betas
    ours = cosine_schedule(timesteps).betas
    torch.testing.assert_close(ours.float(), theirs)
    assert ours.max() == 0.999


def test_what_follows_from_the_betas() -> None:
    schedule = NoiseSchedule(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    assert schedule.timesteps == 3
    assert schedule.alphas.tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert schedule.alpha_bars.tolist() == pytest.approx([0.9, 0.72, 0.36])
    assert schedule.posterior_variances.tolist() == pytest.approx(
        [0, 0.1 / 0.28 * 0.2, 0.28 / 0.64 * 0.5]
    )
    assert schedule.alpha_bars.dtype == schedule.posterior_variances.dtype == torch.float64


def test_build_schedule_passes_every_setting_on() -> None:
    linear = build_schedule(100, "linear", 2e-4, 0.01, "none")
    assert torch.equal(linear.betas, linear_schedule(100, 2e-4, 0.01, "none").betas)
    assert torch.equal(
        build_schedule(100, "cosine", 2e-4, 0.01, "none").betas, cosine_schedule(100).betas
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoiseSchedule(torch.full((4,), 0.1)), "float64"),
        (lambda: NoiseSchedule(torch.full((2, 2), 0.1, dtype=torch.float64)), r"\(2, 2\)"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.0], dtype=torch.float64)), "0.1 to 1;"),
        (lambda: NoiseSchedule(torch.tensor([0.0, 0.5], dtype=torch.float64)), "from 0 to 0.5"),
        (lambda: NoiseSchedule(torch.tensor([0.1, math.nan], dtype=torch.float64)), "nan"),
        (lambda: NoiseSchedule(torch.full((2000,), 0.5, dtype=torch.float64)), "ᾱ_T = 0"),
        (lambda: linear_schedule(0), "timesteps 0"),
        (lambda: cosine_schedule(0), "timesteps 0"),
        (lambda: linear_schedule(20), r"to 1; each must lie in \[1e-12, 1\)"),
        (lambda: linear_schedule(500, scale="other"), "'other'.*none, match_1000"),  # type: ignore[arg-type]
        (
            lambda: build_schedule(500, "sigmoid", 1e-4, 0.02, "none"),  # type: ignore[arg-type]
            "'sigmoid'.*linear, cosine",
        ),
    ],
)
def test_an_impossible_schedule_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# Forward process and loss


def test_add_noise_is_diffusers() -> None:
    images, noise = normal(T, 1, 3, 3), normal(T, 1, 3, 3, seed=1)
    timesteps = torch.arange(1, T + 1)
    theirs = exact(DDPMScheduler(T)).add_noise(images, noise, timesteps - 1)
    ours = diffusion().process.add_noise(images, timesteps, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (
        diffusion().process.add_noise(images.float(), timesteps, noise.float()).dtype
        == torch.float32
    )


def test_the_forward_marginal_has_mean_and_variance_of_eq_3() -> None:
    """Walking eq. (2) from x_0 to x_t and jumping there by eq. (3) give one distribution."""
    schedule, t, count = linear_schedule(T), 20, 40_000
    x = torch.full((count,), 0.7, dtype=torch.float64)
    draws = generator()
    for beta in schedule.betas[:t].tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(
            count, generator=draws, dtype=x.dtype
        )
    images = torch.full((count, 1, 1, 1), 0.7, dtype=torch.float64)
    jumped = NoisePrediction(schedule).process.add_noise(
        images, torch.full((count,), t), normal(count, 1, 1, 1, seed=1)
    )
    assert jumped.mean() == pytest.approx(
        float(x.mean()), abs=5 * float(x.std()) * math.sqrt(2 / count)
    )
    assert jumped.std() == pytest.approx(float(x.std()), rel=5 / math.sqrt(count))


def test_tables_are_cast_once_from_float64() -> None:
    """At t = 1 of a gentle schedule, 1 - ᾱ_t in float32 would be wrong in the fourth digit."""
    objective = NoisePrediction(NoiseSchedule(torch.full((5,), 1e-6, dtype=torch.float64)))
    noise = torch.ones(1, 1, 1, 1)
    spread = objective.process.add_noise(torch.zeros(1, 1, 1, 1), torch.tensor([1]), noise)
    assert spread.item() == pytest.approx(1e-3, rel=1e-6)


def test_loss_of_the_perfect_and_of_the_zero_predictor() -> None:
    images, noise, timesteps = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([1, 30, T])
    objective = diffusion()
    assert objective.loss(lambda x, t: noise, images, timesteps, noise).tolist() == [
        0,
        0,
        0,
    ]
    zero = objective.loss(lambda x, t: torch.zeros_like(x), images, timesteps, noise)
    torch.testing.assert_close(zero, noise.square().flatten(1).mean(dim=1))


def test_the_network_is_shown_x_t_and_t_and_receives_gradients() -> None:
    images, noise, timesteps = normal(*SHAPE), normal(*SHAPE, seed=1), torch.tensor([1, 30, T])
    objective, weight, seen = diffusion(), torch.ones((), requires_grad=True), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.extend([x, t])
        return weight * x

    objective.loss(predict, images, timesteps, noise).mean().backward()
    x_t = objective.process.add_noise(images, timesteps, noise)
    torch.testing.assert_close(seen[0], x_t)
    assert torch.equal(seen[1], timesteps)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx((2 * (x_t - noise) * x_t).mean().item(), rel=1e-5)


def test_a_16_bit_prediction_is_used_in_the_images_type() -> None:
    images, noise = normal(*SHAPE, dtype=torch.float32), normal(*SHAPE, seed=1, dtype=torch.float32)
    objective, timesteps = diffusion(), torch.tensor([1, 30, T])
    losses = objective.loss(lambda x, t: torch.zeros_like(x).bfloat16(), images, timesteps, noise)
    torch.testing.assert_close(losses, noise.square().mean(dim=(1, 2, 3)))
    start = normal(*SHAPE, dtype=torch.float32)
    sampled = ddim_sample(lambda x, t: x.bfloat16(), objective, start, generator(), steps=4)
    widened = ddim_sample(lambda x, t: x.bfloat16().float(), objective, start, generator(), steps=4)
    assert torch.equal(sampled.images, widened.images)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(SHAPE, dtype=torch.uint8)}, "images is .*uint8"),
        ({"images": torch.zeros(3, 8)}, r"images is \(3, 8\)"),
        ({"noise": torch.zeros(3, 2, 4, 4)}, r"noise is \(3, 2, 4, 4\).*\(3, 2, 4, 5\)"),
        ({"noise": torch.zeros(SHAPE, dtype=torch.float16)}, "noise is .*float16"),
        (
            {"times": torch.ones(2, dtype=torch.long)},
            r"times is \(2,\).*each of the 3 images",
        ),
        ({"times": torch.ones(3)}, "times is .*float32.*int64"),
        ({"times": torch.tensor([0, 1, 2])}, f"from 0 to 2.*1..{T}"),
        ({"times": torch.tensor([1, 2, T + 1])}, f"from 1 to {T + 1}.*1..{T}"),
        ({"images": torch.zeros(SHAPE, device="meta")}, "images is on meta, the process on cpu"),
        ({"times": torch.ones(3, dtype=torch.long, device="meta")}, "times is on meta"),
    ],
)
def test_add_noise_refuses_what_does_not_fit(change: dict[str, Tensor], words: str) -> None:
    arguments = {
        "images": torch.zeros(SHAPE),
        "times": torch.ones(3, dtype=torch.long),
        "noise": torch.zeros(SHAPE),
    }
    with pytest.raises(ValueError, match=words):
        diffusion().process.add_noise(**(arguments | change))


def test_a_prediction_that_would_broadcast_is_refused() -> None:
    images, timesteps = torch.zeros(SHAPE), torch.ones(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the network returned \(3, 1, 4, 5\)"):
        diffusion().loss(lambda x, t: x[:, :1], images, timesteps, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match=r"the network returned \(3, 1, 4, 5\)"):
        ddim_sample(lambda x, t: x[:, :1], diffusion(), images, generator(), steps=3)


# Samplers against diffusers


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("variance", "theirs"), [("beta", "fixed_large"), ("posterior", "fixed_small")]
)
def test_ancestral_sampling_is_ddpm_scheduler(
    variance: Literal["beta", "posterior"], theirs: Any, clip: bool
) -> None:
    scheduler = exact(DDPMScheduler(T, variance_type=theirs, clip_sample=clip))
    x, draws, states = normal(*SHAPE), generator(7), {}
    for index in range(T - 1, -1, -1):
        noise = network(x, torch.full((3,), index + 1))
        x = states[index] = scheduler.step(noise, index, x, generator=draws).prev_sample
    sampled = ancestral_sample(
        network,
        diffusion(),
        normal(*SHAPE),
        generator(7),
        variance=variance,
        clip=clip,
        record=range(T),
    )
    for t in range(T):
        torch.testing.assert_close(sampled.states[t], states[t], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(sampled.images, x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [12, 1, T])
def test_ddim_is_ddim_scheduler(steps: int, eta: float, clip: bool) -> None:
    # "trailing" starts at T, as ours does; use_clipped_model_output takes the ε that fits the
    # clamped x_0.
    scheduler = exact(DDIMScheduler(T, clip_sample=clip, timestep_spacing="trailing"))
    scheduler.set_timesteps(steps)
    x, draws = normal(*SHAPE), generator(7)
    for index in scheduler.timesteps.tolist():
        noise = network(x, torch.full((3,), index + 1))
        x = scheduler.step(
            noise, index, x, eta=eta, use_clipped_model_output=True, generator=draws
        ).prev_sample
    sampled = ddim_sample(
        network, diffusion(), normal(*SHAPE), generator(7), steps=steps, eta=eta, clip=clip
    )
    torch.testing.assert_close(sampled.images, x, rtol=1e-8, atol=1e-8)


# Samplers against closed forms


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_all_noise_and_steps_is_ancestral_with_posterior_variance(clip: bool) -> None:
    start = normal(*SHAPE)
    ddim = ddim_sample(network, diffusion(), start, generator(7), steps=T, eta=1.0, clip=clip)
    ancestral = ancestral_sample(
        network, diffusion(), start, generator(7), variance="posterior", clip=clip
    )
    torch.testing.assert_close(ddim.images, ancestral.images, rtol=1e-8, atol=1e-8)


def small(x: Tensor, t: Tensor) -> Tensor:
    """An ε whose predicted x_0 is x_t / 10 at every t, inside [-1, 1] for the states of this
    file.
    """
    alpha_bar = linear_schedule(T).alpha_bars[t - 1].view(-1, 1, 1, 1)
    return (x - alpha_bar.sqrt() * x / 10) / (1 - alpha_bar).sqrt()


def test_clipping_changes_nothing_where_nothing_is_clipped() -> None:
    start = normal(*SHAPE)
    clipped, plain = (
        ancestral_sample(small, diffusion(), start, generator(7), clip=clip)
        for clip in (True, False)
    )
    torch.testing.assert_close(clipped.images, plain.images, rtol=1e-8, atol=1e-9)
    clipped, plain = (
        ddim_sample(small, diffusion(), start, generator(7), steps=9, clip=clip)
        for clip in (True, False)
    )
    torch.testing.assert_close(clipped.images, plain.images, rtol=1e-8, atol=1e-9)


def test_clip_keeps_images_in_range_and_its_absence_does_not() -> None:
    start = 3 * normal(*SHAPE)
    for clip in (True, False):
        ancestral = ancestral_sample(network, diffusion(), start, generator(), clip=clip).images
        ddim = ddim_sample(network, diffusion(), start, generator(), steps=7, clip=clip).images
        for images in (ancestral, ddim):
            assert bool(images.abs().max() <= 1) == clip


@pytest.mark.parametrize("sampler", ["beta", "posterior", "ddim"])
def test_sampling_a_gaussian_reproduces_its_mean_and_deviation(sampler: str) -> None:
    """For data N(m, s²) the best ε is known: E[ε | x_t] = sqrt(1-ᾱ) (x_t - sqrt(ᾱ) m) / (ᾱ s² + 1 -
    ᾱ).
    """
    m, s, count, objective = 0.4, 0.3, 20_000, diffusion(500)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = float(objective.process.schedule.alpha_bars[int(t[0]) - 1])
        return (
            math.sqrt(1 - alpha_bar)
            * (x - math.sqrt(alpha_bar) * m)
            / (alpha_bar * s**2 + 1 - alpha_bar)
        )

    start = normal(count, 1, 1, 1, dtype=torch.float32)
    if sampler == "ddim":
        images = ddim_sample(predict, objective, start, generator(1), steps=250, clip=False).images
    else:
        variance: Literal["beta", "posterior"] = "beta" if sampler == "beta" else "posterior"
        images = ancestral_sample(
            predict, objective, start, generator(1), variance=variance, clip=False
        ).images
    # Five standard errors, and 1 % of s for the finite number of steps.
    assert images.mean() == pytest.approx(m, abs=5 * s / math.sqrt(count) + 0.01 * s)
    assert images.std() == pytest.approx(s, abs=5 * s / math.sqrt(2 * count) + 0.01 * s)


@pytest.mark.parametrize("from_timestep", [T, 25, 1])
def test_the_exact_noise_leads_back_to_the_image(from_timestep: int) -> None:
    """A network that knows x_0 reconstructs it from any timestep, whatever noise is drawn on the
    way.
    """
    objective, images, noise = diffusion(), normal(*SHAPE).clamp(-1, 1), normal(*SHAPE, seed=1)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = objective.process.schedule.alpha_bars[t - 1].view(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()

    start = objective.process.add_noise(images, torch.full((3,), from_timestep), noise)
    ancestral = ancestral_sample(
        predict, objective, start, generator(), from_timestep=from_timestep
    )
    torch.testing.assert_close(ancestral.images, images)
    for steps, eta in ((1, 0.0), (7, 0.0), (T, 0.5)):
        ddim = ddim_sample(
            predict,
            objective,
            start,
            generator(),
            steps=steps,
            eta=eta,
            from_timestep=from_timestep,
        )
        torch.testing.assert_close(ddim.images, images)


# Timesteps, records, draws


def visited(sample: Callable[..., object]) -> list[int]:
    seen: list[int] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        assert t.dtype == torch.long
        seen.append(int(t[0]))
        return network(x, t)

    sample(predict)
    return seen


def test_every_timestep_is_visited_once() -> None:
    start = normal(*SHAPE)
    assert visited(lambda p: ancestral_sample(p, diffusion(), start, generator())) == list(
        range(T, 0, -1)
    )
    assert visited(
        lambda p: ancestral_sample(p, diffusion(), start, generator(), from_timestep=5)
    ) == [
        5,
        4,
        3,
        2,
        1,
    ]
    assert visited(
        lambda p: ddim_sample(p, diffusion(), start, generator(), steps=4, from_timestep=10)
    ) == [
        10,
        8,
        5,
        3,
    ]
    assert visited(
        lambda p: ddim_sample(p, diffusion(), start, generator(), steps=T, from_timestep=3)
    ) == [
        3,
        2,
        1,
    ]


def test_ddim_timesteps_are_even_strides_with_both_ends() -> None:
    assert ddim_timesteps(500, 50) == list(range(500, -1, -10))
    assert ddim_timesteps(500, 7) == [500, 429, 357, 286, 214, 143, 71, 0]
    for top in (1, 2, 49, 60):
        for steps in range(1, 70):
            path = ddim_timesteps(top, steps)
            strides = {before - after for before, after in pairwise(path)}
            assert (path[0], path[-1], len(path)) == (top, 0, min(steps, top) + 1)
            assert max(strides) - min(strides) <= 1
            assert min(strides) >= 1


def test_recorded_states_are_those_of_the_run() -> None:
    start = normal(*SHAPE)
    whole = ddim_sample(network, diffusion(), start, generator(), steps=6, record=[T, 50, 49, 7, 0])
    assert list(whole.states) == [T, 50, 49, 7, 0]
    assert torch.equal(whole.states[T], start)
    assert torch.equal(whole.states[0], whole.images)
    # The run visits 60, 50, 40, ..., so 49 is answered by 40 and 7 by 0.
    first = ddim_sample(network, diffusion(), start, generator(), steps=6, record=[40]).states[40]
    assert torch.equal(whole.states[49], first)
    assert torch.equal(whole.states[7], whole.images)
    rest = ddim_sample(network, diffusion(), first, generator(), steps=4, from_timestep=40)
    torch.testing.assert_close(rest.images, whole.images)
    assert ddim_sample(network, diffusion(), start, generator(), steps=6).states == {}


def test_draws_come_from_the_generator_alone() -> None:
    def run(seed: int, eta: float) -> Tensor:
        return ddim_sample(network, diffusion(), start, generator(seed), steps=8, eta=eta).images

    start = normal(*SHAPE)
    ancestral = [
        ancestral_sample(network, diffusion(), start, generator(seed)).images for seed in (0, 0, 1)
    ]
    assert torch.equal(ancestral[0], ancestral[1])
    assert not torch.equal(ancestral[0], ancestral[2])
    assert torch.equal(run(0, 0.5), run(0, 0.5))
    assert not torch.equal(run(0, 0.5), run(1, 0.5))
    assert torch.equal(run(0, 0.0), run(1, 0.0))


@pytest.mark.parametrize(("eta", "draws"), [(0.0, 0), (0.5, 7)])
def test_one_draw_a_step_and_none_in_the_last(eta: float, draws: int) -> None:
    used, fresh = generator(), generator()
    ddim_sample(network, diffusion(), normal(*SHAPE), used, steps=8, eta=eta)
    for _ in range(draws):
        torch.randn(SHAPE, generator=fresh, dtype=torch.float64)
    assert torch.equal(used.get_state(), fresh.get_state())


def test_sampling_builds_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    sampled = ddim_sample(
        lambda x, t: weight * x, diffusion(), normal(*SHAPE), generator(), steps=3
    )
    assert not sampled.images.requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, f"steps 0 .*1..{T}"),
        ({"steps": T + 1}, f"steps {T + 1} .*1..{T}"),
        ({"eta": 1.5}, r"eta 1.5 .*0..1"),
        ({"eta": math.nan}, "eta nan"),
        ({"from_timestep": 0}, f"from_timestep 0 .*1..{T}"),
        ({"from_timestep": T + 1}, f"from_timestep {T + 1} .*1..{T}"),
        ({"record": [11], "from_timestep": 10}, r"timestep 11.*0..10"),
        ({"record": [-1]}, "timestep -1"),
        ({"start": torch.zeros(3, 4, 4)}, r"start is \(3, 4, 4\).*N x C x H x W"),
        ({"start": torch.zeros(SHAPE, device="meta")}, "start is on meta"),
    ],
)
def test_ddim_refuses_what_does_not_fit(arguments: dict[str, Any], words: str) -> None:
    defaults = {"start": torch.zeros(SHAPE), "steps": 5, "generator": generator()}
    with pytest.raises(ValueError, match=words):
        ddim_sample(network, diffusion(), **(defaults | arguments))


def test_ancestral_refuses_what_does_not_fit() -> None:
    start = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="variance 'learned' is unknown; allowed: beta, posterior"):
        ancestral_sample(network, diffusion(), start, generator(), variance="learned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_timestep 61"):
        ancestral_sample(network, diffusion(), start, generator(), from_timestep=61)


def test_a_generator_elsewhere_is_refused() -> None:
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="generator is on cuda:0, the images on cpu"):
        ddim_sample(network, diffusion(), torch.zeros(SHAPE), elsewhere, steps=5, eta=1.0)  # type: ignore[arg-type]

"""SSIM-rec: test images taken back from a timestep, against diffusers and closed forms."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from skimage.metrics import structural_similarity
from torch import Tensor

from srfed.config.choices import OBJECTIVES, chosen
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.diffusion.process import Denoiser, Process
from srfed.diffusion.schedule import linear_schedule
from srfed.evaluation.metrics.reconstruction import ssim_of_reconstructions
from srfed.randomness import derive_generator

T = 60
TIMESTEPS = [3, 20, 30]
SEED, TASK = 7, "threes"


def photographs(count: int = 5) -> Tensor:
    """Smooth grey images of 12 x 12 in [-1, 1]."""
    noise = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=(12, 12), mode="bilinear").tanh()


def network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed nonlinear ε that depends on each image's own timestep and on neighbouring pixels."""
    phase = t.view(-1, 1, 1, 1) / T
    return torch.tanh(x + 0.5 * x.roll(1, dims=3)) * (1.2 - phase) + 0.3 * torch.sin(3 * x + phase)


def curve(
    denoiser: Denoiser, process: Process, steps: int | None, batch_size: int = 256
) -> dict[int, float]:
    return ssim_of_reconstructions(
        denoiser,
        process,
        photographs(),
        TIMESTEPS,
        steps=steps,
        variance="beta",
        batch_size=batch_size,
        seed=SEED,
        task=TASK,
    )


def diffused(process: Process, timestep: int) -> Tensor:
    """x_t of eq. (3), by the noise that the run's seed, the task and the timestep name."""
    images = photographs()
    signal, spread = process.levels(process.time_of(timestep))
    generator = derive_generator(SEED, "reconstruction", TASK, timestep)
    return signal * images + spread * torch.randn(images.shape, generator=generator)


def similarity(restored: Tensor) -> float:
    """scikit-image's SSIM of the restored photographs."""
    pairs = zip(photographs(), restored.clamp(-1, 1), strict=True)
    return float(
        np.mean(
            [
                structural_similarity(
                    *((one[0].double().numpy() + 1) / 2 for one in pair),
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                    data_range=1,
                )
                for pair in pairs
            ]
        )
    )


def test_few_steps_are_those_of_ddim_scheduler_from_each_timestep() -> None:
    """From 3, 20 and 30 in at most five steps: strides of 1, 4 and 6."""
    objective, steps = NoisePrediction(linear_schedule(T)), 5
    expected = {}
    for timestep in TIMESTEPS:
        scheduler = DDIMScheduler(T, clip_sample=True, timestep_spacing="trailing")
        scheduler.alphas_cumprod = linear_schedule(T).alpha_bars.float()
        scheduler.set_timesteps(T // (timestep // min(steps, timestep)))
        x = diffused(objective.process, timestep)
        visited = [index for index in scheduler.timesteps.tolist() if index < timestep]
        assert len(visited) == min(steps, timestep)
        for index in visited:
            noise = network(x, torch.full((len(x),), index + 1))
            x = scheduler.step(noise, index, x, use_clipped_model_output=True).prev_sample
        expected[timestep] = similarity(x)
    found = curve(objective.denoiser(network), objective.process, steps)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found.values()) < 0.99, "a network that restores all of it would show nothing"


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_one_step_is_the_best_guess_of_gaussian_images(prediction: str) -> None:
    """For pixels N(m, s²): E[x_0 | x_t] = m + a s² (x_t - a m) / (a² s² + b²)."""
    process = chosen(OBJECTIVES, prediction)(linear_schedule(T)).process
    mean, deviation = 0.1, 0.4

    def best(x: Tensor, times: Tensor) -> Tensor:
        levels = torch.tensor([process.levels(float(time)) for time in times]).float()
        a, b = levels.T.reshape(2, -1, 1, 1, 1)
        return mean + a * deviation**2 / (a**2 * deviation**2 + b**2) * (x - a * mean)

    found = curve(best, process, 1)
    for timestep in TIMESTEPS:
        x = diffused(process, timestep)
        time = torch.full((len(x),), process.time_of(timestep), dtype=process.time_dtype)
        assert found[timestep] == pytest.approx(similarity(best(x, time)), abs=1e-5)


def test_all_timesteps_are_one_batch_unless_that_is_too_large() -> None:
    objective = NoisePrediction(linear_schedule(T))
    asked: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return network(x, t)

    whole = curve(objective.denoiser(counted), objective.process, 5)
    assert asked == [15, 15, 15, 10, 10], "t = 3 has arrived after three steps"
    asked.clear()
    parted = curve(objective.denoiser(counted), objective.process, 5, batch_size=6)
    assert max(asked) == 6
    assert parted == pytest.approx(whole, abs=1e-6)
    asked.clear()
    old = curve(objective.denoiser(counted), objective.process, None)
    assert asked == [5] * sum(TIMESTEPS)
    assert all(abs(old[t] - whole[t]) > 1e-3 for t in (20, 30)), "Algorithm 2 is another way"


def test_algorithm_2_gives_the_network_no_more_images_than_it_takes_at_once() -> None:
    objective = NoisePrediction(linear_schedule(T))
    asked: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return network(x, t)

    whole = curve(objective.denoiser(counted), objective.process, None)
    asked.clear()
    parted = curve(objective.denoiser(counted), objective.process, None, batch_size=2)
    assert asked == [2, 2, 1] * sum(TIMESTEPS)
    assert parted == whole, "its draws are those of all images, whatever the batch"

"""The held-out denoising loss against closed forms, and its pairing.

For values N(m, s²) the best denoiser is known; its error in ε-space is a² s² / (a² s² + b²) with
x_t = a x_0 + b ε.
"""

import numpy as np
import pytest
from torch import Tensor

from srfed.config.choices import OBJECTIVES, chosen
from srfed.data.images import Images, to_model_range
from srfed.diffusion.objective import Objective
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.diffusion.objectives.velocity import VelocityPrediction
from srfed.diffusion.process import Denoiser
from srfed.diffusion.schedule import linear_schedule
from srfed.evaluation.metrics.denoising_loss import (
    MOMENTS,
    denoising_losses,
    loss_by_band,
    mean_loss,
    moments,
    paired_ratio,
)

MEAN, DEVIATION = 0.1, 0.25


def made(name: str) -> Objective:
    return chosen(OBJECTIVES, name)(linear_schedule(500))


def gaussian_images(count: int, seed: int = 0) -> Images:
    values = np.random.default_rng(seed).normal(MEAN, DEVIATION, size=(count, 16, 16, 1))
    return np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def levels(objective: Objective) -> list[tuple[float, float]]:
    process = objective.process
    return [process.levels(process.time_of(timestep)) for timestep in moments(process.timesteps)]


def exact(objective: Objective) -> Denoiser:
    """The best denoiser of N(MEAN, DEVIATION²)."""

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        signal, noise = objective.process.coefficients(times, x)
        total = (signal * DEVIATION) ** 2 + noise**2
        return MEAN + signal * DEVIATION**2 / total * (x - signal * MEAN)

    return denoise


def test_moments_are_evenly_spaced() -> None:
    assert moments(500) == [31, 94, 156, 219, 281, 344, 406, 469]
    assert moments(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert moments(1) == [1] * MOMENTS


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_best_denoiser_of_gaussian_images_has_the_error_that_theory_gives(name: str) -> None:
    objective, images = made(name), gaussian_images(400)
    losses = denoising_losses(exact(objective), objective.process, images, task="a", seed=0)
    assert losses.shape == (400, MOMENTS)
    assert losses.dtype == np.float64
    expected = [(a * DEVIATION) ** 2 / ((a * DEVIATION) ** 2 + b**2) for a, b in levels(objective)]
    # 102,400 squares, whose deviation is √2 times their mean: 2% is four and a half of its.
    assert losses.mean(axis=0) == pytest.approx(expected, rel=0.02)
    assert mean_loss(losses) == pytest.approx(np.mean(expected), rel=0.01)
    bands = loss_by_band(losses)
    assert bands["low"] == pytest.approx(np.mean(expected[:3]), rel=0.02)
    assert bands["middle"] == pytest.approx(np.mean(expected[3:5]), rel=0.02)
    assert bands["high"] == pytest.approx(np.mean(expected[5:]), rel=0.02)


def test_the_error_is_that_of_the_predicted_noise() -> None:
    objective, images = NoisePrediction(linear_schedule(500)), gaussian_images(3)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, times: Tensor) -> Tensor:
        seen.append((x, times))
        return 0.3 * x

    losses = denoising_losses(
        objective.denoiser(network), objective.process, images, task="a", seed=4
    )
    ((x, times),) = seen
    signal, noise = objective.process.coefficients(times, x)
    originals = to_model_range(images).repeat_interleave(MOMENTS, dim=0)
    epsilon = (x - signal * originals) / noise
    expected = (0.3 * x - epsilon).square().mean(dim=(1, 2, 3)).view(3, MOMENTS)
    assert losses == pytest.approx(expected.numpy(), rel=1e-4)


def test_objectives_give_one_number_for_one_denoiser() -> None:
    """A velocity network and a noise network that say the same of x_0."""
    noise, velocity = (
        NoisePrediction(linear_schedule(500)),
        VelocityPrediction(linear_schedule(500)),
    )
    best, images = exact(noise), gaussian_images(5)

    def predicts_noise(x: Tensor, times: Tensor) -> Tensor:
        signal, spread = noise.process.coefficients(times, x)
        return (x - signal * best(x, times)) / spread

    def predicts_velocity(x: Tensor, times: Tensor) -> Tensor:
        signal, spread = noise.process.coefficients(times, x)
        return (signal * x - best(x, times)) / spread

    first, second = (
        denoising_losses(objective.denoiser(network), objective.process, images, task="a", seed=0)
        for objective, network in ((noise, predicts_noise), (velocity, predicts_velocity))
    )
    assert first == pytest.approx(second, rel=1e-4)


def test_large_images_go_through_the_network_a_few_at_once() -> None:
    objective, asked = made("noise"), list[int]()

    def counted(x: Tensor, times: Tensor) -> Tensor:
        asked.append(len(x))
        return 0 * x

    images = np.zeros((9, 96, 96, 1), np.uint8)
    denoising_losses(counted, objective.process, images, task="a", seed=0)
    assert asked == [64, 8]


@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_batches_do_not_matter(batch_size: int) -> None:
    objective, images = made("velocity"), gaussian_images(6)
    whole, parts = (
        denoising_losses(
            exact(objective), objective.process, images, task="a", seed=0, batch_size=size
        )
        for size in (256, batch_size)
    )
    assert np.array_equal(whole, parts)


def test_noise_is_each_images_own_and_the_same_for_every_model() -> None:
    objective, images = made("noise"), gaussian_images(4)

    def losses(chosen: Images, task: str = "a", seed: int = 0) -> np.ndarray:
        return denoising_losses(exact(objective), objective.process, chosen, task=task, seed=seed)

    first = losses(images)
    assert np.array_equal(first, losses(images))
    assert np.array_equal(first[:2], losses(images[:2]))
    assert not np.array_equal(first, losses(images, task="b"))
    assert not np.array_equal(first, losses(images, seed=1))
    twice = losses(np.stack([images[0], images[0]]))
    assert not np.array_equal(twice[0], twice[1])


def test_no_image_gives_no_loss_and_impossible_calls_are_refused() -> None:
    objective = made("noise")
    none = denoising_losses(
        exact(objective), objective.process, gaussian_images(0), task="a", seed=0
    )
    assert none.shape == (0, MOMENTS)
    with pytest.raises(ValueError, match="batch_size 0"):
        denoising_losses(
            exact(objective), objective.process, gaussian_images(1), task="a", seed=0, batch_size=0
        )
    with pytest.raises(ValueError, match="uint8"):
        denoising_losses(
            exact(objective), objective.process, np.zeros((1, 8, 8, 1)), task="a", seed=0
        )


# The interval of a ratio


def test_a_ratios_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Losses of two models that share the images' difficulty: pairs, as the noise makes them."""
    rng, covered, widths, trials = np.random.default_rng(0), 0, [], 200
    for trial in range(trials):
        difficulty = rng.gamma(4.0, 0.25, size=(60, 1)) * np.ones((1, MOMENTS))
        alone = 1.2 * difficulty * rng.gamma(100.0, 0.01, size=difficulty.shape)
        together = difficulty * rng.gamma(100.0, 0.01, size=difficulty.shape)
        found = paired_ratio([alone], [together], seed=trial)
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(alone.mean() / together.mean())
        covered += found.low <= 1.2 <= found.high
        widths.append(found.high - found.low)
    assert 0.89 <= covered / trials <= 0.99
    # Unpaired it would be about 0.4: difficulty alone has a relative deviation of 0.5 / √60.
    assert np.mean(widths) < 0.04


def test_a_ratio_of_a_model_with_itself_is_one_and_every_task_counts_alike() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.gamma(2.0, size=(3, MOMENTS)), rng.gamma(2.0, size=(30, MOMENTS))
    same = paired_ratio([few, many], [few, many], seed=0)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    found = paired_ratio([2 * few, many], [few, many], seed=0)
    assert found.value == pytest.approx(1 + few.mean() / (few.mean() + many.mean()))
    assert found == paired_ratio([2 * few, many], [few, many], seed=0)
    assert found != paired_ratio([2 * few, many], [few, many], seed=1)
    with pytest.raises(ValueError, match="same images"):
        paired_ratio([few], [many], seed=0)
    with pytest.raises(ValueError, match="same images"):
        paired_ratio([], [], seed=0)

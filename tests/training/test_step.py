"""What a local step is given: images, timesteps, noise, and the network that it trains."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from srfed.model import build_diffusion
from support.local_training import Client, Draw, largest_difference, run_config, some_images

# Setup


def test_build_diffusion_applies_every_setting() -> None:
    settings = {"timesteps": 40, "beta_start": 2e-4, "beta_end": 0.01, "beta_scale": "none"}
    betas = build_diffusion(run_config(diffusion=settings), torch.device("cpu")).schedule.betas
    torch.testing.assert_close(betas, torch.linspace(2e-4, 0.01, 40, dtype=torch.float64))
    cosine = build_diffusion(
        run_config(diffusion={**settings, "schedule": "cosine"}), torch.device("cpu")
    )
    assert cosine.schedule.betas[-1] == 0.999


# Draws


def draws_of(**settings: Any) -> list[Draw]:
    rounds = settings.pop("rounds", (1,))
    task, images = settings.pop("task", "a"), settings.pop("images", None)
    client = Client(run_config(**settings), task, images)
    client.train(*rounds)
    return client.draws


def test_a_steps_images_are_the_tasks_in_passes_that_cross_the_rounds() -> None:
    images = some_images(8)
    known = {
        (image.transpose(2, 0, 1) / np.float32(127.5) - 1).tobytes(): i
        for i, image in enumerate(images)
    }
    draws = draws_of(images=images, batch_size=2, local_steps=3, rounds=(1, 2, 3, 4))
    seen = [known[image.numpy().tobytes()] for draw in draws for image in draw.images]
    assert len(seen) == 24
    for first in range(0, 24, 8):  # 4 steps a pass, 3 a round
        assert sorted(seen[first : first + 8]) == list(range(8))


def test_timesteps_are_uniform_from_1_to_the_last() -> None:
    draws = draws_of(
        diffusion={"timesteps": 4, "beta_scale": "none"},
        batch_size=100,
        local_steps=4,
        images=some_images(100),
    )
    counts = Counter(torch.cat([draw.timesteps for draw in draws]).tolist())
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(count - 100) < 5 * math.sqrt(75) for count in counts.values())


def test_noise_is_standard_normal() -> None:
    noise = torch.cat(
        [draw.noise.flatten() for draw in draws_of(batch_size=100, images=some_images(100))]
    )
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert float(noise.pow(4).mean()) == pytest.approx(3, abs=0.3)


def test_each_seed_task_round_and_step_has_its_own_noise_and_the_same_again() -> None:
    names = [{"seed": seed, "task": task} for seed in (0, 1) for task in ("a", "b")]
    draws = [
        draw.noise.numpy().tobytes() for name in names for draw in draws_of(**name, rounds=(1, 2))
    ]
    assert len(draws) == len(set(draws)) == 4 * 2 * 3
    assert draws == [
        d.noise.numpy().tobytes() for name in names for d in draws_of(**name, rounds=(1, 2))
    ]


def test_horizontal_flip_mirrors_about_half_of_the_images() -> None:
    images = some_images(40)
    known = {(image.transpose(2, 0, 1) / np.float32(127.5) - 1).tobytes() for image in images}
    mirrored = {
        (image[:, ::-1].transpose(2, 0, 1) / np.float32(127.5) - 1).tobytes() for image in images
    }

    def kinds(flip: bool) -> list[bool]:
        draws = draws_of(images=images, batch_size=40, data={"horizontal_flip": flip})
        seen = [image.numpy().tobytes() for draw in draws for image in draw.images]
        assert all(image in known or image in mirrored for image in seen)
        return [image in mirrored for image in seen]

    assert not any(kinds(False))
    assert 35 <= sum(kinds(True)) <= 85  # of 120


def test_channels_last_reaches_the_network_and_changes_no_more_than_rounding() -> None:
    images = some_images(8, channels=3)
    plain, last = (
        Client(run_config(resources={"channels_last": on}), images=images) for on in (False, True)
    )
    plain.train(1)
    last.train(1)
    assert all(d.images.is_contiguous(memory_format=torch.channels_last) for d in last.draws)
    assert not any(d.images.is_contiguous(memory_format=torch.channels_last) for d in plain.draws)
    assert (
        largest_difference(plain.weights, last.weights) < 2e-3 * 3
    )  # Adam may turn rounding into a step

"""Owners whose samples are generated as one program: each has those that it has by itself, to
rounding, and the same bits whoever else is there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srfed.config.sampling import SamplingConfig
from srfed.data.images import Images
from srfed.device import most_in_a_program
from srfed.errors import UserError
from srfed.evaluation.generation import CPU_IMAGES, Generated, generate_together, owners_at_once
from srfed.federation.site import Site
from srfed.federation.worker import Drawing, Worker, do_together
from srfed.model import build_objective
from srfed.networks.partition import Exclusive, Shared
from support.tiny_run import tiny_config

SETTINGS: dict[str, dict[str, Any]] = {
    "outer stages": {"model.exclusive_stages": 1},
    "guided": {
        "model.exclusive_stages": "none",
        "model.owned": ["vector", "film"],
        "sampling.guidance": 1.5,
    },
    "a table of tasks, edm": {
        "model.task_embedding": "shared",
        "model.exclusive_stages": "none",
        "diffusion.prediction": "edm",
    },
    "solver, velocity": {
        "model.exclusive_stages": "io",
        "diffusion.prediction": "velocity",
        "sampling.sampler": "dpm_solver",
    },
}
OWNERS, SAMPLES = 4, 3


class Owners:
    """Some owners of one process, each with θ_i of its own."""

    def __init__(self, changes: dict[str, Any], channels: int = 1, samples: int = SAMPLES) -> None:
        stack = {"federation.clients": OWNERS, "resources.stack": OWNERS}
        self.worker = Worker(tiny_config({**stack, **changes}), channels)
        self.calls = 0
        network = self.worker.model.forward

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return network(*arguments)

        self.worker.model.forward = counted  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(1)

        def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            """What starts at zero would make all owners alike."""
            return {
                name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in tensors.items()
            }

        first, state = self.worker.beginning
        shared = Shared(moved(first))
        self.drawings = [
            Drawing(
                Site(f"digit-{k}", Path(), index=k),
                shared,
                Exclusive(moved(state.exclusive.weights)),
                samples,
                (8, 8, channels),
            )
            for k in range(OWNERS)
        ]

    def together(self, *places: int) -> list[Generated]:
        found = do_together([(self.worker, self.drawings[k]) for k in places])
        assert all(isinstance(one, Generated) for one in found)
        return found  # type: ignore[return-value]

    def alone(self, place: int) -> Generated:
        return self.worker.generate(self.drawings[place])


def same(one: Generated, other: Generated) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.strip, other.strip)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_owner_has_the_samples_that_it_has_by_itself(name: str) -> None:
    owners = Owners(SETTINGS[name])
    alone = [owners.alone(k) for k in range(OWNERS)]
    by_themselves, owners.calls = owners.calls, 0
    together = owners.together(0, 1, 2, 3)
    assert owners.calls * OWNERS == by_themselves > 0, "one call of the network for all"
    for one, other in zip(alone, together, strict=True):
        for own, stacked in ((one.images, other.images), (one.strip, other.strip)):
            assert own.shape == stacked.shape
            apart = np.abs(own.astype(int) - stacked.astype(int))
            assert apart.max() <= 1
            assert (apart > 0).mean() < 0.01
    assert not np.array_equal(alone[0].images, alone[1].images)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_owners_bits_do_not_depend_on_who_else_is_there(channels: int) -> None:
    owners = Owners(SETTINGS["outer stages"], channels)
    most = most_in_a_program("cpu", channels)
    whole = owners.together(*range(OWNERS)[:most])
    for places in ([1, 0], [0], [1], [1, 1]):
        for place, found in zip(places, owners.together(*places), strict=True):
            assert same(found, whole[place])


def test_other_shares_and_those_that_are_too_large_are_told_apart() -> None:
    owners = Owners(SETTINGS["outer stages"])
    owners.drawings[3] = owners.drawings[3]._replace(samples=SAMPLES + 1)
    owners.together(0, 1)
    of_one_program, owners.calls = owners.calls, 0
    first, _, last = owners.together(0, 1, 3)
    assert owners.calls == 2 * of_one_program
    assert (len(first.images), len(last.images)) == (SAMPLES, SAMPLES + 1)
    large = Owners(SETTINGS["outer stages"], samples=CPU_IMAGES + 1)
    (one, other), owner = large.together(0, 1), large.alone(0)
    assert large.calls == 3 * of_one_program
    assert same(one, owner)
    assert not same(one, other)


def test_how_many_owners_are_sampled_at_once() -> None:
    def at_once(device: str, count: int, side: int = 8, channels: int = 1, **settings: Any) -> int:
        sampling = SamplingConfig(**settings)
        return owners_at_once(sampling, device, count=count, shape=(side, side, channels))

    card = "cuda (NVIDIA H200)"
    assert [at_once(card, n) for n in (1, 10, 100, 128, 129, 1000)] == [256, 25, 2, 2, 1, 1]
    assert at_once(card, 10, side=96) == 6, "as many pixels as of one owner"
    assert at_once(card, 10, batch_size=40) == 4
    assert [at_once("cpu", n) for n in (1, CPU_IMAGES, CPU_IMAGES + 1)] == [7, 7, 1]
    assert at_once("cpu", 4, channels=3) == 2
    assert at_once("cpu", 4, batch_size=7) == 1


@pytest.fixture
def half_broken() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The second half of what it is given, the second task's, becomes no number."""

    def denoiser(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(x)
        found[len(x) // 2 :] = torch.nan
        return found

    return denoiser


def test_a_model_that_has_diverged_is_its_own_owners(half_broken: Any) -> None:
    config = tiny_config({"sampling.clip": False})
    process = build_objective(config, torch.device("cpu")).process

    def of(tasks: Sequence[str]) -> list[Generated | UserError]:
        return generate_together(
            half_broken, process, config.sampling, count=2, shape=(8, 8, 1), seed=0, tasks=tasks
        )

    sound, broken = of(["a", "b"])
    assert isinstance(sound, Generated)
    images: Images = sound.images
    assert images.shape == (2, 8, 8, 1)
    assert isinstance(broken, UserError)
    assert str(broken).startswith("the model of b has diverged: its samples are no numbers")

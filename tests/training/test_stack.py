"""Owners that train as one program: what each of them would have by itself, to rounding, and the
same bits whoever else is in the stack.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from srfed.device import Captured
from srfed.errors import UserError
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Control, Shared
from srfed.training.local import Job, LocalResult, LocalTrainer, train_owners
from srfed.training.optimizer import PartOptimizer
from srfed.training.part import initial_state
from srfed.training.step import LocalStep
from support.local_training import Tensors, assert_close, same_bits, some_images
from support.tiny_run import tiny_config

BASE: dict[str, Any] = {
    "training.batch_size": 4,
    "training.minibatches": "continued",
    "training.optimizer": "sgd",
    "training.learning_rate": 0.05,
    "model.exclusive_stages": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "control variates, owned parts": {
        "training.control_variates": True,
        "model.owned": ["vector", "film"],
        "training.owned_learning_rate": 0.2,
    },
    "alternating, proximal, velocity": {
        "training.update": "alternating",
        "training.exclusive_steps": 1,
        "training.proximal": 0.1,
        "diffusion.prediction": "velocity",
    },
    "a table of tasks, edm, mirrored": {
        "model.task_embedding": "shared",
        "model.exclusive_stages": "none",
        "diffusion.prediction": "edm",
        "data.horizontal_flip": True,
    },
}


class Owners:
    """Three owners, each with images, weights, c - c_i and a place in the order of minibatches of
    its own.
    """

    def __init__(self, changes: dict[str, Any]) -> None:
        self.config = tiny_config({**BASE, **changes})
        self.model = build_model(self.config, 1)
        self.partition = build_partition(self.config, self.model)
        self.objective = build_objective(self.config, torch.device("cpu"))
        step = self.step(None)
        generator = torch.Generator().manual_seed(1)
        self.jobs: list[Job] = []
        for k in range(3):
            with torch.no_grad():
                # What starts at zero would keep other weights from moving.
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            shared = self.partition.take_shared(weights)
            trainer = LocalTrainer(
                self.config,
                self.model,
                self.partition,
                self.objective,
                f"owner-{k}",
                some_images(5 + 3 * k, seed=k),
                k,
                step,
            )
            correction = {name: torch.full_like(t, 1e-3 * (k + 1)) for name, t in shared.items()}
            self.jobs.append(
                Job(
                    trainer,
                    1,
                    shared,
                    initial_state(self.model, self.partition),
                    Control(correction) if self.config.training.control_variates else None,
                )
            )

    def step(self, stack: int | None, as_one: bool | None = None) -> LocalStep:
        return LocalStep(self.config, self.model, self.partition, self.objective, stack, as_one)

    def together(self, jobs: Sequence[Job], as_one: bool | None = None) -> list[LocalResult]:
        return train_owners(self.config, self.step(len(jobs), as_one), jobs)


def following(jobs: Sequence[Job], results: Sequence[LocalResult]) -> list[Job]:
    """Each one's next round, from its own φ."""
    return [
        job._replace(round_number=2, shared=Shared(result.shared), state=result.state)
        for job, result in zip(jobs, results, strict=True)
    ]


def tensors_of(result: LocalResult) -> Tensors:
    state = result.state
    groups: dict[str, dict[str, Tensor]] = {
        "shared": result.shared,
        "exclusive": state.exclusive.weights,
        "average": state.exclusive.average,
        "moments": state.exclusive.moments,
        "shared moments": state.shared_moments,
        "gradient": result.gradient,
    }
    return {f"{g} {name}": t for g, members in groups.items() for name, t in members.items()}


@pytest.mark.parametrize("as_one", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_each_owner_has_what_it_has_by_itself(name: str, as_one: bool) -> None:
    owners = Owners(SETTINGS[name])
    alone = together = owners.jobs
    for _ in range(2):
        by_itself = [job.trainer.run_alone(job) for job in alone]
        stacked = owners.together(together, as_one)
        for one, other in zip(by_itself, stacked, strict=True):
            assert_close(tensors_of(other), tensors_of(one), atol=3e-6)
            assert other.loss == pytest.approx(one.loss, rel=1e-5)
            assert other.images_by_quarter == one.images_by_quarter
            assert other.shared_steps == one.shared_steps
            assert other.state.exclusive.steps == one.state.exclusive.steps
            assert other.state.minibatches == one.state.minibatches
        alone, together = following(alone, by_itself), following(together, stacked)


def test_adams_moments_are_each_owners_and_the_bits_do_not_depend_on_the_stack() -> None:
    adam = {"training.optimizer": "adam", "training.local_steps": 1}
    owners = Owners({**SETTINGS["control variates, owned parts"], **adam})
    first = owners.jobs
    by_itself = [job.trainer.run_alone(job) for job in first]
    stacked = owners.together(first)
    for one, other in zip(by_itself, stacked, strict=True):
        # Not the weights: where a gradient is nothing but rounding, Adam takes it for a direction.
        moments = [
            {name: t for name, t in tensors_of(result).items() if "moments" in name}
            for result in (other, one)
        ]
        assert_close(*moments)
    # The first has had a round more than the others: a step count of its own.
    second = following(first, stacked)
    jobs = [second[0], *[job._replace(round_number=2) for job in first[1:]]]
    whole = [tensors_of(result) for result in owners.together(jobs)]
    for places in ([2, 0], [1, 2], [1, 1]):
        for place, result in zip(places, owners.together([jobs[k] for k in places]), strict=True):
            assert same_bits(tensors_of(result), whole[place])
    steps = [int(t) for name, t in whole[0].items() if name.startswith("moments step.")]
    assert set(steps) == {2}


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many owners' parameters each optimizer's step has moved, from now on."""
    moved, step = list[int](), PartOptimizer.step

    def counted(optimizer: PartOptimizer) -> None:
        moved.append(1 if optimizer.owners is None else optimizer.owners)
        step(optimizer)

    monkeypatch.setattr(PartOptimizer, "step", counted)
    return moved


def test_owners_step_as_one_where_they_have_stepped_as_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what Adam remembers; where one has had a round more, each by itself, to the bit."""
    adam = {"training.optimizer": "adam", "training.local_steps": 1, "training.gradient_clip": 0.05}
    owners = Owners({**SETTINGS["control variates, owned parts"], **adam})
    jobs, moved = owners.jobs, counted_steps(monkeypatch)
    for _ in range(2):
        moved.clear()
        apart = owners.together(jobs, as_one=False)
        assert moved == 6 * [1]
        moved.clear()
        as_one = owners.together(jobs, as_one=True)
        assert moved == 2 * [3]
        for one, other in zip(as_one, apart, strict=True):
            assert_close(tensors_of(one), tensors_of(other), atol=1e-6)
        jobs = following(jobs, apart)
    mixed = [jobs[0], *[job._replace(round_number=2) for job in owners.jobs[1:]]]
    mixed = [job._replace(round_number=2) for job in mixed]
    moved.clear()
    pairs = zip(owners.together(mixed, True), owners.together(mixed, False), strict=True)
    assert moved == 12 * [1]
    for one, other in pairs:
        assert same_bits(tensors_of(one), tensors_of(other))


@pytest.mark.parametrize("as_one", [False, True])
def test_a_step_is_captured_before_a_round_and_spoils_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, as_one: bool
) -> None:
    """The capture is made up: as a card's, it takes steps with whatever is there."""
    adam = {"training.optimizer": "adam", "training.minibatches": "ragged"}
    owners = Owners({**SETTINGS["control variates, owned parts"], **adam})
    jobs = [job._replace(trainer=owners.jobs[0].trainer) for job in owners.jobs]
    plain = owners.together(jobs, as_one)
    captured: list[tuple[int, ...]] = []

    def prepare(work: Captured, *arguments: Tensor) -> None:
        captured.append(tuple(arguments[0].shape))
        work(*arguments)

    monkeypatch.setattr(Captured, "prepare", prepare)
    step = owners.step(3, as_one)
    step.captures = True
    for _ in range(2):
        for one, other in zip(train_owners(owners.config, step, jobs), plain, strict=True):
            assert same_bits(tensors_of(one), tensors_of(other))
    # Of five images in batches of four: four of each owner and one, once and for all.
    assert captured == [(12, 1, 8, 8), (3, 1, 8, 8)]


def test_owners_of_other_shapes_or_numbers_of_steps_are_told_apart() -> None:
    ragged = {"training.minibatches": "ragged", "training.local_epochs": 1}
    owners = Owners({**ragged, "training.local_steps": None})
    forms = [job.form for job in owners.jobs]
    assert len(set(forms)) == 3
    assert owners.jobs[0]._replace(round_number=2).form not in forms
    assert len({job.form for job in Owners({}).jobs}) == 1


class Drawing(torch.nn.Module):
    """A network that draws at random, which a stack cannot do for each owner apart."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        predicted: Tensor = self.network(x + torch.randn_like(x), time)
        return predicted


def test_a_network_that_cannot_be_stacked_is_refused_in_one_sentence() -> None:
    owners = Owners({})
    step = owners.step(2)
    step.model.forward = Drawing(build_model(owners.config, 1)).forward  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^model.network unet cannot be trained with") as caught:
        train_owners(owners.config, step, owners.jobs[:2])
    assert "\n" not in str(caught.value)

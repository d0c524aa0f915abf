"""Centralised training against loops written here, against the clients' own training, and against
itself resumed.

No test depends on how draws are seeded, but those that say so: a recording forward process notes
the minibatches that were used, and whose images they are is read from the pixels.
"""

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_run import TINY, all_bits, records, stop_after_a_round
from torch import Tensor
from torch.func import functional_call

from srfed import simulate
from srfed.commands.train import centralise
from srfed.config import RunConfig, parse_config
from srfed.data import Task, load_tasks
from srfed.diffusion.process import Diffusion
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.generation import generate
from srfed.evaluation.references import References
from srfed.model import build_diffusion, build_model, build_partition, noise_of_task
from srfed.networks.partition import divide
from srfed.networks.unet import UNet
from srfed.runs.run import TrainedRun
from srfed.storage.client_store import ClientStore
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.centralised import CentralisedResult, CentralisedState, CentralisedTrainer
from srfed.training.local import ClientState, LocalResult, LocalTrainer
from srfed.training.minibatches import MinibatchOrder

torch.set_num_threads(1)

T = 100
RATE = 0.02
Tensors = dict[str, Tensor]
METHODS = ["pooled", "one_task", "balanced"]


def run_config(
    method: str,
    stages: Any = 2,
    *,
    clients: int = 3,
    embedding: str = "none",
    dropout: float = 0.0,
    seed: int = 0,
    **training: Any,
) -> RunConfig:
    """A tiny run; constant rates, no clipping, no warm-up, so that each test adds only what it is
    about.
    """
    defaults: dict[str, Any] = {
        "method": method,
        "batch_size": 4,
        "local_steps": 1,
        "optimizer": "sgd",
        "learning_rate": RATE,
        "learning_rate_schedule": "constant",
        "gradient_clip": None,
        "ema_decay": 0.8,
        "ema_warmup": False,
    }
    model = {
        "channels": [8, 8, 8, 8],
        "groups": 4,
        "attention_head_channels": 8,
        "attention_stages": [],
        "exclusive_stages": "none" if method == "pooled" else stages,
        "task_embedding": embedding,
        "dropout": dropout,
    }
    return parse_config(
        {
            "seed": seed,
            "diffusion": {"timesteps": T},
            "model": model,
            "training": {**defaults, **training},
            "federation": {"clients": clients},
        }
    )


def some_tasks(*sizes: int) -> list[Task]:
    images = [
        np.random.default_rng(i).integers(0, 256, (size, 8, 8, 1), dtype=np.uint8)
        for i, size in enumerate(sizes)
    ]
    return [Task(f"task{i}", group, group[:2], i) for i, group in enumerate(images)]


def perturbed(model: UNet, seed: int, names: Sequence[str]) -> Tensors:
    """Initial weights plus noise: zero-initialised layers would leave most gradients at zero."""
    tensors, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    return {
        n: tensors[n] + 0.05 * torch.randn(tensors[n].shape, generator=generator) for n in names
    }


@dataclass(frozen=True)
class Draw:
    """What one pass through the network was given."""

    images: Tensor
    timesteps: Tensor
    noise: Tensor


class RecordingDiffusion(Diffusion):
    """The forward process itself, noting what it is asked."""

    draws: list[Draw]

    def loss_per_image(
        self, predict_noise: Any, images: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        self.draws.append(Draw(images, timesteps, noise))
        return super().loss_per_image(predict_noise, images, timesteps, noise)


class Central:
    """A trainer with its place in the run, and a record of its draws; every θ_i starts somewhere
    else.
    """

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], diffusion: type[RecordingDiffusion]
    ) -> None:
        self.config, self.tasks = config, tasks
        self.model = build_model(config, 1)
        self.partition = build_partition(config, self.model)
        self.diffusion = diffusion(build_diffusion(config, torch.device("cpu")).schedule)
        self.diffusion.draws = []
        self.trainer = CentralisedTrainer(config, self.model, self.partition, self.diffusion, tasks)
        shared = perturbed(self.model, 0, self.partition.shared)
        states = {}
        for i, task in enumerate(tasks):
            exclusive = perturbed(self.model, i + 1, self.partition.exclusive)
            states[task.name] = ClientState(
                exclusive, {name: t.clone() for name, t in exclusive.items()}
            )
        self.start = self.state = CentralisedState(
            shared, {name: t.clone() for name, t in shared.items()}, states
        )
        self.results: list[CentralisedResult] = []

    def train(self, *rounds: int) -> CentralisedState:
        for number in rounds:
            self.results.append(self.trainer.train(number, self.state))
            self.state = self.results[-1].state
        return self.state

    def exclusive(self, task: int) -> Tensors:
        return self.state.tasks[f"task{task}"].exclusive


def central(config: RunConfig, *sizes: int) -> Central:
    return Central(config, some_tasks(*sizes), RecordingDiffusion)


def owners(tasks: Sequence[Task], draw: Draw) -> list[int]:
    """The task of each image, by its pixels."""
    known = {image.tobytes(): i for i, task in enumerate(tasks) for image in task.train}
    pixels = ((draw.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [known[np.ascontiguousarray(image).tobytes()] for image in pixels]


def ddpm_losses(
    model: UNet, weights: Mapping[str, Tensor], draw: Draw, tasks: Sequence[int] | None = None
) -> Tensor:
    """‖ε - ε_ψ(sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, t)‖² / d for each image, from the textbook."""
    betas = np.linspace(1e-4, 0.02, T) * 1000 / T
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))[draw.timesteps - 1][:, None, None, None]
    x_t = alpha_bar.sqrt().float() * draw.images + (1 - alpha_bar).sqrt().float() * draw.noise
    further = () if tasks is None else (torch.tensor(tasks),)
    predicted = functional_call(model, dict(weights), (x_t, draw.timesteps, *further))
    return ((predicted - draw.noise) ** 2).flatten(1).sum(dim=1) / draw.noise[0].numel()


class ByHand:
    """The same training in one plain loop over torch.optim's own classes, step by step on recorded
    draws.
    """

    def __init__(self, of: Central) -> None:
        self.of, config = of, of.config
        self.shared = leaves(of.start.shared)
        self.exclusive = {name: leaves(state.exclusive) for name, state in of.start.tasks.items()}
        parts = {"shared": self.shared, **self.exclusive}
        self.averages = {
            part: {n: t.detach().clone() for n, t in tensors.items()}
            for part, tensors in parts.items()
        }
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            part: torch.optim.SGD(tensors.values(), lr=config.training.learning_rate)
            if config.training.optimizer == "sgd"
            else torch.optim.Adam(tensors.values(), lr=config.training.learning_rate, fused=True)
            for part, tensors in parts.items()
            if tensors
        }
        self.steps: Counter[str] = Counter()

    def step(self, draws: Sequence[Draw]) -> None:
        """φ takes the step of the mean over the tasks' losses, eq. (8); each θ_i that of its own
        task's.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        losses, present = [], ["shared"]
        for draw in draws:
            tasks = owners(self.of.tasks, draw)
            own: Tensors = {}
            if self.of.partition.exclusive:
                assert len(set(tasks)) == 1
                present.append(f"task{tasks[0]}")
                own = self.exclusive[present[-1]]
            told = tasks if self.of.config.model.task_embedding == "shared" else None
            losses.append(ddpm_losses(self.of.model, {**self.shared, **own}, draw, told).mean())
        torch.stack(losses).mean().backward()
        for part in present:
            if part not in self.optimizers:
                continue
            tensors = self.shared if part == "shared" else self.exclusive[part]
            if part != "shared":
                for tensor in tensors.values():
                    if tensor.grad is not None:
                        tensor.grad *= len(draws)
            self.optimizers[part].step()
            decay, step = self.of.config.training.ema_decay, self.steps[part]
            decay = (
                min(decay, (1 + step) / (10 + step))
                if self.of.config.training.ema_warmup
                else decay
            )
            for name, average in self.averages[part].items():
                average.copy_(decay * average + (1 - decay) * tensors[name].detach())
            self.steps[part] += 1

    def follow(self, draws_per_step: int) -> None:
        draws = self.of.diffusion.draws
        assert draws
        assert len(draws) % draws_per_step == 0
        for first in range(0, len(draws), draws_per_step):
            self.step(draws[first : first + draws_per_step])

    def check(self, tolerance: float) -> None:
        """Each part is where the loop is, but for this share of the way it came."""
        start, state = self.of.start, self.of.state
        pairs = [
            (start.shared, state.shared, self.shared),
            (start.shared, state.shared_average, self.averages["shared"]),
        ]
        for name, own in state.tasks.items():
            first = start.tasks[name].exclusive
            pairs += [
                (first, own.exclusive, self.exclusive[name]),
                (first, own.exclusive_average, self.averages[name]),
            ]
        for before, actual, expected in pairs:
            assert list(before) == list(actual) == list(expected)
            assert length(actual, expected) <= tolerance * length(before, expected)


def length(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """‖after - before‖."""
    squares = [
        (after[n].detach().double() - before[n].detach().double()).square().sum() for n in before
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 2e-7
) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name].detach(),
            rtol=1e-5,
            atol=atol,
            msg=lambda t, name=name: f"{name}: {t}",
        )


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    assert list(one) == list(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """So that an equality of two things which both stood still does not pass."""
    moves = [float((before[name] - after[name].detach()).abs().max()) for name in before]
    assert np.mean([move > 1e-6 for move in moves]) > 0.8  # attention's key bias has no gradient


# --- Against a plain loop ------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("method", "embedding"),
    [
        ("pooled", "none"),
        ("pooled", "shared"),
        ("one_task", "none"),
        ("one_task", "shared"),
        ("balanced", "none"),
        ("balanced", "shared"),
        ("balanced", "exclusive"),
    ],
)
def test_training_is_a_plain_loop_over_the_same_draws(
    method: str, embedding: str, optimizer: str, warmup: bool
) -> None:
    """Weights, averages and, because later steps depend on them, moments."""
    config = run_config(
        method,
        embedding=embedding,
        optimizer=optimizer,
        ema_warmup=warmup,
        local_steps=1,
        batch_size=6,
        minibatches="continued",
        learning_rate=RATE if optimizer == "sgd" else 1e-3,
    )
    trained = central(config, 7, 9, 8)
    trained.train(1, 2)
    by_hand = ByHand(trained)
    by_hand.follow(3 if method == "balanced" else 1)
    # Adam divides by the gradient's size: where that is rounding noise, a step of either sign is
    # right.
    by_hand.check(1e-2)
    assert by_hand.steps["shared"] == trained.state.steps == 6
    assert_moved(trained.start.shared, trained.state.shared)
    assert_moved(trained.state.shared_average, trained.state.shared)


def test_one_balanced_step_of_gradient_descent_is_eq_8_on_the_union_batch() -> None:
    trained = central(run_config("balanced", centralised_batch_size=12), 5, 7, 9)
    trained.train(1)
    draws = trained.diffusion.draws
    assert [set(owners(trained.tasks, draw)) for draw in draws] == [{0}, {1}, {2}]
    shared = leaves(trained.start.shared)
    exclusive = [leaves(trained.start.tasks[task.name].exclusive) for task in trained.tasks]
    losses = [
        ddpm_losses(trained.model, {**shared, **own}, draw)
        for own, draw in zip(exclusive, draws, strict=True)
    ]
    union = torch.cat(losses).mean()
    union.backward()
    assert_close(trained.state.shared, {n: t - RATE * t.grad for n, t in shared.items()})
    for i, own in enumerate(exclusive):
        assert_close(trained.exclusive(i), {n: t - 3 * RATE * t.grad for n, t in own.items()})
        assert_moved(trained.start.tasks[f"task{i}"].exclusive, trained.exclusive(i))
    assert trained.results[0].loss == pytest.approx(union.item(), rel=1e-5)
    by_task = {f"task{i}": each.mean().item() for i, each in enumerate(losses)}
    assert trained.results[0].loss_by_task == pytest.approx(by_task, rel=1e-5)


@pytest.mark.parametrize("norm", [1e-3, 1e3])
def test_the_norms_of_the_gradients_of_the_core_and_of_each_task_are_clipped_apart(
    norm: float,
) -> None:
    clipped = central(
        run_config("balanced", centralised_batch_size=12, gradient_clip=norm), 5, 7, 9
    )
    free = central(run_config("balanced", centralised_batch_size=12), 5, 7, 9)
    clipped.train(1)
    free.train(1)
    parts = [(trained.start.shared, trained.state.shared) for trained in (clipped, free)]
    for i in range(3):
        parts += [(t.start.tasks[f"task{i}"].exclusive, t.exclusive(i)) for t in (clipped, free)]
    lengths = [length(before, after) / RATE for before, after in parts]
    for ours, whole in zip(lengths[::2], lengths[1::2], strict=True):
        assert ours == pytest.approx(
            min(norm, whole), rel=2e-2
        )  # a step of 2e-5 over weights of 0.1, in float32


# --- Against the clients' training ---------------------------------------------------------------


def locally(config: RunConfig, of: Central, *rounds: int) -> list[LocalResult]:
    """Each task's last round by a client of its own, which starts where the centralised run did."""
    results = []
    for i, task in enumerate(of.tasks):
        trainer = LocalTrainer(
            config, build_model(config, 1), of.partition, of.diffusion, task.name, task.train, i
        )
        shared, state = of.start.shared, of.start.tasks[task.name]
        for number in rounds:
            result = trainer.train(number, shared, state)
            shared, state = result.shared, result.state
        results.append(result)
    return results


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_balanced_task_is_one_client_alone(optimizer: str) -> None:
    settings: dict[str, Any] = {
        "clients": 1,
        "optimizer": optimizer,
        "local_steps": 3,
        "exclusive_learning_rate": RATE / 4,
        "dropout": 0.2,
        "learning_rate_schedule": "cosine",
    }
    trained = central(run_config("balanced", **settings), 10)
    trained.train(1, 2)
    federated = run_config(
        "federated", **settings, shared_moments="keep" if optimizer == "adam" else "reset"
    )
    (client,) = locally(federated, trained, 1, 2)
    assert_close(trained.state.shared, client.shared)
    assert_close(trained.exclusive(0), client.state.exclusive)
    assert_close(trained.state.tasks["task0"].exclusive_average, client.state.exclusive_average)
    assert_close(trained.state.tasks["task0"].exclusive_moments, client.state.exclusive_moments)
    assert_close(trained.state.shared_moments, client.state.shared_moments)
    assert trained.results[-1].loss == pytest.approx(client.loss, rel=1e-5)
    assert_moved(trained.start.shared, client.shared)


def test_one_balanced_step_a_round_is_the_federated_average_of_the_clients_steps() -> None:
    trained = central(run_config("balanced", centralised_batch_size=12), 5, 7, 9)
    trained.train(1)
    clients = locally(run_config("federated"), trained, 1)
    mean = {
        n: sum(client.shared[n].double() for client in clients).float() / 3
        for n in trained.partition.shared
    }
    assert_close(trained.state.shared, mean)
    for i, client in enumerate(clients):
        assert_close(trained.exclusive(i), client.state.exclusive)


def test_balanced_with_nothing_shared_is_as_many_trainings_apart() -> None:
    settings: dict[str, Any] = {"optimizer": "adam", "local_steps": 2, "ema_warmup": True}
    trained = central(run_config("balanced", "all", **settings, centralised_batch_size=12), 5, 7, 9)
    trained.train(1, 2)
    assert trained.state.shared == {}
    for i, client in enumerate(locally(run_config("federated", "all", **settings), trained, 1, 2)):
        own = trained.state.tasks[f"task{i}"]
        assert_close(own.exclusive, client.state.exclusive)
        assert_close(own.exclusive_average, client.state.exclusive_average)
        assert own.steps == client.state.steps == 4
        assert_moved(trained.start.tasks[f"task{i}"].exclusive, own.exclusive)


# --- Who sees what -------------------------------------------------------------------------------


def test_a_task_that_is_not_drawn_stays_as_it_is_and_the_core_moves_in_each_step() -> None:
    config = run_config(
        "one_task", optimizer="adam", centralised_batch_size=12, minibatches="continued"
    )
    trained = central(config, 5, 7, 9)
    seen = set()
    for number in range(1, 9):
        before = trained.state
        trained.train(number)
        (drawn,) = set(owners(trained.tasks, trained.diffusion.draws[-1]))
        seen.add(drawn)
        assert_moved(before.shared, trained.state.shared)
        assert list(trained.results[-1].loss_by_task) == [f"task{drawn}"]
        for i in range(3):
            old, new = before.tasks[f"task{i}"], trained.state.tasks[f"task{i}"]
            if i == drawn:
                assert_moved(old.exclusive, new.exclusive)
                assert new.steps == new.exclusive_steps == old.steps + 1
            else:
                assert same_bits(old.exclusive, new.exclusive)
                assert same_bits(old.exclusive_average, new.exclusive_average)
                assert same_bits(old.exclusive_moments, new.exclusive_moments)
                assert new.steps == new.exclusive_steps == old.steps
    assert seen == {0, 1, 2}


class NoNetwork(RecordingDiffusion):
    """Costs nothing, for tests of what is drawn."""

    def loss_per_image(
        self, predict_noise: Any, images: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        self.draws.append(Draw(images, timesteps, noise))
        return noise.flatten(1).mean(dim=1).requires_grad_()


def test_tasks_are_drawn_uniformly_and_anew_in_each_round() -> None:
    counts, successions, sequences = Counter[int](), Counter[tuple[int, int]](), set()
    for seed in range(5):
        trained = Central(
            run_config("one_task", seed=seed, local_steps=40, batch_size=1),
            some_tasks(2, 5, 4),
            NoNetwork,
        )
        for number in (1, 2):
            trained.diffusion.draws = []
            trained.train(number)
            sequence = [owners(trained.tasks, draw)[0] for draw in trained.diffusion.draws]
            counts.update(sequence)
            successions.update(pairwise(sequence))
            sequences.add(tuple(sequence))
    assert len(sequences) == 10, "each seed and each round has draws of its own"
    for counted, categories, quantile in ((counts, 3, 13.8), (successions, 9, 26.1)):  # χ² at 0.999
        expected = counted.total() / categories
        assert sum((counted[c] - expected) ** 2 / expected for c in counted) < quantile
        assert len(counted) == categories


def test_a_task_learns_from_nobody_elses_images() -> None:
    tasks = some_tasks(5, 7, 9)
    poisoned = [*tasks[:1], Task("task1", 255 - tasks[1].train, tasks[1].test, 1), *tasks[2:]]
    config = run_config(
        "balanced", "all", centralised_batch_size=12, local_steps=2, optimizer="adam"
    )
    clean, other = (Central(config, each, RecordingDiffusion) for each in (tasks, poisoned))
    clean.train(1)
    other.train(1)
    assert [same_bits(clean.exclusive(i), other.exclusive(i)) for i in range(3)] == [
        True,
        False,
        True,
    ]


def test_pooled_images_come_alike_and_balanced_tasks() -> None:
    """A pass of pooled training has each image once, whatever the tasks' sizes; balanced has each
    task as often.
    """
    pooled = Central(
        run_config("pooled", local_steps=8, batch_size=1), some_tasks(3, 12, 9), RecordingDiffusion
    )
    pooled.train(1)
    drawn = [i for draw in pooled.diffusion.draws for i in owners(pooled.tasks, draw)]
    assert Counter(drawn) == {0: 3, 1: 12, 2: 9}
    balanced = Central(
        run_config("balanced", local_steps=8, batch_size=3),
        some_tasks(3, 12, 9),
        RecordingDiffusion,
    )
    balanced.train(1)
    drawn = [i for draw in balanced.diffusion.draws for i in owners(balanced.tasks, draw)]
    assert Counter(drawn) == {0: 24, 1: 24, 2: 24}


# --- Budgets and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 3, 6, 12, 24])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_has_as_many_images_as_a_federated_one(method: str, size: int | None) -> None:
    config = run_config(
        method, local_steps=2, batch_size=12, centralised_batch_size=size, minibatches="continued"
    )
    trained = Central(config, some_tasks(5, 7, 30), RecordingDiffusion)
    trained.train(1)
    assert (
        trained.results[0].images
        == 3 * 2 * 12
        == sum(len(draw.images) for draw in trained.diffusion.draws)
    )
    assert trained.state.steps == 3 * 2 * 12 // (size or 12)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"method": "balanced"}, ["centralised_batch_size 4", "3 tasks", "multiples of 3"]),
        (
            {"method": "balanced", "centralised_batch_size": 7},
            ["centralised_batch_size 7", "3 tasks", "multiples of 3"],
        ),
        (
            {"method": "one_task", "centralised_batch_size": 5},
            ["centralised_batch_size 5", "does not divide", "12 images"],
        ),
        (
            {"method": "federated", "centralised_batch_size": 4},
            ["centralised_batch_size 4", "centralised method"],
        ),
        (
            {"method": "pooled", "local_steps": None, "local_epochs": 1},
            ["local_epochs 1", "local_steps"],
        ),
        ({"method": "balanced", "centralised_batch_size": 0}, ["centralised_batch_size", "0"]),
    ],
)
def test_impossible_sizes_are_refused_by_name_and_value(
    training: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        run_config(**training)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [
        (
            "one_task",
            12,
            r"centralised_batch_size = 12 asks for 12 images of 'task0' .* 5 .* up to 5\b",
        ),
        (
            "balanced",
            24,
            r"centralised_batch_size = 24 asks for 8 images of 'task0' .* 5 .* up to 15\b",
        ),
        (
            "pooled",
            24,
            r"centralised_batch_size = 24 asks for 24 images of 'all tasks' .* 21 .* up to 21\b",
        ),
    ],
)
def test_a_batch_above_the_images_is_refused_unless_batches_may_run_on(
    method: str, size: int, message: str
) -> None:
    settings: dict[str, Any] = {"centralised_batch_size": size, "local_steps": 2}
    with pytest.raises(UserError, match=f"{message}.*minibatches = ragged or continued"):
        central(run_config(method, **settings), 5, 7, 9)
    trained = Central(
        run_config(method, **settings, minibatches="continued"),
        some_tasks(5, 7, 9),
        RecordingDiffusion,
    )
    trained.train(1)
    assert trained.results[0].images == 24


# --- The minibatches' order ----------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 30), st.integers(0, 3))
def test_batches_across_passes_are_full_and_together_one_pass_after_another(
    images: int, batch_size: int, start: int, seed: int
) -> None:
    def order() -> MinibatchOrder:
        return MinibatchOrder(images, batch_size, "continued", seed, "a")

    one = order()
    batches = [one.indices(step) for step in range(start + 4)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.long for batch in batches)
    sequence = torch.cat(batches).tolist()
    for first in range(0, len(sequence) - images + 1, images):
        assert sorted(sequence[first : first + images]) == list(range(images))
    last = sequence[len(sequence) // images * images :]
    assert len(set(last)) == len(last)
    resumed = order()
    for step in range(start, start + 4):
        assert torch.equal(resumed.indices(step), batches[step])
    assert torch.equal(resumed.indices(0), batches[0]), "any order of asking"


def test_passes_differ_and_those_that_fit_are_those_without_running_on() -> None:
    across, within = (
        MinibatchOrder(12, 4, minibatches, 0, "a") for minibatches in ("continued", "whole")
    )
    batches = [across.indices(step).tolist() for step in range(9)]
    assert batches == [within.indices(step).tolist() for step in range(9)]
    passes = [tuple(map(tuple, batches[i : i + 3])) for i in (0, 3, 6)]
    assert len(set(passes)) == 3


# --- A client's further ways to train ------------------------------------------------------------


def client_steps(steps: int, **settings: Any) -> tuple[Central, LocalResult]:
    """One client's first round, and where it started with what it drew."""
    place = central(run_config("balanced", clients=1), 10)
    (result,) = locally(run_config("federated", clients=1, local_steps=steps, **settings), place, 1)
    return place, result


def test_the_proximal_term_pulls_with_mu_times_the_distance() -> None:
    strength = 3.0
    (_, first), (_, first_free) = client_steps(1, proximal=strength), client_steps(1)
    assert same_bits(first.shared, first_free.shared), "no distance yet"
    place, second = client_steps(2, proximal=strength)
    shared, exclusive = leaves(first.shared), leaves(first.state.exclusive)
    ddpm_losses(place.model, {**shared, **exclusive}, place.diffusion.draws[1]).mean().backward()
    expected = {
        n: t - RATE * (t.grad + strength * (t - place.start.shared[n])) for n, t in shared.items()
    }
    assert_close(second.shared, expected)
    assert_close(second.state.exclusive, {n: t - RATE * t.grad for n, t in exclusive.items()})
    unpulled = client_steps(2)[1].shared
    assert max(float((unpulled[n] - second.shared[n]).abs().max()) for n in shared) > 1e-5


def test_the_proximal_term_is_the_gradient_of_fedprox() -> None:
    """μ/2 ‖φ - φ^r‖² differentiated by autograd, over a round of Adam."""
    place, result = client_steps(3, proximal=0.7, optimizer="adam")
    shared, exclusive = leaves(place.start.shared), leaves(place.start.tasks["task0"].exclusive)
    optimizer = torch.optim.Adam([*shared.values(), *exclusive.values()], lr=RATE, fused=True)
    for draw in place.diffusion.draws:
        optimizer.zero_grad()
        distance = sum((t - place.start.shared[n]).square().sum() for n, t in shared.items())
        (
            ddpm_losses(place.model, {**shared, **exclusive}, draw).mean() + 0.7 / 2 * distance
        ).backward()
        optimizer.step()
    assert_close(result.shared, shared, atol=2e-5)
    assert_close(result.state.exclusive, exclusive, atol=2e-5)


def test_exclusive_updates_leave_every_bit_of_the_core_and_train_the_task() -> None:
    place, result = client_steps(3, update="exclusive", proximal=1.0)
    assert same_bits(result.shared, place.start.shared)
    assert result.shared_steps == 0
    assert result.state.steps == result.state.exclusive_steps == len(place.diffusion.draws) == 3
    exclusive = leaves(place.start.tasks["task0"].exclusive)
    optimizer = torch.optim.SGD(exclusive.values(), lr=RATE)
    for draw in place.diffusion.draws:
        optimizer.zero_grad()
        ddpm_losses(place.model, {**place.start.shared, **exclusive}, draw).mean().backward()
        optimizer.step()
    assert_close(result.state.exclusive, exclusive)
    assert_moved(place.start.tasks["task0"].exclusive, result.state.exclusive)


def test_exclusive_updates_with_nothing_exclusive_are_refused() -> None:
    with pytest.raises(UserError, match=r"update exclusive trains nothing .*exclusive_stages none"):
        run_config("federated", "none", update="exclusive")
    run_config("federated", "none", update="exclusive", embedding="exclusive")


# --- The network is told its task ----------------------------------------------------------------


def test_only_the_rows_of_tasks_in_the_minibatch_have_a_gradient() -> None:
    trained = central(
        run_config("pooled", clients=6, embedding="shared", batch_size=1, centralised_batch_size=6),
        *[5] * 6,
    )
    trained.train(1)
    present = set(owners(trained.tasks, trained.diffusion.draws[0]))
    assert 1 < len(present) < 6, "this seed tells nothing"
    before, after = (state.shared["task_table.weight"] for state in (trained.start, trained.state))
    moved = {row for row in range(6) if not torch.equal(before[row], after[row])}
    assert moved == present


def test_a_client_of_a_federation_moves_its_own_row() -> None:
    config = run_config("federated", "none", embedding="shared")
    place = central(run_config("one_task", "none", embedding="shared"), 5, 7, 9)
    before = place.start.shared["task_table.weight"]
    for i, client in enumerate(locally(config, place, 1)):
        after = client.shared["task_table.weight"]
        assert {row for row in range(3) if not torch.equal(before[row], after[row])} == {i}


def test_a_task_samples_with_its_own_row() -> None:
    """That is: as a network without a table, whose timesteps' embedding has the row added from
    outside.
    """
    config = run_config("pooled", embedding="shared")
    model, plain = build_model(config, 1), build_model(run_config("pooled"), 1)
    weights = perturbed(model, 0, list(model.state_dict()))
    model.load_state_dict(weights)
    plain.load_state_dict({n: t for n, t in weights.items() if n != "task_table.weight"})
    x, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 50, 100])
    outputs = []
    for task in range(3):
        row = weights["task_table.weight"][task]
        hook = plain.timestep.register_forward_hook(
            lambda _module, _inputs, output, row=row: output + row
        )
        with torch.no_grad():
            outputs.append(noise_of_task(model, task)(x, timesteps))
            torch.testing.assert_close(outputs[-1], plain(x, timesteps))
        hook.remove()
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    with pytest.raises(ValueError, match="cannot do without"):
        model(x, timesteps)
    with pytest.raises(ValueError, match="shared task embedding"):
        plain(x, timesteps, torch.zeros(4, dtype=torch.long))
    for task in (-1, 3):
        with pytest.raises(UserError, match="tasks 0 to 2"):
            noise_of_task(model, task)


RULES: list[Any] = ["none", "io", 1, 2, 3, 4, "all", ["up.0.*"], ["stem", "head"]]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_tasks_vector_is_exclusive_under_every_rule_and_a_table_shared_unless_all_is_exclusive(
    rule: Any,
) -> None:
    vector = build_model(run_config("balanced", embedding="exclusive", batch_size=3), 1)
    partition = divide(vector, rule)
    assert "task_vector.value" in partition.exclusive
    assert not any("task_vector" in name for name in partition.shared)
    assert sorted(partition.shared + partition.exclusive) == sorted(vector.state_dict())
    # What is in a message: the core's tensors, those of a network without a vector.
    plain = build_model(run_config("balanced", batch_size=3), 1)
    assert partition.shared == divide(plain, rule).shared
    assert partition.fingerprint(vector.state_dict()) == divide(plain, rule).fingerprint(
        plain.state_dict()
    )
    table = build_model(run_config("balanced", embedding="shared", batch_size=3), 1)
    assert ("task_table.weight" in divide(table, rule).shared) == (rule != "all")


def test_a_new_vector_changes_nothing_and_then_learns() -> None:
    config = run_config("federated", "none", embedding="exclusive")
    vector, plain = build_model(config, 1), build_model(run_config("federated", "none"), 1)
    own = vector.state_dict()
    assert same_bits({n: own[n] for n in plain.state_dict()}, plain.state_dict())
    weights = perturbed(plain, 0, list(plain.state_dict()))
    plain.load_state_dict(weights)
    vector.load_state_dict({**weights, "task_vector.value": own["task_vector.value"]})
    x, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 50, 100])
    with torch.no_grad():
        assert torch.equal(vector(x, timesteps), plain(x, timesteps))
        vector.task_vector.value.add_(1)  # type: ignore[union-attr, operator]
        assert not torch.allclose(vector(x, timesteps), plain(x, timesteps), atol=1e-3)
    place = central(run_config("one_task", "none", embedding="exclusive"), 5, 7, 9)
    for i, client in enumerate(locally(config, place, 1)):
        assert list(client.state.exclusive) == ["task_vector.value"]
        assert "task_vector.value" not in client.shared
        assert_moved(place.start.tasks[f"task{i}"].exclusive, client.state.exclusive)


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    evaluation = {
        "every": 0,
        "samples": 6,
        "samples_between": 6,
        "ssim_images": 1,
        "ssim_timestep": 5,
        "ssim_curve": [5],
    }
    content = {
        **TINY,
        "evaluation": {**TINY["evaluation"], **evaluation, "memorisation_quantile": 0.0},
    }
    content["training"] = {**TINY["training"], "batch_size": 12}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **content}))
    return path


METHOD_OPTIONS = {
    "pooled": [
        "training.method=pooled",
        "model.exclusive_stages=none",
        "model.task_embedding=shared",
    ],
    "one_task": ["training.method=one_task"],
    "balanced": ["training.method=balanced", "training.centralised_batch_size=36"],
}


def setting(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def whole_run(tiny: Path, path: Path, method: str, rounds: int) -> RunFolder:
    options = setting(*METHOD_OPTIONS[method], f"federation.rounds={rounds}")
    assert centralise(["--config", str(tiny), "--run-dir", str(path), *options]) == 0
    return RunFolder.open(path)


def losses(run: RunFolder) -> list[Any]:
    return [(line["round"], line["loss"]) for line in records(run) if line["kind"] == "round"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a round, and again between the tasks' stores and the checkpoint of φ."""
    undisturbed = whole_run(tiny, tmp_path / "whole", method, 3)
    run = whole_run(tiny, tmp_path / "run", method, 1)
    more = ["--resume", str(run.path), *setting("federation.rounds=3")]
    save = ServerCheckpoints.save

    def crash(checkpoints: ServerCheckpoints, state: Any) -> None:
        if state.round == 2:
            raise KeyboardInterrupt
        save(checkpoints, state)

    with monkeypatch.context() as patch:
        patch.setattr(ServerCheckpoints, "save", crash)
        with pytest.raises(SystemExit) as stopped:
            centralise(more)
    assert stopped.value.code == 130
    assert ServerCheckpoints(run.server, 3).rounds() == [0, 1]
    task = "digit-0"
    assert (ClientStore(run.clients, task, run.lineage, 3).folder / "round-00002").exists()
    assert centralise(more) == 0
    run = RunFolder.open(run.path)
    assert all_bits(run) == all_bits(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert [number for number, _ in losses(run)] == [1, 2, 3]
    evaluation = [line for line in records(run) if line["kind"] == "evaluation"][-1]
    assert evaluation == [line for line in records(undisturbed) if line["kind"] == "evaluation"][-1]


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    options = setting(*METHOD_OPTIONS["one_task"], "federation.rounds=9999")
    arguments = ["--config", str(tiny), "--run-dir", str(path), *options]
    code, _ = stop_after_a_round(
        [sys.executable, "-m", "srfed", "centralise", *arguments], signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    run = RunFolder.open(path)
    rounds = ServerCheckpoints(run.server, 3).rounds()[-1] + 2
    assert centralise(["--resume", str(path), *setting(f"federation.rounds={rounds}")]) == 0
    undisturbed = whole_run(tiny, tmp_path / "whole", "one_task", rounds)
    run = RunFolder.open(path)
    assert all_bits(run) == all_bits(undisturbed)
    assert losses(run) == losses(undisturbed)


def test_a_conditional_run_draws_each_task_with_its_own_row(tiny: Path, tmp_path: Path) -> None:
    """The samples that it scored, and those of the run opened later, are those of the row put in by
    hand.
    """
    run = whole_run(tiny, tmp_path / "run", "pooled", 1)
    trained = TrainedRun(run.path, run.config.resources)
    assert [task.task for task in trained.tasks] == ["digit-0", "digit-1", "digit-2"]
    model = build_model(run.config, 1)
    model.load_state_dict(trained.shared)
    model.eval()
    samples = {}
    for row, task in enumerate(trained.tasks):
        # Two images each: the run's six.
        arguments: dict[str, Any] = {
            "count": 2,
            "shape": trained.shape,
            "seed": 0,
            "task": task.task,
        }

        def by_hand(x: Tensor, timesteps: Tensor, row: int = row) -> Tensor:
            return model(x, timesteps, torch.full((len(x),), row))

        ours = generate(trained.model_of(task), trained.diffusion, run.config.sampling, **arguments)
        expected = generate(by_hand, trained.diffusion, run.config.sampling, **arguments)
        np.testing.assert_array_equal(ours.images, expected.images)
        samples[task.task] = expected.images
    tests = {task.name: task.test for task in load_tasks(run.config.data, 3)}
    scores = References(load_feature_network("embedded", "", torch.device("cpu")), tests).score(
        samples
    )
    (evaluation,) = [line for line in records(run) if line["kind"] == "evaluation"]
    assert evaluation["score"] == pytest.approx(scores.overall, rel=1e-6)


@pytest.mark.parametrize(
    ("main", "options", "words"),
    [
        (simulate.main, METHOD_OPTIONS["pooled"], ["training.method = pooled", "srfed centralise"]),
        (
            simulate.main,
            METHOD_OPTIONS["balanced"],
            ["training.method = balanced", "srfed centralise"],
        ),
        (
            centralise,
            [],
            ["training.method = federated", "srfed.simulate", "pooled, one_task, balanced"],
        ),
        (centralise, ["training.method=pooled"], ["exclusive_stages", "2", "none"]),
        (
            centralise,
            ["training.method=one_task", "training.batch_size=400"],
            ["training.batch_size = 400", "'digit-0'", "allowed: up to"],
        ),
    ],
)
def test_what_a_command_does_not_do_it_refuses_in_one_line(
    main: Any,
    options: list[str],
    words: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    assert main(["--config", str(tiny), "--run-dir", str(path), *setting(*options)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not path.exists(), "nothing is written before the check"


def test_pooled_batches_may_be_larger_than_a_task(tiny: Path, tmp_path: Path) -> None:
    options = [*METHOD_OPTIONS["pooled"], "data.images_per_task=10", "federation.rounds=1"]
    assert (
        centralise(["--config", str(tiny), "--run-dir", str(tmp_path / "run"), *setting(*options)])
        == 0
    )


def test_a_refusal_in_a_process_of_its_own_has_no_traceback(tiny: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "srfed",
        "centralise",
        "--config",
        str(tiny),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: training.method = federated")
    assert done.stderr.count("\n") == 1

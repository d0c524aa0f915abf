"""Centralised training against loops written here and against the clients' own training.

No test depends on how draws are seeded, but those that say so: a recording forward process notes
the minibatches that were used, and whose images they are is read from the pixels.
"""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from srfed.data import Task
from srfed.device import Captured
from srfed.errors import UserError
from support.centralised import (
    METHODS,
    RATE,
    ByHand,
    Central,
    Draw,
    RecordingObjective,
    assert_close,
    assert_moved,
    central,
    ddpm_losses,
    leaves,
    length,
    locally,
    owners,
    run_config,
    same_bits,
    some_tasks,
)

# --- Against a plain loop ------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("method", "embedding", "stages", "owned"),
    [
        ("pooled", "none", "none", []),
        ("pooled", "shared", "none", []),
        ("one_task", "none", 2, []),
        ("one_task", "shared", 2, []),
        ("balanced", "none", 2, []),
        ("balanced", "shared", 2, []),
        ("balanced", "none", 2, ["vector"]),
        ("balanced", "none", "none", ["vector", "film"]),
        ("one_task", "none", "none", ["vector", "film"]),
    ],
)
def test_training_is_a_plain_loop_over_the_same_draws(
    method: str, embedding: str, stages: Any, owned: list[str], optimizer: str, warmup: bool
) -> None:
    """Weights, averages and, because later steps depend on them, moments."""
    config = run_config(
        method,
        stages,
        embedding=embedding,
        owned=owned,
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
    assert by_hand.steps["shared"] == trained.state.shared.steps == 6
    assert_moved(trained.start.shared.weights, trained.state.shared.weights)
    assert_moved(trained.state.shared.average, trained.state.shared.weights)


def test_one_balanced_step_of_gradient_descent_is_eq_8_on_the_union_batch() -> None:
    trained = central(run_config("balanced", centralised_batch_size=12), 5, 7, 9)
    trained.train(1)
    draws = trained.objective.draws
    assert [set(owners(trained.tasks, draw)) for draw in draws] == [{0}, {1}, {2}]
    shared = leaves(trained.start.shared.weights)
    exclusive = [leaves(trained.start.tasks[task.name].exclusive.weights) for task in trained.tasks]
    losses = [
        ddpm_losses(trained.model, {**shared, **own}, draw)
        for own, draw in zip(exclusive, draws, strict=True)
    ]
    union = torch.cat(losses).mean()
    union.backward()
    assert_close(trained.state.shared.weights, {n: t - RATE * t.grad for n, t in shared.items()})
    for i, own in enumerate(exclusive):
        assert_close(trained.exclusive(i), {n: t - 3 * RATE * t.grad for n, t in own.items()})
        assert_moved(trained.start.tasks[f"task{i}"].exclusive.weights, trained.exclusive(i))
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
    parts = [
        (trained.start.shared.weights, trained.state.shared.weights) for trained in (clipped, free)
    ]
    for i in range(3):
        parts += [
            (t.start.tasks[f"task{i}"].exclusive.weights, t.exclusive(i)) for t in (clipped, free)
        ]
    lengths = [length(before, after) / RATE for before, after in parts]
    for ours, whole in zip(lengths[::2], lengths[1::2], strict=True):
        assert ours == pytest.approx(
            min(norm, whole), rel=2e-2
        )  # a step of 2e-5 over weights of 0.1, in float32


# --- Against the clients' training ---------------------------------------------------------------


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
    assert_close(trained.state.shared.weights, client.shared)
    assert_close(trained.exclusive(0), client.state.exclusive.weights)
    assert_close(trained.state.tasks["task0"].exclusive.average, client.state.exclusive.average)
    assert_close(trained.state.tasks["task0"].exclusive.moments, client.state.exclusive.moments)
    assert_close(trained.state.shared.moments, client.state.shared_moments)
    assert trained.results[-1].loss == pytest.approx(client.loss, rel=1e-5)
    assert_moved(trained.start.shared.weights, client.shared)


@pytest.mark.parametrize(("stages", "owned"), [(2, []), ("none", ["vector", "film"])])
def test_one_balanced_step_a_round_is_the_federated_average_of_the_clients_steps(
    stages: Any, owned: list[str]
) -> None:
    """With all shared but what is owned: the pool with its task as a condition."""
    rates: dict[str, Any] = {"owned_learning_rate": 10 * RATE} if owned else {}
    trained = central(
        run_config("balanced", stages, owned=owned, centralised_batch_size=12, **rates), 5, 7, 9
    )
    trained.train(1)
    clients = locally(run_config("federated", stages, owned=owned, **rates), trained, 1)
    mean = {
        n: sum(client.shared[n].double() for client in clients).float() / 3
        for n in trained.partition.shared
    }
    assert_close(trained.state.shared.weights, mean)
    assert_moved(trained.start.shared.weights, trained.state.shared.weights)
    for i, client in enumerate(clients):
        assert_close(trained.exclusive(i), client.state.exclusive.weights)
        assert_moved(trained.start.tasks[f"task{i}"].exclusive.weights, trained.exclusive(i))


def test_balanced_with_nothing_shared_is_as_many_trainings_apart() -> None:
    settings: dict[str, Any] = {"optimizer": "adam", "local_steps": 2, "ema_warmup": True}
    trained = central(run_config("balanced", "all", **settings, centralised_batch_size=12), 5, 7, 9)
    trained.train(1, 2)
    assert trained.state.shared.weights == {}
    for i, client in enumerate(locally(run_config("federated", "all", **settings), trained, 1, 2)):
        own = trained.state.tasks[f"task{i}"]
        assert_close(own.exclusive.weights, client.state.exclusive.weights)
        assert_close(own.exclusive.average, client.state.exclusive.average)
        assert own.minibatches == client.state.minibatches == 4
        assert_moved(trained.start.tasks[f"task{i}"].exclusive.weights, own.exclusive.weights)


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
        (drawn,) = set(owners(trained.tasks, trained.objective.draws[-1]))
        seen.add(drawn)
        assert_moved(before.shared.weights, trained.state.shared.weights)
        assert list(trained.results[-1].loss_by_task) == [f"task{drawn}"]
        for i in range(3):
            old, new = before.tasks[f"task{i}"], trained.state.tasks[f"task{i}"]
            if i == drawn:
                assert_moved(old.exclusive.weights, new.exclusive.weights)
                assert new.minibatches == new.exclusive.steps == old.minibatches + 1
            else:
                assert same_bits(old.exclusive.weights, new.exclusive.weights)
                assert same_bits(old.exclusive.average, new.exclusive.average)
                assert same_bits(old.exclusive.moments, new.exclusive.moments)
                assert new.minibatches == new.exclusive.steps == old.minibatches
    assert seen == {0, 1, 2}


class NoNetwork(RecordingObjective):
    """Costs nothing, for tests of what is drawn."""

    def loss(self, forward: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        self.draws.append(Draw(images, times, noise))
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
            trained.objective.draws = []
            trained.train(number)
            sequence = [owners(trained.tasks, draw)[0] for draw in trained.objective.draws]
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
    clean, other = (Central(config, each, RecordingObjective) for each in (tasks, poisoned))
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
        run_config("pooled", local_steps=8, batch_size=1), some_tasks(3, 12, 9), RecordingObjective
    )
    pooled.train(1)
    drawn = [i for draw in pooled.objective.draws for i in owners(pooled.tasks, draw)]
    assert Counter(drawn) == {0: 3, 1: 12, 2: 9}
    balanced = Central(
        run_config("balanced", local_steps=8, batch_size=3),
        some_tasks(3, 12, 9),
        RecordingObjective,
    )
    balanced.train(1)
    drawn = [i for draw in balanced.objective.draws for i in owners(balanced.tasks, draw)]
    assert Counter(drawn) == {0: 24, 1: 24, 2: 24}


# --- Budgets and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 3, 6, 12, 24])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_has_as_many_images_as_a_federated_one(method: str, size: int | None) -> None:
    config = run_config(
        method, local_steps=2, batch_size=12, centralised_batch_size=size, minibatches="continued"
    )
    trained = Central(config, some_tasks(5, 7, 30), RecordingObjective)
    trained.train(1)
    assert (
        trained.results[0].images
        == 3 * 2 * 12
        == sum(len(draw.images) for draw in trained.objective.draws)
    )
    assert trained.state.shared.steps == 3 * 2 * 12 // (size or 12)


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
        ({"method": "pooled", "owned": ["film"]}, ["pooled", 'model.owned is ["film"]', "[]"]),
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
        RecordingObjective,
    )
    trained.train(1)
    assert trained.results[0].images == 24


# --- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pooled", "balanced"])
@pytest.mark.parametrize("minibatches", ["ragged", "continued"])
def test_what_a_gpu_captures_is_the_step_itself(
    method: str, minibatches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a CPU goes, where captured work is a call: every shape is prepared, which trains,
    before the round begins from its own weights.
    """
    prepared: set[Any] = set()

    def prepare(work: Captured, *tensors: Tensor) -> None:
        work._function(*tensors)
        prepared.add(tuple(tensor.shape for tensor in tensors))

    def call(work: Captured, *tensors: Tensor) -> Tensor:
        assert tuple(tensor.shape for tensor in tensors) in prepared
        return work._function(*tensors)

    monkeypatch.setattr(Captured, "prepare", prepare)
    monkeypatch.setattr(Captured, "__call__", call)
    config = run_config(
        method,
        "none" if method == "pooled" else 2,
        optimizer="adam",
        local_steps=3,
        batch_size=6,
        minibatches=minibatches,
    )
    plain, captured = central(config, 7, 9, 9), central(config, 7, 9, 9)
    assert not plain.trainer.captures
    captured.trainer.captures = True
    plain.train(1, 2)
    captured.train(1, 2)
    assert len(prepared) > (minibatches == "ragged")
    assert [one.loss for one in captured.results] == [one.loss for one in plain.results]
    for one, other in (
        (captured.state.shared, plain.state.shared),
        *(
            (captured.state.tasks[name].exclusive, plain.state.tasks[name].exclusive)
            for name in plain.state.tasks
        ),
    ):
        assert same_bits(one.weights, other.weights)
        assert same_bits(one.average, other.average)
        assert same_bits(one.moments, other.moments)
        assert one.steps == other.steps
    assert_moved(plain.start.shared.weights, plain.state.shared.weights)

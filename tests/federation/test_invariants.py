"""What federated SR-DDPM must equal: centralised SR-DDPM, plain DDPM, and other people's server
optimizers.

The centralised objective, eq. (8), is the mean over tasks of each task's loss L_i(φ, θ_i). Its
gradient in φ is the mean of the tasks' gradients, so averaging the clients' steps of rate η is one
step of rate η. Its gradient in θ_i is 1/n of that of L_i, because no other term has θ_i; a client
descends L_i itself. So with n tasks the clients' θ_i take the centralised step at rate n η (or, the
same, the step of the sum over tasks).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor
from torch.func import functional_call

from srfed.config import FederationConfig, RunConfig, parse_config
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.federation.aggregation import client_weights
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Partition
from srfed.networks.unet import UNet
from srfed.training.local import Job, LocalResult, LocalTrainer, train_owners
from srfed.training.part import ClientState, Part
from srfed.training.step import LocalStep
from support.aggregation import aggregated
from support.centralised import leaves

torch.set_num_threads(1)

T = 100
RATE = 0.05
Tensors = dict[str, Tensor]
Draws = list[tuple[Tensor, Tensor, Tensor]]


def run_config(stages: Any, owned: Sequence[str] = (), **training: Any) -> RunConfig:
    model = {
        "channels": [8, 8, 8, 8],
        # A group of two values at one pixel is steep where they are near to equal: rounding grows.
        "groups": 1,
        "attention_head_channels": 8,
        "exclusive_stages": stages,
        "owned": list(owned),
    }
    return parse_config(
        {
            "diffusion": {"timesteps": T},
            "model": model,
            "training": {
                "gradient_clip": None,
                "learning_rate": RATE,
                "learning_rate_schedule": "constant",
                **training,
            },
            "federation": {"server_optimizer": "average"},
        }
    )


class RecordingObjective(NoisePrediction):
    """The forward process itself, noting the minibatches, timesteps and noise that it is given."""

    draws: Draws

    def loss(self, forward: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        self.draws.append((images, times, noise))
        return super().loss(forward, images, times, noise)


class Federation:
    """Clients with tasks of their own and θ_i's of their own; the same network trains them in
    turn.
    """

    def __init__(self, config: RunConfig, sizes: Sequence[int]) -> None:
        self.config = config
        self.model: UNet = build_model(config, 1)
        self.partition: Partition = build_partition(config, self.model)
        schedule = build_objective(config, torch.device("cpu")).process.schedule
        names = [f"task{i}" for i in range(len(sizes))]
        self.shared = self.perturbed(0, self.partition.shared)
        self.states: dict[str, ClientState] = {}
        self.recorders: dict[str, RecordingObjective] = {}
        self.trainers: dict[str, LocalTrainer] = {}
        self.results: dict[str, LocalResult] = {}
        for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
            exclusive = self.perturbed(i + 1, self.partition.exclusive)
            self.states[name] = ClientState(Part(exclusive, dict(exclusive)))
            self.recorders[name] = RecordingObjective(schedule)
            self.recorders[name].draws = []
            images = np.random.default_rng(i).integers(0, 256, (size, 8, 8, 1), dtype=np.uint8)
            arguments = (config, self.model, self.partition, self.recorders[name], name, images)
            self.trainers[name] = LocalTrainer(*arguments)
        self.examples = dict(zip(names, sizes, strict=True))

    def perturbed(self, seed: int, names: Sequence[str]) -> Tensors:
        """Initial weights plus noise: zero-initialised layers would leave most gradients at
        zero.
        """
        tensors, generator = self.model.state_dict(), torch.Generator().manual_seed(seed)
        return {
            n: tensors[n] + 0.05 * torch.randn(tensors[n].shape, generator=generator) for n in names
        }

    def round(self, number: int, weights: str = "uniform", *, stacked: bool = False) -> None:
        """One round in process: every client from the same φ, by itself or all as one program;
        then the server.
        """
        train = self._together if stacked else self._one_by_one
        self.results = train(number)
        self.states = {name: result.state for name, result in self.results.items()}
        updates = {name: result.shared for name, result in self.results.items()}
        p = client_weights(weights, self.examples)  # type: ignore[arg-type]
        self.shared = aggregated(self.config.federation, self.shared, updates, p, {}).shared

    def _one_by_one(self, number: int) -> dict[str, LocalResult]:
        return {
            name: trainer.train(number, self.shared, self.states[name])
            for name, trainer in self.trainers.items()
        }

    def _together(self, number: int) -> dict[str, LocalResult]:
        """Of one step, whose draws come to one objective, a client's after the other's."""
        together = next(iter(self.recorders.values()))
        count = len(self.trainers)
        step = LocalStep(self.config, self.model, self.partition, together, count)
        jobs = [
            Job(trainer, number, self.shared, self.states[name])
            for name, trainer in self.trainers.items()
        ]
        results = train_owners(self.config, step, jobs)
        (drawn,) = together.draws
        for place, recorder in enumerate(self.recorders.values()):
            recorder.draws = [tuple(tensor.chunk(count)[place] for tensor in drawn)]  # type: ignore[list-item]
        return dict(zip(self.trainers, results, strict=True))


def ddpm_losses(
    model: UNet, weights: Mapping[str, Tensor], draw: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """‖ε - ε_ψ(sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, t)‖² / d for each image, from the textbook."""
    images, timesteps, noise = draw
    betas = np.linspace(1e-4, 0.02, T) * 1000 / T
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))[timesteps - 1][:, None, None, None]
    x_t = alpha_bar.sqrt().float() * images + (1 - alpha_bar).sqrt().float() * noise
    predicted = functional_call(model, dict(weights), (x_t, timesteps))
    return ((predicted - noise) ** 2).flatten(1).sum(dim=1) / noise[0].numel()


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 2e-7
) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=1e-5,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_moved(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], least: float = 1e-5
) -> None:
    """So that an equality of two things which both stood still does not pass."""
    moves = [float((before[name] - after[name]).abs().max()) for name in before]
    assert max(moves) > 1e-4
    assert (
        np.mean([move > least for move in moves]) > 0.7
    )  # what a norm takes away again has no gradient to speak of


# Federated and centralised SR-DDPM


@pytest.mark.parametrize(
    ("stages", "owned"),
    [(1, []), (2, []), (4, []), ("io", []), (1, ["film"]), ("none", ["vector", "film"])],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_one_local_sgd_step_is_one_centralised_step_on_the_union_batch(
    stages: Any, owned: list[str], stacked: bool
) -> None:
    config = run_config(stages, owned, optimizer="sgd", local_steps=1, batch_size=4)
    federation = Federation(config, [5, 7, 9])
    start_shared, start_states = federation.shared, federation.states
    federation.round(1, stacked=stacked)

    tasks = list(federation.trainers)
    shared = leaves(start_shared)
    exclusive = {task: leaves(start_states[task].exclusive.weights) for task in tasks}
    union = [
        ddpm_losses(
            federation.model, {**shared, **exclusive[task]}, *federation.recorders[task].draws
        )
        for task in tasks
    ]
    objective = torch.cat(union).mean()  # eq. (8): the tasks' batches are of one size
    objective.backward()
    assert_close(
        federation.shared, {name: (t - RATE * t.grad).detach() for name, t in shared.items()}
    )
    assert_moved(start_shared, federation.shared)
    for task in tasks:
        expected = {
            n: (t - len(tasks) * RATE * t.grad).detach() for n, t in exclusive[task].items()
        }
        assert_close(federation.states[task].exclusive.weights, expected)
        # The films of the inner blocks are behind last convolutions that began near zero.
        assert_moved(
            start_states[task].exclusive.weights,
            federation.states[task].exclusive.weights,
            least=1e-6 if owned else 1e-5,
        )


def test_weights_by_examples_make_the_union_batch_a_mean_over_images_not_over_batches() -> None:
    """Each client steps on all its images; weights by images make that the gradient of all images
    alike.
    """
    config = run_config(1, optimizer="sgd", local_steps=1, batch_size=64, minibatches="ragged")
    federation, uniform = (Federation(config, [2, 12, 5]) for _ in range(2))
    start = federation.shared
    federation.round(1, "examples")
    uniform.round(1, "uniform")

    shared = leaves(start)
    losses = [
        ddpm_losses(
            federation.model,
            {**shared, **Federation(config, [2, 12, 5]).states[task].exclusive.weights},
            *r.draws,
        )
        for task, r in federation.recorders.items()
    ]
    assert [len(each) for each in losses] == [2, 12, 5]
    torch.cat(losses).mean().backward()
    assert_close(
        federation.shared, {name: (t - RATE * t.grad).detach() for name, t in shared.items()}
    )
    apart = max(float((federation.shared[n] - uniform.shared[n]).abs().max()) for n in start)
    assert apart > 1e-3, "the two weightings are too close for this test to tell them apart"


def test_everything_shared_with_one_client_is_plain_ddpm_training() -> None:
    config = run_config(
        "none", local_steps=3, batch_size=4, learning_rate=1e-3, shared_moments="keep"
    )
    federation = Federation(config, [10])
    start = federation.shared
    for number in range(1, 5):
        federation.round(number)

    draws = federation.recorders["task0"].draws
    assert len(draws) == 12
    weights = leaves(start)
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3, fused=True)
    for draw in draws:
        optimizer.zero_grad()
        ddpm_losses(federation.model, weights, draw).mean().backward()
        optimizer.step()
    assert_close(federation.shared, {name: tensor.detach() for name, tensor in weights.items()})
    assert_moved(start, federation.shared)


def test_nothing_shared_is_local_training_and_the_server_has_nothing_to_do() -> None:
    config = run_config("all", local_steps=2, batch_size=4)
    together, alone = Federation(config, [6, 8]), Federation(config, [6])
    for number in (1, 2):
        together.round(number)
        alone.round(number)
    assert together.shared == {}
    assert_close(
        together.states["task0"].exclusive.weights, alone.states["task0"].exclusive.weights, atol=0
    )


# Server optimizers

SHAPES = {"bottleneck.weight": (3, 2), "a.bias": (4,), "scalar": ()}


def normal_tensors(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in SHAPES.items()}


def server(**settings: Any) -> FederationConfig:
    return parse_config({"federation": {"server_optimizer": "average", **settings}}).federation


EXAMPLES = {"c": 30, "a": 10, "b": 5}


def rounds_of(
    settings: FederationConfig, count: int, dtype: torch.dtype = torch.float64
) -> list[Tensors]:
    """φ after each of several rounds in which clients move away from φ by seeded amounts."""
    shared, optimizer, seen = normal_tensors(0, dtype), {}, []
    weights = client_weights(settings.weights, EXAMPLES)
    for number in range(count):
        outcome = aggregated(settings, shared, updates_of(shared, number), weights, optimizer)
        shared, optimizer = outcome.shared, outcome.optimizer
        seen.append(shared)
    return seen


def updates_of(shared: Mapping[str, Tensor], number: int) -> dict[str, Tensors]:
    return {
        client: {
            n: shared[n] + 0.1 * t.to(shared[n].dtype)
            for n, t in normal_tensors(100 * number + i).items()
        }
        for i, client in enumerate(EXAMPLES, start=1)
    }


def mean_update(
    shared: Mapping[str, Tensor], number: int, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Σ p_i (φ_i - φ) in numpy."""
    updates = updates_of(shared, number)
    return {
        n: sum(weights[c] * (updates[c][n].numpy() - shared[n].numpy()) for c in updates)
        for n in SHAPES
    }


def flower_rounds(strategy: FedAvg, count: int) -> list[Tensors]:
    """The same rounds through one of Flower's own strategies, which weights by ``num-examples``."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, SUPERLINK_NODE_ID, 0
    shared, seen = normal_tensors(0, torch.float64), []
    strategy.current_arrays = record(shared)  # type: ignore[attr-defined]
    for number in range(count):
        replies = []
        for client, update in updates_of(shared, number).items():
            metrics = MetricRecord({"num-examples": EXAMPLES[client]})
            content = RecordDict({"arrays": record(update), "metrics": metrics})
            request = Message(RecordDict(), dst_node_id=1, message_type="train")
            replies.append(Message(content, reply_to=request))
        arrays, _ = strategy.aggregate_train(number + 1, replies)
        assert arrays is not None
        shared = {name: torch.from_numpy(arrays[name].numpy()) for name in SHAPES}
        seen.append(shared)
    return seen


def record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def test_average_by_examples_is_flowers_fedavg() -> None:
    ours = rounds_of(server(weights="examples"), 3)
    for mine, theirs in zip(ours, flower_rounds(FedAvg(), 3), strict=True):
        assert_close(mine, theirs, atol=1e-12)


def test_momentum_is_flowers_fedavgm() -> None:
    settings = server(
        weights="examples",
        server_optimizer="momentum",
        server_learning_rate=0.7,
        server_momentum=0.8,
    )
    theirs = flower_rounds(FedAvgM(server_learning_rate=0.7, server_momentum=0.8), 5)
    for mine, their in zip(rounds_of(settings, 5), theirs, strict=True):
        assert_close(mine, their, atol=1e-12)


def test_momentum_is_torchs_sgd_on_the_negative_mean_update() -> None:
    settings = server(server_optimizer="momentum", server_learning_rate=0.3, server_momentum=0.6)
    ours = rounds_of(settings, 5)
    parameters = leaves(normal_tensors(0, torch.float64))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, momentum=0.6)
    before = normal_tensors(0, torch.float64)
    for number, mine in enumerate(ours):
        mean = mean_update(before, number, dict.fromkeys(EXAMPLES, 1 / 3))
        for name, parameter in parameters.items():
            parameter.grad = -torch.as_tensor(mean[name])
        optimizer.step()
        assert_close(mine, {name: p.detach() for name, p in parameters.items()}, atol=1e-12)
        before = mine


def test_adam_is_algorithm_2_of_reddi_et_al() -> None:
    """Without bias correction, as printed: m ← β1 m + (1-β1) Δ, v ← β2 v + (1-β2) Δ², φ ← φ + η
    m/(√v + τ).
    """
    settings = server(
        server_optimizer="adam",
        server_learning_rate=0.05,
        server_momentum=0.8,
        server_second_moment=0.95,
        server_epsilon=0.01,
    )
    ours = rounds_of(settings, 6)
    x: dict[str, Any] = {
        name: tensor.numpy() for name, tensor in normal_tensors(0, torch.float64).items()
    }
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for number, mine in enumerate(ours):
        mean = mean_update(
            {n: torch.as_tensor(a) for n, a in x.items()}, number, dict.fromkeys(EXAMPLES, 1 / 3)
        )
        for name in SHAPES:
            m[name] = 0.8 * m[name] + 0.2 * mean[name]
            v[name] = 0.95 * v[name] + 0.05 * mean[name] ** 2
            x[name] = x[name] + 0.05 * m[name] / (np.sqrt(v[name]) + 0.01)
            np.testing.assert_allclose(mine[name].numpy(), x[name], rtol=1e-9, atol=1e-12)


def test_the_server_learning_rate_scales_the_mean_update() -> None:
    shared = normal_tensors(0, torch.float64)
    weights = dict.fromkeys(EXAMPLES, 1 / 3)
    half = aggregated(server(server_learning_rate=0.5), shared, updates_of(shared, 0), weights, {})
    mean = mean_update(shared, 0, weights)
    assert_close(
        half.shared, {n: shared[n] + 0.5 * torch.as_tensor(mean[n]) for n in SHAPES}, atol=1e-12
    )
    norm = math.sqrt(sum(float(np.sum(np.square(0.5 * mean[n]))) for n in SHAPES))
    assert half.update_norm == pytest.approx(norm, rel=1e-9)
    assert half.optimizer == {}


@pytest.mark.parametrize(
    ("moves", "weights", "factor"),
    [
        # r / 2 of FedExP by hand: Σ p_i ‖Δ_i‖² / (2 ‖Σ p_i Δ_i‖²), at least 1, at most 1 / (2 Σ
        # p_i²).
        ([(1, 0), (1, 0)], None, 1.0),
        ([(3, 4)], None, 1.0),
        ([(1, 0), (0, 1)], None, 1.0),
        ([(1, 0), (0, 1), (0, 0), (0, 0)], None, (2 / 4) / (2 * 2 / 16)),
        ([(1, 0), (0, 1), (1, 1), (0, 0), (0, 0)], None, (4 / 5) / (2 * 8 / 25)),
        ([(1, 0), (0, 1), (0, 0), (0, 0)], [0.1, 0.2, 0.3, 0.4], 0.3 / (2 * 0.05)),
        ([(1, 0), (-1, 0), (0.1, 0), (0, 0)], None, 2.0),
        ([(1, 0), (-1, 0), (0, 0), (0, 0)], None, 1.0),
        ([(0, 0), (0, 0)], None, 1.0),
    ],
)
def test_extrapolation_is_fedexps(
    moves: Sequence[tuple[float, float]], weights: Sequence[float] | None, factor: float
) -> None:
    shared = {
        "x": torch.tensor([1.0], dtype=torch.float64),
        "y": torch.tensor([-2.0], dtype=torch.float64),
    }
    named = {f"c{i}": weight for i, weight in enumerate(weights or [1 / len(moves)] * len(moves))}
    factor = (
        min(factor, 1 / (2 * sum(weight**2 for weight in named.values()))) if factor > 1 else factor
    )
    updates = {
        f"c{i}": {"x": shared["x"] + dx, "y": shared["y"] + dy} for i, (dx, dy) in enumerate(moves)
    }
    settings = server(server_optimizer="extrapolate", server_learning_rate=0.5)
    outcome = aggregated(settings, shared, updates, named, {})
    mean = np.average(np.array(moves, dtype=float), axis=0, weights=list(named.values()))
    expected = {
        "x": shared["x"] + 0.5 * factor * mean[0],
        "y": shared["y"] + 0.5 * factor * mean[1],
    }
    assert_close(outcome.shared, expected, atol=1e-12)
    assert outcome.optimizer == {}


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam", "extrapolate"])
def test_aggregation_keeps_the_cores_types_order_and_inputs(optimizer: str) -> None:
    shared = normal_tensors(0)
    shared["half"] = torch.ones(2, dtype=torch.float16)
    updates = {
        c: {**u, "half": torch.zeros(2, dtype=torch.float16)}
        for c, u in updates_of(normal_tensors(0), 1).items()
    }
    before = {n: t.clone() for n, t in {**shared, **updates["a"]}.items()}
    outcome = aggregated(
        server(server_optimizer=optimizer), shared, updates, dict.fromkeys(EXAMPLES, 1 / 3), {}
    )
    assert list(outcome.shared) == list(shared)
    assert {n: t.dtype for n, t in outcome.shared.items()} == {
        n: t.dtype for n, t in shared.items()
    }
    assert all(tensor.dtype == torch.float64 for tensor in outcome.optimizer.values())
    assert {n.split(".")[0] for n in outcome.optimizer} == {
        "average": set(),
        "momentum": {"momentum"},
        "adam": {"momentum", "second_moment"},
        "extrapolate": set(),
    }[optimizer]
    assert all(torch.equal(before[n], t) for n, t in {**shared, **updates["a"]}.items())


# Weights, order and precision of the sum


def test_weights_are_uniform_or_by_number_of_images() -> None:
    assert client_weights("uniform", EXAMPLES) == pytest.approx(
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    )
    assert client_weights("examples", EXAMPLES) == pytest.approx(
        {"a": 10 / 45, "b": 5 / 45, "c": 30 / 45}
    )
    assert list(client_weights("examples", EXAMPLES)) == ["a", "b", "c"]


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam", "extrapolate"])
def test_the_order_of_arrival_changes_no_bit(optimizer: str) -> None:
    """In float64, where nothing rounds a different order of the sum away."""
    settings = server(server_optimizer=optimizer, weights="examples")
    examples = {"a": 7, "b": 11, "c": 13, "d": 29}
    shared = normal_tensors(0, torch.float64)
    updates = {client: normal_tensors(i + 1, torch.float64) for i, client in enumerate(examples)}

    def outcome(order: Sequence[str]) -> list[Any]:
        weights = client_weights(settings.weights, {client: examples[client] for client in order})
        result = aggregated(
            settings, shared, {client: updates[client] for client in order}, weights, {}
        )
        tensors = [*result.shared.values(), *result.optimizer.values()]
        return [*(t.numpy().tobytes() for t in tensors), result.update_norm, result.disagreement]

    orders = [outcome(order) for order in itertools.permutations(examples)]
    assert all(order == orders[0] for order in orders)
    sums = {
        float(sum(updates[c]["scalar"] / 3 for c in order))
        for order in itertools.permutations(examples)
    }
    assert len(sums) > 1, "these numbers would not tell the orders apart"


def test_sums_are_in_float64() -> None:
    """In float32 the large moves would swallow the small one before they cancel."""
    values = {"a": 1e8, "b": 1.0, "c": -1e8}
    updates = {client: {"w": torch.tensor([value])} for client, value in values.items()}
    weights = client_weights("uniform", dict.fromkeys(values, 1))
    moved = aggregated(server(), {"w": torch.zeros(1)}, updates, weights, {}).shared["w"]
    assert moved.dtype == torch.float32
    assert float(moved) == pytest.approx(1 / 3, rel=1e-6)


# Disagreement


def disagreement(moves: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> float:
    shared = {"x": torch.tensor([1.0]), "y": torch.tensor([-2.0])}
    updates = {
        f"c{i}": {"x": shared["x"] + move[0], "y": shared["y"] + move[1]}
        for i, move in enumerate(moves)
    }
    p = weights or [1 / len(moves)] * len(moves)
    named = {f"c{i}": weight for i, weight in enumerate(p)}
    return aggregated(server(), shared, updates, named, {}).disagreement


def test_disagreement_runs_from_equal_to_opposite_moves() -> None:
    assert disagreement([(0.5, 0.25)] * 3) == pytest.approx(0, abs=1e-7)
    assert disagreement([(0.5, 0.25), (-0.5, -0.25)]) == pytest.approx(1)
    assert disagreement([(0.5, 0), (0, 0.5)]) == pytest.approx(math.sqrt(1 / 2))
    assert disagreement([(0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5)]) == pytest.approx(1)
    assert disagreement([(0.5, 0.5)]) == 0
    assert disagreement([(0, 0), (0, 0)]) == 0


def test_disagreement_counts_clients_by_their_weights() -> None:
    """Moves 1 and 0 with weights p and 1 - p: Δ̄ = p, spread p (1 - p), total p."""
    assert disagreement([(1, 0), (0, 0)], [0.9, 0.1]) == pytest.approx(math.sqrt(0.1))
    assert disagreement([(1, 0), (0, 0)], [0.25, 0.75]) == pytest.approx(math.sqrt(0.75))

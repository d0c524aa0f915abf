"""A centralised run with a record of its draws, the same by hand, and the same by clients."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from srfed.config import RunConfig, parse_config
from srfed.data import Task
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.unet import UNet
from srfed.training.centralised import CentralisedResult, CentralisedState, CentralisedTrainer
from srfed.training.local import LocalResult, LocalTrainer
from srfed.training.part import ClientState, Part

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
    owned: Sequence[str] = (),
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
        # A group of two values at one pixel is steep where they are near to equal: rounding grows.
        "groups": 1,
        "attention_head_channels": 8,
        "attention_stages": [],
        "exclusive_stages": "none" if method == "pooled" else stages,
        "task_embedding": embedding,
        "owned": list(owned),
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


class RecordingObjective(NoisePrediction):
    """The forward process itself, noting what it is asked."""

    draws: list[Draw]

    def loss(self, forward: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        self.draws.append(Draw(images, times, noise))
        return super().loss(forward, images, times, noise)


class Central:
    """A trainer with its place in the run, and a record of its draws; every θ_i starts somewhere
    else.
    """

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], objective: type[RecordingObjective]
    ) -> None:
        self.config, self.tasks = config, tasks
        self.model = build_model(config, 1)
        self.partition = build_partition(config, self.model)
        self.objective = objective(build_objective(config, torch.device("cpu")).process.schedule)
        self.objective.draws = []
        self.trainer = CentralisedTrainer(config, self.model, self.partition, self.objective, tasks)
        shared = perturbed(self.model, 0, self.partition.shared)
        states = {}
        for i, task in enumerate(tasks):
            exclusive = perturbed(self.model, i + 1, self.partition.exclusive)
            states[task.name] = ClientState(
                Part(exclusive, {name: t.clone() for name, t in exclusive.items()})
            )
        self.start = self.state = CentralisedState(
            Part(shared, {name: t.clone() for name, t in shared.items()}), states
        )
        self.results: list[CentralisedResult] = []

    def train(self, *rounds: int) -> CentralisedState:
        for number in rounds:
            self.results.append(self.trainer.train(number, self.state))
            self.state = self.results[-1].state
        return self.state

    def exclusive(self, task: int) -> Tensors:
        return self.state.tasks[f"task{task}"].exclusive.weights


def central(config: RunConfig, *sizes: int) -> Central:
    return Central(config, some_tasks(*sizes), RecordingObjective)


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
        self.shared = leaves(of.start.shared.weights)
        self.exclusive = {
            name: leaves(state.exclusive.weights) for name, state in of.start.tasks.items()
        }
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
        draws = self.of.objective.draws
        assert draws
        assert len(draws) % draws_per_step == 0
        for first in range(0, len(draws), draws_per_step):
            self.step(draws[first : first + draws_per_step])

    def check(self, tolerance: float) -> None:
        """Each part is where the loop is, but for this share of the way it came."""
        start, state = self.of.start, self.of.state
        pairs = [
            (start.shared.weights, state.shared.weights, self.shared),
            (start.shared.weights, state.shared.average, self.averages["shared"]),
        ]
        for name, own in state.tasks.items():
            first = start.tasks[name].exclusive.weights
            pairs += [
                (first, own.exclusive.weights, self.exclusive[name]),
                (first, own.exclusive.average, self.averages[name]),
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
    assert (
        np.mean([move > 1e-6 for move in moves]) > 0.7
    )  # what a norm takes away again has no gradient to speak of


def locally(config: RunConfig, of: Central, *rounds: int) -> list[LocalResult]:
    """Each task's last round by a client of its own, which starts where the centralised run did."""
    results = []
    for i, task in enumerate(of.tasks):
        trainer = LocalTrainer(
            config, build_model(config, 1), of.partition, of.objective, task.name, task.train, i
        )
        shared, state = of.start.shared.weights, of.start.tasks[task.name]
        for number in rounds:
            result = trainer.train(number, shared, state)
            shared, state = result.shared, result.state
        results.append(result)
    return results

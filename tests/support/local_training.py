"""A client's training with a record of its draws, and a plain loop over the same draws."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srfed.config import RunConfig, parse_config
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.model import build_model, build_objective, build_partition
from srfed.training.local import LocalResult, LocalTrainer
from srfed.training.part import initial_state, load_tensors

T = 100
Tensors = dict[str, Tensor]


def run_config(
    *,
    stages: Any = 1,
    owned: Sequence[str] = (),
    seed: int = 0,
    dropout: float = 0.0,
    data: Any = None,
    resources: Any = None,
    federation: Any = None,
    diffusion: Any = None,
    **training: Any,
) -> RunConfig:
    """A tiny run; constant rates, no clipping, no warm-up, so that each test adds only what it is
    about.
    """
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "local_steps": 3,
        "learning_rate": 1e-3,
        "learning_rate_schedule": "constant",
        "gradient_clip": None,
        "ema_warmup": False,
    }
    if "local_epochs" in training:
        defaults["local_steps"] = None
    model = {
        "channels": [8, 8, 8, 8],
        # A group of two values at one pixel is steep where they are near to equal: rounding grows.
        "groups": 1,
        "attention_head_channels": 8,
        "attention_stages": [],
        "exclusive_stages": stages,
        "owned": list(owned),
        "dropout": dropout,
    }
    return parse_config(
        {
            "seed": seed,
            "data": data or {},
            "diffusion": diffusion or {"timesteps": T},
            "model": model,
            "training": {**defaults, **training},
            "sampling": {"steps": 1},
            "evaluation": {"ssim_timestep": 1, "ssim_curve": []},
            "federation": federation or {},
            "resources": resources or {},
        }
    )


def some_images(count: int = 10, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


@dataclass(frozen=True)
class Draw:
    """One local step as it was made: its minibatch, and the weights before it."""

    images: Tensor
    timesteps: Tensor
    noise: Tensor
    weights: Tensors


class RecordingObjective(NoisePrediction):
    """The forward process itself, noting what it is asked: so no test depends on how draws are
    seeded.
    """

    draws: list[Draw]

    def loss(self, forward: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        weights = {name: tensor.clone() for name, tensor in forward.state_dict().items()}
        self.draws.append(Draw(images, times, noise, weights))
        return super().loss(forward, images, times, noise)


class Client:
    """A client with its trainer, its place in the run, and a record of its steps."""

    def __init__(
        self, config: RunConfig, task: str = "a", images: np.ndarray | None = None
    ) -> None:
        images = some_images() if images is None else images
        self.model = build_model(config, images.shape[-1])
        with (
            torch.no_grad()
        ):  # zero-initialised layers would keep others from moving in the first step
            generator = torch.Generator().manual_seed(1)
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.partition = build_partition(config, self.model)
        process = build_objective(config, torch.device("cpu")).process
        self.objective = RecordingObjective(process.schedule)
        self.objective.draws = []
        self.trainer = LocalTrainer(
            config, self.model, self.partition, self.objective, task, images
        )
        self.shared = self.partition.take_shared(self.start)
        self.state = initial_state(self.model, self.partition)
        self.results: list[LocalResult] = []

    def train(self, *rounds: int) -> LocalResult:
        """Train for rounds in turn, as the only client of its federation."""
        for number in rounds:
            result = self.trainer.train(number, self.shared, self.state)
            self.shared, self.state = result.shared, result.state
            self.results.append(result)
        return self.results[-1]

    @property
    def weights(self) -> Tensors:
        return {**self.shared, **self.state.exclusive.weights}

    @property
    def draws(self) -> list[Draw]:
        return self.objective.draws


class Reference:
    """A plain model that is trained on recorded draws by loops of the tests' own."""

    def __init__(self, config: RunConfig, client: Client) -> None:
        self.model = build_model(config, client.model.image_channels)
        load_tensors(self.model, client.start)
        parameters = dict(self.model.named_parameters())
        self.shared = [parameters[name] for name in client.partition.shared]
        self.exclusive = [parameters[name] for name in client.partition.exclusive]

    @property
    def weights(self) -> Tensors:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def fit(
        self, draws: Sequence[Draw], *optimizers: torch.optim.Optimizer, clip: float | None = None
    ) -> None:
        for draw in draws:
            self.model.zero_grad()
            losses(self.model, draw).mean().backward()
            if clip is not None:
                active = [
                    p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]
                ]
                norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in active))
                for parameter in active:
                    parameter.grad *= min(1.0, clip / norm)
            for optimizer in optimizers:
                optimizer.step()


def losses(model: nn.Module, draw: Draw) -> Tensor:
    """Eq. (3) and (7) for each image, from the linear schedule scaled to T."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    alpha_bars = torch.tensor(np.cumprod(1 - betas.numpy()))[draw.timesteps - 1].view(-1, 1, 1, 1)
    x_t = alpha_bars.sqrt().float() * draw.images + (1 - alpha_bars).sqrt().float() * draw.noise
    return (model(x_t, draw.timesteps) - draw.noise).pow(2).flatten(1).mean(dim=1)


def adam(parameters: Iterable[nn.Parameter], rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float = 1e-6
) -> None:
    assert set(actual) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=1e-5,
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)

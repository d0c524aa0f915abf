"""Local training against loops written here with torch's own optimizers on the draws that it
made.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from srfed.config import RunConfig, parse_config
from srfed.device import resolve_device
from srfed.diffusion.process import Diffusion
from srfed.errors import UserError
from srfed.federation.aggregation import aggregate
from srfed.model import build_diffusion, build_model, build_partition
from srfed.training.ema import round_decay, step_decay, update_average
from srfed.training.local import LocalResult, LocalTrainer, initial_state, load_tensors
from srfed.training.minibatches import MinibatchOrder
from srfed.training.optimizer import MOMENTS, PartOptimizer, learning_rate_factor

torch.set_num_threads(1)

T = 100
Tensors = dict[str, Tensor]
NamedParameters = dict[str, nn.Parameter]


def run_config(
    *,
    stages: Any = 1,
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
        "groups": 4,
        "attention_head_channels": 8,
        "attention_stages": [],
        "exclusive_stages": stages,
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


class RecordingDiffusion(Diffusion):
    """The forward process itself, noting what it is asked: so no test depends on how draws are
    seeded.
    """

    draws: list[Draw]

    def loss_per_image(
        self, predict_noise: Any, images: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        weights = {name: tensor.clone() for name, tensor in predict_noise.state_dict().items()}
        self.draws.append(Draw(images, timesteps, noise, weights))
        return super().loss_per_image(predict_noise, images, timesteps, noise)


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
        self.diffusion = RecordingDiffusion(build_diffusion(config, torch.device("cpu")).schedule)
        self.diffusion.draws = []
        self.trainer = LocalTrainer(
            config, self.model, self.partition, self.diffusion, task, images
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
        return {**self.shared, **self.state.exclusive}

    @property
    def draws(self) -> list[Draw]:
        return self.diffusion.draws


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


# Minibatches


@given(
    images=st.integers(1, 20),
    batch_size=st.integers(1, 20),
    minibatches=st.sampled_from(["whole", "ragged"]),
)
@settings(max_examples=60, deadline=None)
def test_each_pass_is_a_permutation_cut_into_batches(
    images: int, batch_size: int, minibatches: Any
) -> None:
    if minibatches == "whole" and batch_size > images:
        return
    order = MinibatchOrder(images, batch_size, minibatches, 0, "a")
    rest = images % batch_size
    sizes = [batch_size] * (images // batch_size) + (
        [rest] if rest and minibatches == "ragged" else []
    )
    for number in range(2):
        batches = [
            order.indices(number * len(sizes) + step).tolist()
            for step in range(order.steps_per_pass)
        ]
        assert [len(batch) for batch in batches] == sizes
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(images))


def test_minibatches_can_start_anywhere() -> None:
    order = MinibatchOrder(10, 4, "ragged", 0, "a")
    sequence = [order.indices(step).tolist() for step in range(12)]
    for step in (11, 3, 0, 7, 6):
        assert order.indices(step).tolist() == sequence[step]
        assert MinibatchOrder(10, 4, "ragged", 0, "a").indices(step).tolist() == sequence[step]


def test_each_pass_task_and_seed_has_its_own_order() -> None:
    def whole(seed: int, task: str, number: int) -> tuple[int, ...]:
        return tuple(MinibatchOrder(30, 30, "whole", seed, task).indices(number).tolist())

    names = [(seed, task, number) for seed in (0, 1) for task in ("a", "b") for number in (0, 1, 2)]
    assert len({whole(*name) for name in names}) == len(names)


def test_a_batch_above_the_task_is_refused_or_cut() -> None:
    words = (
        r"training.batch_size = 5 is above the 4 training images of task 'b'; allowed: up to "
        r"4, or .*minibatches = ragged"
    )
    with pytest.raises(UserError, match=words):
        MinibatchOrder(4, 5, "whole", 0, "b")
    cut = MinibatchOrder(4, 5, "ragged", 0, "b")
    assert sorted(cut.indices(3).tolist()) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="task 'b'"):
        Client(run_config(batch_size=5), "b", some_images(4))


# Moving averages


def closed_form_average(trajectory: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
    """Π d · w_0 + Σ_j (1 - d_j) Π_{k>j} d_k · w_j, in float64."""
    total = math.prod(decays) * trajectory[0].double()
    for j, decay in enumerate(decays):
        total += (1 - decay) * math.prod(decays[j + 1 :]) * trajectory[j + 1].double()
    return total


def test_update_average_is_the_closed_form_in_place() -> None:
    trajectory = [
        torch.randn(3, generator=torch.Generator().manual_seed(step)) for step in range(6)
    ]
    average = {"w": trajectory[0].clone()}
    kept = average["w"]
    decays = [0.9, 0.5, 0.0, 0.99, 0.7]
    for weights, decay in zip(trajectory[1:], decays, strict=True):
        update_average(average, {"other": torch.zeros(1), "w": weights}, decay)
    assert average["w"] is kept
    torch.testing.assert_close(
        average["w"].double(), closed_form_average(trajectory, decays), rtol=1e-5, atol=1e-6
    )
    update_average({}, {}, 0.5)


def test_warm_up_caps_the_decay_of_early_steps() -> None:
    assert [step_decay(0.995, True, step) for step in (0, 1, 8)] == [1 / 10, 2 / 11, 9 / 18]
    assert step_decay(0.995, True, 10_000) == 0.995
    assert step_decay(0.995, False, 0) == 0.995
    assert step_decay(0.05, True, 0) == 0.05


@given(
    decay=st.floats(0, 0.9999),
    warmup=st.booleans(),
    first=st.integers(0, 3000),
    steps=st.integers(0, 40),
    more=st.integers(0, 40),
)
def test_a_rounds_decay_is_the_product_of_its_steps(
    decay: float, warmup: bool, first: int, steps: int, more: int
) -> None:
    whole = round_decay(decay, warmup, first, steps + more)
    parts = round_decay(decay, warmup, first, steps) * round_decay(
        decay, warmup, first + steps, more
    )
    assert whole == pytest.approx(parts, rel=1e-9)
    assert whole == pytest.approx(
        math.prod(step_decay(decay, warmup, first + i) for i in range(steps + more))
    )
    if not warmup:
        assert whole == pytest.approx(decay ** (steps + more), rel=1e-9, abs=1e-300)


def test_an_average_once_a_round_forgets_as_fast_as_one_of_every_step() -> None:
    """With a per-step decay once a round it would lag behind by the number of local steps."""
    by_step, by_round, target = ({"w": torch.full((1,), value)} for value in (1.0, 1.0, 0.0))
    for number in range(10):
        for _ in range(20):
            update_average(by_step, target, step_decay(0.995, False, 0))
        update_average(by_round, target, round_decay(0.995, False, 20 * number, 20))
    assert float(by_round["w"]) == pytest.approx(float(by_step["w"]), rel=1e-4)
    assert float(by_round["w"]) == pytest.approx(0.995**200, rel=1e-4)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_clients_average_is_the_closed_form_over_all_its_steps(warmup: bool) -> None:
    client = Client(run_config(stages=1, ema_decay=0.6, ema_warmup=warmup))
    client.train(1, 2)
    assert client.state.exclusive_steps == 6
    decays = [min(0.6, (1 + step) / (10 + step)) if warmup else 0.6 for step in range(6)]
    for name in client.partition.exclusive:
        trajectory = [*(draw.weights[name] for draw in client.draws), client.state.exclusive[name]]
        expected = closed_form_average(trajectory, decays)
        torch.testing.assert_close(
            client.state.exclusive_average[name].double(), expected, rtol=1e-5, atol=1e-6
        )
        assert not torch.equal(client.state.exclusive_average[name], client.start[name]), (
            "it never moved"
        )
        assert not torch.equal(client.state.exclusive_average[name], client.state.exclusive[name])


@pytest.mark.parametrize("warmup", [False, True])
def test_the_servers_average_with_one_local_step_is_the_clients(warmup: bool) -> None:
    """The same steps taken once as φ (averaged by rounds) and once as θ_i (averaged by steps)."""
    settings = {"local_steps": 1, "ema_decay": 0.8, "ema_warmup": warmup, "shared_moments": "keep"}
    as_shared, as_exclusive = (
        Client(run_config(stages="none", **settings)),
        Client(run_config(stages="all", **settings)),
    )
    average = {name: tensor.clone() for name, tensor in as_shared.shared.items()}
    steps = 0
    for number in range(1, 6):
        before = as_shared.shared
        result = as_shared.train(number)
        config = run_config(stages="none", **settings).federation
        moved = aggregate(config, before, {"a": result.shared}, {"a": 1.0}, {}).shared
        update_average(average, moved, round_decay(0.8, warmup, steps, result.shared_steps))
        steps += result.shared_steps
        as_exclusive.train(number)
    assert_close(as_exclusive.weights, as_shared.weights)
    assert_close(average, as_exclusive.state.exclusive_average)
    assert largest_difference(average, as_shared.start) > 1e-4


# Optimizers


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")),
]
SHAPES = {"up.0.weight": (16, 5, 3, 3), "up.0.bias": (16,), "stem.weight": (7, 33), "stem.bias": ()}


def named_parameters(
    device: str = "cpu", layout: torch.memory_format = torch.contiguous_format
) -> NamedParameters:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    for parameter in parameters.values():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
        parameter.data = parameter.data.to(device)
    return parameters


def give_gradients(parameters: NamedParameters, step: int, without: str | None = None) -> None:
    """The gradients of one step, from noise and the weights; None for the names that begin with
    ``without``.

    Each parameter's are 100 times smaller than those of the one before, so that Adam's ε shows in
    some.
    """
    generator = torch.Generator().manual_seed(100 + step)
    for place, (name, parameter) in enumerate(parameters.items()):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        gradient = torch.empty_like(parameter).copy_((noise + parameter.detach()) / 100**place)
        parameter.grad = None if without is not None and name.startswith(without) else gradient


def torchs_optimizer(kind: str, parameters: NamedParameters) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters.values(), lr=3e-2)
    return torch.optim.Adam(parameters.values(), lr=3e-2, fused=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_torchs_own_to_the_bit(
    device: str, kind: str, layout: torch.memory_format
) -> None:
    """Parts without gradients for a while, at first too; moments that go through a file on the
    way.
    """
    ours, theirs = named_parameters(device, layout), named_parameters(device, layout)
    training = run_config(optimizer=kind).training
    optimizer, reference = PartOptimizer(training, ours, 3e-2), torchs_optimizer(kind, theirs)
    without = ["up.0.bias", "stem", "stem", None, "up", "", None, None, None]
    for step, part in enumerate(without):
        give_gradients(ours, step, part)
        give_gradients(theirs, step, part)
        optimizer.step()
        reference.step()
        assert same_bits(ours, theirs), step
        moments = optimizer.export_moments()
        expected = {
            f"{key}.{name}": reference.state[parameter][key].cpu()
            for key in MOMENTS
            for name, parameter in theirs.items()
            if key in reference.state[parameter]
        }
        assert same_bits(moments, expected), step
        assert all(
            tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in moments.values()
        )
        if step in (1, 4, 7):
            optimizer = PartOptimizer(training, ours, 3e-2, load(save(moments)))
    assert bool(moments) == (kind == "adam")
    if kind == "adam":
        assert [float(moments[f"step.{name}"]) for name in SHAPES] == [7, 6, 6, 6]


def test_moments_are_named_and_shaped_after_the_parameters() -> None:
    parameters = named_parameters()
    optimizer = PartOptimizer(run_config().training, parameters, 1e-2)
    assert optimizer.export_moments() == {}
    give_gradients(parameters, 0)
    optimizer.step()
    shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.export_moments().items()}
    assert shapes == {
        **{f"exp_avg.{name}": shape for name, shape in SHAPES.items()},
        **{f"exp_avg_sq.{name}": shape for name, shape in SHAPES.items()},
        **{f"step.{name}": () for name in SHAPES},
    }


def test_the_optimizer_writes_into_no_moments_that_were_handed_out_or_in() -> None:
    training, parameters = run_config().training, named_parameters()
    first = PartOptimizer(training, parameters, 1e-2)
    give_gradients(parameters, 0)
    first.step()
    moments = first.export_moments()
    kept = {name: tensor.clone() for name, tensor in moments.items()}
    second = PartOptimizer(training, parameters, 1e-2, moments)
    assert same_bits(second.export_moments(), kept)
    first.step()
    second.step()
    assert same_bits(moments, kept)


def test_parameters_without_moments_start_afresh() -> None:
    training, parameters = run_config().training, named_parameters()
    first = PartOptimizer(training, parameters, 1e-2)
    for step in range(2):
        give_gradients(parameters, step)
        first.step()
    partial = {name: tensor for name, tensor in first.export_moments().items() if "stem" in name}
    second = PartOptimizer(training, parameters, 1e-2, partial)
    assert same_bits(second.export_moments(), partial)
    second.step()
    steps = {
        name: float(tensor)
        for name, tensor in second.export_moments().items()
        if name.startswith("step.")
    }
    assert steps == {
        "step.up.0.weight": 1,
        "step.up.0.bias": 1,
        "step.stem.weight": 3,
        "step.stem.bias": 3,
    }


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_part_may_be_empty_and_gradients_can_be_cleared(kind: str) -> None:
    training, parameters = run_config(optimizer=kind).training, named_parameters()
    give_gradients(parameters, 0)
    optimizer = PartOptimizer(training, parameters, 1e-2)
    optimizer.clear_gradients()
    assert all(parameter.grad is None for parameter in parameters.values())
    optimizer.step()
    empty = PartOptimizer(training, {}, 1e-2)
    empty.step()
    assert same_bits(parameters, named_parameters())
    assert optimizer.export_moments() == empty.export_moments() == {}


def test_cosine_rates_are_torchs_annealing_over_the_rounds() -> None:
    config = run_config(learning_rate_schedule="cosine", federation={"rounds": 7})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for number in range(1, 8):
        assert learning_rate_factor(config, number) == pytest.approx(schedule.get_last_lr()[0])
        assert learning_rate_factor(run_config(federation={"rounds": 7}), number) == 1
        optimizer.step()
        schedule.step()


# What a fresh process imports


TRAIN_IN_MANY_WAYS = """
from training.test_training import Client, run_config, some_images
for optimizer in ("adam", "sgd"):
    for update in ("joint", "alternating"):
        config = run_config(optimizer=optimizer, update=update, gradient_clip=1.0, dropout=0.1)
        Client(config).train(1, 2)
every_option = {"channels_last": True, "precision": "bfloat16"}
Client(run_config(resources=every_option, data={"horizontal_flip": True})).train(1, 2)
"""

SAMPLE_IN_MANY_WAYS = """
import torch
from srfed.config import SamplingConfig
from srfed.evaluation.generation import generate
from srfed.model import build_diffusion, build_model
from training.test_training import run_config
config = run_config()
model = build_model(config, 1).eval()
diffusion = build_diffusion(config, torch.device("cpu"))
for sampler in ("ancestral", "ddim"):
    sampling = SamplingConfig(sampler=sampler, steps=2, batch_size=2)
    generate(model, diffusion, sampling, count=3, shape=(8, 8, 1), seed=0, task="a", strip_steps=2)
"""


@pytest.mark.parametrize(
    "program", [TRAIN_IN_MANY_WAYS, SAMPLE_IN_MANY_WAYS], ids=["training", "sampling"]
)
def test_a_fresh_process_never_imports_torchs_compiler(program: str) -> None:
    """A deployed client is one for every message, and the import takes over a second."""
    program += "import sys; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


# Setup


def test_build_diffusion_applies_every_setting() -> None:
    settings = {"timesteps": 40, "beta_start": 2e-4, "beta_end": 0.01, "beta_scale": "none"}
    betas = build_diffusion(run_config(diffusion=settings), torch.device("cpu")).schedule.betas
    torch.testing.assert_close(betas, torch.linspace(2e-4, 0.01, 40, dtype=torch.float64))
    cosine = build_diffusion(
        run_config(diffusion={**settings, "schedule": "cosine"}), torch.device("cpu")
    )
    assert cosine.schedule.betas[-1] == 0.999


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(run_config().resources) == torch.device("cpu")
    with pytest.raises(UserError, match=r"device = cuda, but .* allowed: auto, cpu"):
        resolve_device(run_config(resources={"device": "cuda"}).resources)
    with pytest.raises(UserError, match=r"precision = bfloat16 needs CUDA"):
        resolve_device(run_config(resources={"precision": "bfloat16"}).resources)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(run_config(resources={"device": "cpu"}).resources) == torch.device("cpu")


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


# What a round gives, and on what it depends


def result_tensors(result: LocalResult) -> Tensors:
    state = result.state
    return {
        f"{part}/{name}": tensor
        for part, tensors in (
            ("shared", result.shared),
            ("exclusive", state.exclusive),
            ("average", state.exclusive_average),
            ("own", state.exclusive_moments),
            ("kept", state.shared_moments),
        )
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_a_round_is_a_function_of_seed_task_round_and_what_it_starts_from(
    update: str, dropout: float
) -> None:
    """Whatever the process did before: other rounds, another client on the same network, other
    draws.
    """
    config = run_config(update=update, dropout=dropout, shared_moments="keep")
    fresh, used = Client(config), Client(config)
    shared, state = fresh.shared, fresh.state
    torch.manual_seed(1)
    expected = fresh.trainer.train(5, shared, state)
    other = LocalTrainer(
        config, used.model, used.partition, used.diffusion, "b", some_images(6, seed=3)
    )
    torch.manual_seed(2)
    used.train(1, 2)
    other.train(5, shared, state)
    again = used.trainer.train(5, shared, state)
    assert same_bits(result_tensors(again), result_tensors(expected))
    assert again.loss == expected.loss
    assert again.loss_by_quarter == pytest.approx(
        expected.loss_by_quarter, rel=0, abs=0, nan_ok=True
    )
    changed = used.trainer.train(6, shared, state)
    assert not same_bits(changed.shared, expected.shared)


def test_dropout_differs_from_step_to_step_and_leaves_the_processs_generator_alone() -> None:
    config = run_config(dropout=0.5, learning_rate=1e-9, local_steps=2, batch_size=10)
    client = Client(config)
    masks: list[Tensor] = []
    block: Any = client.model.get_submodule("down.0.blocks.0")
    block.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    before = torch.get_rng_state()
    client.train(1, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert len(masks) == 4
    assert all(0.4 < float(mask.float().mean()) < 0.6 for mask in masks)
    assert not any(torch.equal(one, another) for one, another in pairwise(masks))


def test_a_round_leaves_its_inputs_alone_and_later_rounds_leave_its_result_alone() -> None:
    client = Client(run_config(shared_moments="keep"))
    first = client.train(1)
    inputs = {**first.shared, **result_tensors(first)}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    client.train(2, 3)
    assert same_bits(inputs, before)


def test_the_first_state_is_the_models_own_weights_without_moments() -> None:
    client = Client(run_config(stages=2))
    state = initial_state(client.model, client.partition)
    assert same_bits(state.exclusive, client.partition.take_exclusive(client.start))
    assert same_bits(state.exclusive_average, state.exclusive)
    assert (state.exclusive_moments, state.shared_moments) == ({}, {})
    assert (state.steps, state.exclusive_steps) == (0, 0)
    with torch.no_grad():
        client.model.stem.weight.zero_()
    assert same_bits(state.exclusive, client.partition.take_exclusive(client.start)), (
        "it must be a copy"
    )
    assert state.exclusive["stem.weight"] is not state.exclusive_average["stem.weight"]


def test_training_starts_from_the_weights_it_is_given_in_training_mode() -> None:
    client = Client(run_config(learning_rate=1e-9))
    client.model.eval()
    with torch.no_grad():
        for parameter in client.model.parameters():
            parameter.zero_()
    client.train(1)
    assert same_bits(client.draws[0].weights, client.start)
    assert client.model.training


# Joint training


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_joint_training_is_adam_on_both_parts_over_two_rounds(policy: str) -> None:
    """θ_i's moments survive the rounds under every policy; φ's only under `keep`."""
    config = run_config(shared_moments=policy, exclusive_learning_rate=4e-3)
    client = Client(config)
    client.train(1, 2)
    reference = Reference(config, client)
    on_exclusive, on_shared = adam(reference.exclusive, 4e-3), adam(reference.shared)
    reference.fit(client.draws[:3], on_exclusive, on_shared)
    if policy == "reset":
        on_shared = adam(reference.shared)
    reference.fit(client.draws[3:], on_exclusive, on_shared)
    assert_close(client.weights, reference.weights)
    moved = {
        name: float((client.weights[name] - client.start[name]).abs().max())
        for name in client.start
    }
    assert min(moved.values()) > 1e-5, "both parts move, every tensor of them"
    assert {
        float(t) for n, t in client.state.exclusive_moments.items() if n.startswith("step.")
    } == {6}


def test_reset_and_keep_differ_from_the_second_round_on() -> None:
    reset, keep = (Client(run_config(shared_moments=policy)) for policy in ("reset", "keep"))
    assert same_bits(reset.train(1).shared, keep.train(1).shared)
    assert largest_difference(reset.train(2).shared, keep.train(2).shared) > 1e-4


def test_the_cores_moments_stay_at_the_client_or_are_forgotten() -> None:
    names = {
        f"{key}.{name}"
        for key in ("exp_avg", "exp_avg_sq", "step")
        for name in Client(run_config()).shared
    }
    for policy, kept in (("reset", set()), ("keep", names)):
        client = Client(run_config(shared_moments=policy))
        result = client.train(1)
        assert set(result.state.shared_moments) == kept
        assert {n.split(".", 1)[1] for n in result.state.exclusive_moments} == set(
            client.partition.exclusive
        )


@pytest.mark.parametrize("update", ["joint", "alternating"])
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_gradients_are_clipped_to_a_norm_over_all_that_the_step_trains(
    clip: float, update: str
) -> None:
    config = run_config(optimizer="sgd", learning_rate=0.1, gradient_clip=clip, update=update)
    client = Client(config)
    client.train(1)
    clipped, free = Reference(config, client), Reference(config, client)
    for reference, norm in ((clipped, clip), (free, None)):
        exclusive, shared = reference.exclusive, reference.shared
        phases = [[*exclusive, *shared]] if update == "joint" else [exclusive, shared]
        for phase, parameters in enumerate(phases):
            draws = client.draws[3 * phase : 3 * phase + 3]
            reference.fit(draws, torch.optim.SGD(parameters, lr=0.1), clip=norm)
    assert_close(client.weights, clipped.weights)
    assert (largest_difference(client.weights, free.weights) > 1e-3) == (clip < 1)
    assert client.state.exclusive_moments == client.state.shared_moments == {}


@pytest.mark.parametrize(("exclusive_rate", "expected"), [(None, 0.05), (0.2, 0.2)])
def test_rates_of_the_two_parts_fall_together_with_the_cosine(
    exclusive_rate: float | None, expected: float
) -> None:
    config = run_config(
        optimizer="sgd",
        learning_rate=0.05,
        exclusive_learning_rate=exclusive_rate,
        learning_rate_schedule="cosine",
        federation={"rounds": 3},
    )
    client = Client(config)
    client.train(1, 2)
    reference = Reference(config, client)
    for draws, factor in ((client.draws[:3], 1.0), (client.draws[3:], 0.75)):  # cos² 0 and cos² 30°
        on_exclusive = torch.optim.SGD(reference.exclusive, lr=factor * expected)
        reference.fit(draws, on_exclusive, torch.optim.SGD(reference.shared, lr=factor * 0.05))
    assert_close(client.weights, reference.weights)


def test_all_exclusive_is_one_uninterrupted_training_of_a_whole_network() -> None:
    """Two rounds of n steps are 2n steps: nothing of θ_i's optimizer is lost between rounds."""
    config = run_config(stages="all")
    client = Client(config)
    result = client.train(1, 2)
    assert (result.shared, result.state.shared_moments, result.shared_steps) == ({}, {}, 0)
    reference = Reference(config, client)
    reference.fit(client.draws, adam(reference.model.parameters()))
    assert_close(client.state.exclusive, reference.weights)


# Alternating training


@pytest.mark.parametrize(("exclusive_steps", "taken"), [(None, 2), (3, 3), (1, 1)])
def test_alternating_trains_the_exclusive_part_first_and_each_part_alone(
    exclusive_steps: int | None, taken: int
) -> None:
    config = run_config(
        update="alternating",
        local_steps=2,
        exclusive_steps=exclusive_steps,
        exclusive_learning_rate=4e-3,
        shared_moments="keep",
    )
    client = Client(config)
    first = client.train(1)
    at = [draw.weights for draw in client.draws] + [client.weights]
    assert len(at) == taken + 3
    exclusive, shared = client.partition.take_exclusive, client.partition.take_shared
    for step, (before, after) in enumerate(pairwise(at)):
        assert same_bits(exclusive(before), exclusive(after)) == (step >= taken)
        assert same_bits(shared(before), shared(after)) == (step < taken)
    assert (first.shared_steps, first.state.exclusive_steps, first.state.steps) == (
        2,
        taken,
        taken + 2,
    )

    second = client.train(2)
    for moments, steps in (
        (second.state.exclusive_moments, 2 * taken),
        (second.state.shared_moments, 4),
    ):
        assert {float(t) for name, t in moments.items() if name.startswith("step.")} == {steps}
    reference = Reference(config, client)
    on_exclusive, on_shared = adam(reference.exclusive, 4e-3), adam(reference.shared)
    for start in (0, taken + 2):
        middle, end = start + taken, start + taken + 2
        reference.fit(client.draws[start:middle], on_exclusive)
        reference.fit(client.draws[middle:end], on_shared)
    assert_close(client.weights, reference.weights)


@pytest.mark.parametrize(("stages", "steps"), [("none", 2), ("all", 5)])
def test_alternating_skips_a_part_that_the_partition_leaves_empty(stages: str, steps: int) -> None:
    client = Client(
        run_config(stages=stages, update="alternating", local_steps=2, exclusive_steps=5)
    )
    result = client.train(1)
    assert len(client.draws) == steps == result.state.steps
    assert result.shared_steps == (2 if stages == "none" else 0)
    assert result.state.exclusive_steps == (0 if stages == "none" else 5)
    assert largest_difference(client.weights, client.start) > 1e-4


# Counting


@pytest.mark.parametrize(
    ("update", "minibatches", "sizes"),
    [
        ("joint", "whole", [4, 4] * 2),
        ("joint", "ragged", [4, 4, 2] * 2),
        ("alternating", "whole", [4, 4] * 4),
    ],
)
def test_local_epochs_are_passes_over_the_images(
    update: str, minibatches: str, sizes: list[int]
) -> None:
    client = Client(run_config(local_epochs=2, minibatches=minibatches, update=update))
    result = client.train(1)
    assert [len(draw.images) for draw in client.draws] == sizes
    assert result.images == sum(sizes)
    assert result.state.steps == len(sizes)
    assert result.seconds > 0


def test_the_loss_is_the_mean_over_images_of_eq_7_before_each_step() -> None:
    """By images, not by batches: the last batch of this pass has 1 image, the others 3."""
    config = run_config(batch_size=3, minibatches="ragged", local_steps=8, learning_rate=5e-3)
    client = Client(config)
    result = client.train(1)
    assert sorted({len(draw.images) for draw in client.draws}) == [1, 3]
    reference = Reference(config, client)
    found: list[Tensor] = []
    for draw in client.draws:
        load_tensors(reference.model, draw.weights)
        found.append(losses(reference.model, draw).detach())
    by_image = torch.cat(found).double()
    assert result.loss == pytest.approx(float(by_image.mean()), rel=1e-5)
    by_batch = float(torch.stack([batch.double().mean() for batch in found]).mean())
    assert abs(result.loss - by_batch) > 1e-3, (
        "the two means are too close for this test to tell them apart"
    )
    timesteps = torch.cat([draw.timesteps for draw in client.draws])
    expected = [
        float(by_image[(timesteps > low) & (timesteps <= low + 25)].mean())
        for low in (0, 25, 50, 75)
    ]
    assert result.loss_by_quarter == pytest.approx(expected, rel=1e-5)


def test_a_quarter_without_draws_has_no_loss() -> None:
    client = Client(run_config(batch_size=1, local_steps=1))
    result = client.train(1)
    quarter = (int(client.draws[0].timesteps[0]) - 1) // 25
    assert [math.isnan(value) for value in result.loss_by_quarter] == [
        k != quarter for k in range(4)
    ]
    assert result.loss_by_quarter[quarter] == pytest.approx(result.loss)


def test_each_of_four_timesteps_is_a_quarter() -> None:
    """An index shifted by one, t instead of t - 1, would leave the first quarter empty."""
    client = Client(
        run_config(batch_size=1, local_steps=1, diffusion={"timesteps": 4, "beta_scale": "none"})
    )
    seen = set()
    for number in range(1, 16):
        quarters = client.train(number).loss_by_quarter
        t = int(client.draws[-1].timesteps[0])
        assert [k for k in range(4) if not math.isnan(quarters[k])] == [t - 1]
        seen.add(t)
    assert seen == {1, 2, 3, 4}


def test_training_learns() -> None:
    """The one thing all the bookkeeping is for: on 10 images the loss falls well below that of a
    guess of 0.
    """
    client = Client(run_config(batch_size=10, local_steps=40, learning_rate=5e-3))
    results = [client.train(number) for number in range(1, 4)]
    assert results[0].loss > results[-1].loss
    assert results[-1].loss < 0.6

"""A part's optimizer against torch's own, to the bit."""

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from srfed.training.optimizer import (
    MOMENTS,
    PartOptimizer,
    learning_rate_factor,
    rates_of_round,
)
from support.local_training import run_config, same_bits

NamedParameters = dict[str, nn.Parameter]


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


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("device", DEVICES)
def test_two_rates_are_torchs_two_parameter_groups_to_the_bit(device: str, kind: str) -> None:
    """The rates change on the way, as they do from round to round, and moments go through a
    file.
    """
    ours, theirs = named_parameters(device), named_parameters(device)
    training, owned = run_config(optimizer=kind).training, ("up.0.bias", "stem.bias", "elsewhere")
    optimizer = PartOptimizer(training, ours, 1e-2, owned=owned, owned_rate=1e-1)
    groups = [
        {"params": [p for n, p in theirs.items() if (n in owned) == apart], "lr": rate}
        for apart, rate in ((False, 1e-2), (True, 1e-1))
    ]
    reference = torch.optim.SGD(groups) if kind == "sgd" else torch.optim.Adam(groups, fused=True)
    for step, without in enumerate([None, "up.0.bias", "stem", None, "up", None, None]):
        give_gradients(ours, step, without)
        give_gradients(theirs, step, without)
        optimizer.step()
        reference.step()
        assert same_bits(ours, theirs), step
        if step == 2:
            moments = load(save(optimizer.export_moments()))
            optimizer.begin(5e-3, moments, 2e-2)
            for group, rate in zip(reference.param_groups, (5e-3, 2e-2), strict=True):
                group["lr"] = rate
        if step == 4:
            optimizer.begin(5e-3, optimizer.export_moments())
            reference.param_groups[1]["lr"] = 5e-3
    names = {f"{key}.{name}" for key in MOMENTS for name in SHAPES}
    assert set(optimizer.export_moments()) == (names if kind == "adam" else set())


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


@pytest.mark.parametrize(
    ("settings", "rounds", "factors"),
    [
        ({}, 5, [1, 0.755, 0.51, 0.265, 0.02]),
        ({"learning_rate_floor": 0.0}, 3, [1, 0.5, 0, 0]),
        ({"decay_rounds": 3, "learning_rate_floor": 0.2}, 9, [1, 0.6, 0.2, 0.2, 0.2]),
        ({"decay_rounds": 5}, 2, [1, 0.755, 0.51]),
        ({"decay_rounds": 2}, 4, [1, 0.02, 0.02]),
        ({"decay_rounds": 1}, 4, [1, 0.02, 0.02]),
        ({}, 1, [1]),
        ({"warmup_rounds": 3}, 5, [0.25, 0.3775, 0.3825, 0.265, 0.02]),
    ],
)
def test_linear_rates_fall_to_the_floor_and_stay_there(
    settings: dict[str, Any], rounds: int, factors: list[float]
) -> None:
    config = run_config(learning_rate_schedule="linear", federation={"rounds": rounds}, **settings)
    found = [learning_rate_factor(config, number) for number in range(1, len(factors) + 1)]
    assert found == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_multiplies_what_the_schedule_says_and_no_rate_is_above_the_full_one(
    schedule: str,
) -> None:
    def factors(warmup: int) -> list[float]:
        config = run_config(
            learning_rate_schedule=schedule, warmup_rounds=warmup, federation={"rounds": 6}
        )
        return [learning_rate_factor(config, number) for number in range(1, 7)]

    for plain, warm, share in zip(factors(0), factors(2), (1 / 3, 2 / 3, 1, 1, 1, 1), strict=True):
        assert warm == pytest.approx(share * plain)
        assert warm <= 1


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("decay", [None, 1, 2, 5])
def test_linear_rates_are_torchs_and_only_fall(rounds: int, decay: int | None) -> None:
    config = run_config(
        learning_rate_schedule="linear", decay_rounds=decay, federation={"rounds": rounds}
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.02, max(1, (decay or rounds) - 1)
    )
    found = []
    for number in range(1, 10):
        found.append(learning_rate_factor(config, number))
        assert found[-1] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found[0] == 1
    assert found == sorted(found, reverse=True)


def test_each_part_has_its_rate_and_what_is_not_set_apart_the_next() -> None:
    def rates(**training: Any) -> tuple[float, ...]:
        config = run_config(
            owned=["vector"],
            learning_rate=1e-3,
            learning_rate_schedule="linear",
            federation={"rounds": 3},
            **training,
        )
        return rates_of_round(config, 2)

    assert rates() == pytest.approx((0.51e-3,) * 3)
    assert rates(exclusive_learning_rate=2e-3) == pytest.approx((0.51e-3, 1.02e-3, 1.02e-3))
    assert rates(owned_learning_rate=1e-2) == pytest.approx((0.51e-3, 0.51e-3, 5.1e-3))
    every = {"exclusive_learning_rate": 2e-3, "owned_learning_rate": 1e-2}
    assert rates(**every) == pytest.approx((0.51e-3, 1.02e-3, 5.1e-3))

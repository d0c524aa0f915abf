"""Moving averages against their closed form."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srfed.training.ema import round_decay, step_decay, update_average
from support.aggregation import aggregated
from support.local_training import Client, assert_close, largest_difference, run_config


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
    assert client.state.exclusive.steps == 6
    decays = [min(0.6, (1 + step) / (10 + step)) if warmup else 0.6 for step in range(6)]
    for name in client.partition.exclusive:
        trajectory = [
            *(draw.weights[name] for draw in client.draws),
            client.state.exclusive.weights[name],
        ]
        expected = closed_form_average(trajectory, decays)
        torch.testing.assert_close(
            client.state.exclusive.average[name].double(), expected, rtol=1e-5, atol=1e-6
        )
        assert not torch.equal(client.state.exclusive.average[name], client.start[name]), (
            "it never moved"
        )
        assert not torch.equal(
            client.state.exclusive.average[name], client.state.exclusive.weights[name]
        )


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
        moved = aggregated(config, before, {"a": result.shared}, {"a": 1.0}, {}).shared
        update_average(average, moved, round_decay(0.8, warmup, steps, result.shared_steps))
        steps += result.shared_steps
        as_exclusive.train(number)
    assert_close(as_exclusive.weights, as_shared.weights)
    assert_close(average, as_exclusive.state.exclusive.average)
    assert largest_difference(average, as_shared.start) > 1e-4

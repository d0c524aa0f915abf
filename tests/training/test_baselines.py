"""What the federated baselines add: the proximal term, training of θ_i alone, and a network that is
told its task.
"""

from typing import Any

import pytest
import torch

from srfed.errors import UserError
from srfed.model import build_model, build_objective, denoiser_of_task
from srfed.networks.partition import divide
from srfed.training.local import LocalResult
from support.centralised import (
    RATE,
    Central,
    assert_close,
    assert_moved,
    central,
    ddpm_losses,
    leaves,
    locally,
    owners,
    perturbed,
    run_config,
    same_bits,
)

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
    shared, exclusive = leaves(first.shared), leaves(first.state.exclusive.weights)
    ddpm_losses(place.model, {**shared, **exclusive}, place.objective.draws[1]).mean().backward()
    expected = {
        n: t - RATE * (t.grad + strength * (t - place.start.shared.weights[n]))
        for n, t in shared.items()
    }
    assert_close(second.shared, expected)
    assert_close(
        second.state.exclusive.weights, {n: t - RATE * t.grad for n, t in exclusive.items()}
    )
    unpulled = client_steps(2)[1].shared
    assert max(float((unpulled[n] - second.shared[n]).abs().max()) for n in shared) > 1e-5


def test_the_proximal_term_is_the_gradient_of_fedprox() -> None:
    """μ/2 ‖φ - φ^r‖² differentiated by autograd, over a round of Adam."""
    place, result = client_steps(3, proximal=0.7, optimizer="adam")
    shared, exclusive = (
        leaves(place.start.shared.weights),
        leaves(place.start.tasks["task0"].exclusive.weights),
    )
    optimizer = torch.optim.Adam([*shared.values(), *exclusive.values()], lr=RATE, fused=True)
    for draw in place.objective.draws:
        optimizer.zero_grad()
        distance = sum(
            (t - place.start.shared.weights[n]).square().sum() for n, t in shared.items()
        )
        (
            ddpm_losses(place.model, {**shared, **exclusive}, draw).mean() + 0.7 / 2 * distance
        ).backward()
        optimizer.step()
    assert_close(result.shared, shared, atol=2e-5)
    assert_close(result.state.exclusive.weights, exclusive, atol=2e-5)


def test_exclusive_updates_leave_every_bit_of_the_core_and_train_the_task() -> None:
    place, result = client_steps(3, update="exclusive", proximal=1.0)
    assert same_bits(result.shared, place.start.shared.weights)
    assert result.shared_steps == 0
    assert (
        result.state.minibatches == result.state.exclusive.steps == len(place.objective.draws) == 3
    )
    exclusive = leaves(place.start.tasks["task0"].exclusive.weights)
    optimizer = torch.optim.SGD(exclusive.values(), lr=RATE)
    for draw in place.objective.draws:
        optimizer.zero_grad()
        ddpm_losses(
            place.model, {**place.start.shared.weights, **exclusive}, draw
        ).mean().backward()
        optimizer.step()
    assert_close(result.state.exclusive.weights, exclusive)
    assert_moved(place.start.tasks["task0"].exclusive.weights, result.state.exclusive.weights)


def test_exclusive_updates_with_nothing_exclusive_are_refused() -> None:
    with pytest.raises(UserError, match=r"update exclusive trains nothing .*exclusive_stages none"):
        run_config("federated", "none", update="exclusive")
    run_config("federated", "none", update="exclusive", owned=["vector"])


# --- The network is told its task ----------------------------------------------------------------


def test_only_the_rows_of_tasks_in_the_minibatch_have_a_gradient() -> None:
    trained = central(
        run_config("pooled", clients=6, embedding="shared", batch_size=1, centralised_batch_size=6),
        *[5] * 6,
    )
    trained.train(1)
    present = set(owners(trained.tasks, trained.objective.draws[0]))
    assert 1 < len(present) < 6, "this seed tells nothing"
    before, after = (
        state.shared.weights["task_table.weight"] for state in (trained.start, trained.state)
    )
    moved = {row for row in range(6) if not torch.equal(before[row], after[row])}
    assert moved == present


def test_a_client_of_a_federation_moves_its_own_row() -> None:
    config = run_config("federated", "none", embedding="shared")
    place = central(run_config("one_task", "none", embedding="shared"), 5, 7, 9)
    before = place.start.shared.weights["task_table.weight"]
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
    objective = build_objective(config, torch.device("cpu"))
    outputs = []
    for task in range(3):
        row = weights["task_table.weight"][task]
        hook = plain.timestep.register_forward_hook(
            lambda _module, _inputs, output, row=row: output + row
        )
        with torch.no_grad():
            outputs.append(denoiser_of_task(objective, model, task)(x, timesteps))
            expected = objective.denoiser(plain)(x, timesteps)
            torch.testing.assert_close(outputs[-1], expected)
        hook.remove()
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    with pytest.raises(ValueError, match="cannot do without"):
        model(x, timesteps)
    with pytest.raises(ValueError, match="shared task embedding"):
        plain(x, timesteps, torch.zeros(4, dtype=torch.long))
    for task in (-1, 3):
        with pytest.raises(UserError, match="tasks 0 to 2"):
            denoiser_of_task(objective, model, task)


RULES: list[Any] = ["none", "io", 1, 2, 3, 4, "all", ["up.0.*"], ["stem", "head"]]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_owned_parts_are_exclusive_under_every_rule_and_a_table_shared_unless_all_is_exclusive(
    rule: Any,
) -> None:
    model = build_model(run_config("balanced", owned=["vector", "film"], batch_size=3), 1)
    partition = divide(model, rule)
    names = [name for name in model.state_dict() if "film" in name or "task_vector" in name]
    assert len(names) == 1 + 10
    assert list(partition.owned) == names
    assert set(names) <= set(partition.exclusive)
    assert sorted(partition.shared + partition.exclusive) == sorted(model.state_dict())
    # What is in a message: the core's tensors, those of a network that owns nothing.
    plain = build_model(run_config("balanced", batch_size=3), 1)
    assert divide(plain, rule).owned == ()
    assert partition.shared == divide(plain, rule).shared
    assert partition.fingerprint(model.state_dict()) == divide(plain, rule).fingerprint(
        plain.state_dict()
    )
    table = build_model(run_config("balanced", embedding="shared", batch_size=3), 1)
    assert ("task_table.weight" in divide(table, rule).shared) == (rule != "all")


@pytest.mark.parametrize("owned", [["vector"], ["film"], ["vector", "film"]])
def test_new_owned_parts_change_nothing_and_then_learn(owned: list[str]) -> None:
    config = run_config("federated", "none", owned=owned)
    model, plain = build_model(config, 1), build_model(run_config("federated", "none"), 1)
    parts = {n: t for n, t in model.state_dict().items() if n not in plain.state_dict()}
    assert list(parts) == list(divide(model, "none").owned)
    assert not any(tensor.any() for tensor in parts.values())
    rest = {n: model.state_dict()[n] for n in model.state_dict() if n not in parts}
    assert same_bits(rest, plain.state_dict()), "names, order and bits of a network without"
    weights = perturbed(plain, 0, list(plain.state_dict()))
    plain.load_state_dict(weights)
    model.load_state_dict({**weights, **parts})
    x, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 50, 100])
    with torch.no_grad():
        assert torch.equal(model(x, timesteps), plain(x, timesteps))
        for name in parts:
            model.get_parameter(name).add_(1)
            assert not torch.allclose(model(x, timesteps), plain(x, timesteps), atol=1e-3), name
            model.get_parameter(name).zero_()
    place = central(run_config("one_task", "none", owned=owned), 5, 7, 9)
    for i, client in enumerate(locally(config, place, 1)):
        assert list(client.state.exclusive.weights) == list(parts)
        assert not set(parts) & set(client.shared)
        assert_moved(
            place.start.tasks[f"task{i}"].exclusive.weights, client.state.exclusive.weights
        )

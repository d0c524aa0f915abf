"""Local training against loops written here with torch's own optimizers on the draws that it
made.
"""

import math
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from srfed.training.local import LocalResult, LocalTrainer
from srfed.training.part import initial_state, load_tensors
from support.local_training import (
    Client,
    Reference,
    Tensors,
    adam,
    assert_close,
    largest_difference,
    losses,
    run_config,
    same_bits,
    some_images,
)

# What a round gives, and on what it depends


def result_tensors(result: LocalResult) -> Tensors:
    state = result.state
    return {
        f"{part}/{name}": tensor
        for part, tensors in (
            ("shared", result.shared),
            ("exclusive", state.exclusive.weights),
            ("average", state.exclusive.average),
            ("own", state.exclusive.moments),
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
        config, used.model, used.partition, used.objective, "b", some_images(6, seed=3)
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


def test_a_state_that_is_lent_is_the_one_that_would_be_copied_until_the_next_round() -> None:
    client, other = (Client(run_config(shared_moments="keep")) for _ in range(2))
    copied = client.train(1)
    lent = other.trainer.train(1, other.shared, other.state, lend=True)
    before = {name: tensor.clone() for name, tensor in result_tensors(lent).items()}
    assert same_bits(before, result_tensors(copied))
    other.trainer.train(2, copied.shared, copied.state)
    changed = {n: not torch.equal(t, before[n]) for n, t in result_tensors(lent).items()}
    assert {name.partition("/")[0] for name, moved in changed.items() if not moved} == {"shared"}


def test_the_first_state_is_the_models_own_weights_without_moments() -> None:
    client = Client(run_config(stages=2))
    state = initial_state(client.model, client.partition)
    assert same_bits(state.exclusive.weights, client.partition.take_exclusive(client.start))
    assert same_bits(state.exclusive.average, state.exclusive.weights)
    assert (state.exclusive.moments, state.shared_moments) == ({}, {})
    assert (state.minibatches, state.exclusive.steps) == (0, 0)
    with torch.no_grad():
        client.model.stem.weight.zero_()
    assert same_bits(state.exclusive.weights, client.partition.take_exclusive(client.start)), (
        "it must be a copy"
    )
    assert state.exclusive.weights["stem.weight"] is not state.exclusive.average["stem.weight"]


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
        float(t) for n, t in client.state.exclusive.moments.items() if n.startswith("step.")
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
        assert {n.split(".", 1)[1] for n in result.state.exclusive.moments} == set(
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
    assert client.state.exclusive.moments == client.state.shared_moments == {}


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


@pytest.mark.parametrize("stages", [1, "none"])
def test_owned_parts_are_trained_at_a_rate_of_their_own(stages: Any) -> None:
    """Against torch's Adam with a group of parameters for each rate, over rounds of a falling
    rate.
    """
    config = run_config(
        stages=stages,
        owned=["vector", "film"],
        learning_rate=1e-3,
        exclusive_learning_rate=2e-3,
        owned_learning_rate=1e-2,
        learning_rate_schedule="linear",
        shared_moments="keep",
        federation={"rounds": 3},
    )
    client = Client(config)
    client.train(1, 2, 3)
    reference, owned = Reference(config, client), client.partition.owned
    own = [p for n, p in reference.model.named_parameters() if n in owned]
    stage = [p for p in reference.exclusive if all(p is not each for each in own)]
    assert bool(stage) == (stages == 1)
    assert len(own) == 11
    groups: list[Any] = [{"params": stage, "lr": 2e-3}, {"params": own, "lr": 1e-2}]
    optimizers = [torch.optim.Adam([g for g in groups if g["params"]], fused=True)]
    optimizers.append(torch.optim.Adam([{"params": reference.shared, "lr": 1e-3}], fused=True))
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.02, 2) for each in optimizers]
    for number in range(3):
        reference.fit(client.draws[3 * number : 3 * number + 3], *optimizers)
        for schedule in schedules:
            schedule.step()
    assert_close(client.weights, reference.weights, atol=2e-6)
    before = {name: client.start[name] for name in owned}
    assert largest_difference(before, client.weights) > 2e-2, "more than the stages' rate allows"


def test_all_exclusive_is_one_uninterrupted_training_of_a_whole_network() -> None:
    """Two rounds of n steps are 2n steps: nothing of θ_i's optimizer is lost between rounds."""
    config = run_config(stages="all")
    client = Client(config)
    result = client.train(1, 2)
    assert (result.shared, result.state.shared_moments, result.shared_steps) == ({}, {}, 0)
    reference = Reference(config, client)
    reference.fit(client.draws, adam(reference.model.parameters()))
    assert_close(client.state.exclusive.weights, reference.weights)


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
    assert (first.shared_steps, first.state.exclusive.steps, first.state.minibatches) == (
        2,
        taken,
        taken + 2,
    )

    second = client.train(2)
    for moments, steps in (
        (second.state.exclusive.moments, 2 * taken),
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
    assert len(client.draws) == steps == result.state.minibatches
    assert result.shared_steps == (2 if stages == "none" else 0)
    assert result.state.exclusive.steps == (0 if stages == "none" else 5)
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
    assert result.state.minibatches == len(sizes)
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


# What a fresh process imports


TRAIN_IN_MANY_WAYS = """
import srfed.commands.train, srfed.federation.flower.in_process
from srfed.data import load_tasks
from support.local_training import Client, run_config, some_images
for optimizer in ("adam", "sgd"):
    for update in ("joint", "alternating"):
        config = run_config(optimizer=optimizer, update=update, gradient_clip=1.0, dropout=0.1)
        Client(config).train(1, 2)
every_option = {"channels_last": True, "precision": "bfloat16"}
Client(run_config(resources=every_option, data={"horizontal_flip": True})).train(1, 2)
load_tasks(config.data, 3)
"""

SAMPLE_IN_MANY_WAYS = """
import torch
from srfed.config import SamplingConfig
from srfed.evaluation.generation import generate
from srfed.model import build_objective, build_model
from support.local_training import run_config
config = run_config()
model = build_model(config, 1).eval()
objective = build_objective(config, torch.device("cpu"))
for sampler in ("ancestral", "ddim", "dpm_solver"):
    sampling = SamplingConfig(sampler=sampler, steps=2, batch_size=2)
    arguments = dict(count=3, shape=(8, 8, 1), seed=0, task="a", strip_steps=2)
    generate(objective.denoiser(model), objective.process, sampling, **arguments)
"""


JUDGE = """
import tempfile
from pathlib import Path
from srfed.__main__ import main
from support.tiny_run import begin, run_in_process
run = run_in_process(begin(Path(tempfile.mkdtemp(), "run"), {"federation.rounds": 1}))
code = main(["evaluate", "--run", str(run.path), "--samples", "30"])
assert code == 0, code
print()
"""


@pytest.mark.parametrize(
    "program",
    [TRAIN_IN_MANY_WAYS, SAMPLE_IN_MANY_WAYS, JUDGE],
    ids=["training", "sampling", "judging"],
)
def test_a_fresh_process_never_imports_torchs_compiler_or_libraries_of_statistics(
    program: str,
) -> None:
    """A client may be a process of its own, and each of these takes over a second to import."""
    names = ("torch", "torch._dynamo", "sklearn", "scipy", "pandas")
    program += f"import sys; print(*[name in sys.modules for name in {names}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["True", *["False"] * 4]

"""What a client may say, and what an optimizer can do: against the trainer itself, and against the
worst gradients.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from srfed.config import load_config, parse_config_json
from srfed.data import load_tasks
from srfed.errors import UserError
from srfed.federation.aggregation import believed_counts, client_weights
from srfed.federation.bounds import BELIEVED_STEPS, TrainPlan, believed_steps
from srfed.model import build_model, build_objective, build_partition
from srfed.training.local import LocalTrainer
from srfed.training.minibatches import MinibatchOrder
from srfed.training.optimizer import ADAM_REACH, BETA1, BETA2, PartOptimizer, reach_of_round
from srfed.training.part import initial_state
from srfed.units import printable
from support.tiny_run import tiny_config

# --- Rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"training.local_steps": 3},
        {"training.local_steps": 3, "training.minibatches": "ragged"},
        {
            "training.local_steps": None,
            "training.local_epochs": 2,
            "training.minibatches": "ragged",
        },
        {"training.local_steps": 3, "training.minibatches": "continued"},
        {
            "training.update": "alternating",
            "training.exclusive_steps": 2,
            "training.minibatches": "ragged",
        },
        {"training.update": "exclusive"},
        {"model.exclusive_stages": "all", "training.local_steps": 2},
        {"model.exclusive_stages": "none", "training.local_steps": 2},
        {
            "model.exclusive_stages": "none",
            "model.owned": ["vector", "film"],
            "training.owned_learning_rate": 1.0,
            "training.learning_rate_schedule": "linear",
        },
    ],
    ids=str,
)
def test_a_round_is_computed_as_the_trainer_takes_it(changes: dict[str, Any]) -> None:
    config = tiny_config({"training.batch_size": 4, **changes})
    images = load_tasks(config.data, 1)[0].train[:10]
    model = build_model(config, 1)
    partition = build_partition(config, model)
    state = initial_state(model, partition)
    shared = {
        name: tensor.clone() for name, tensor in partition.take_shared(model.state_dict()).items()
    }
    trainer = LocalTrainer(
        config, model, partition, build_objective(config, torch.device("cpu")), "digit-0", images
    )
    for number in (1, 2, 3):
        plan = TrainPlan.of(config, partition, "digit-0", len(images), state.minibatches)
        result = trainer.train(number, shared, state)
        assert (plan.images, plan.shared_steps) == (result.images, result.shared_steps)
        assert plan.minibatches == result.state.minibatches - state.minibatches
        moved = math.sqrt(
            sum(float((result.shared[n] - shared[n]).double().square().sum()) for n in shared)
        )
        reach = reach_of_round(config, number, plan.shared_steps, shared)
        assert reach is not None
        assert moved <= reach.usual
        state = result.state


@pytest.mark.parametrize("minibatches", ["whole", "ragged", "continued"])
def test_images_are_counted_as_they_are_drawn(minibatches: Any) -> None:
    order = MinibatchOrder(10, 4, minibatches, 0, "digit-0")
    seen = 0
    for step in range(11):
        assert order.images_until(step) == seen
        seen += len(order.indices(step))


def test_a_client_with_twelve_times_the_images_may_move_twelve_times_as_far_under_epochs() -> None:
    config = tiny_config(
        {"training.local_steps": None, "training.local_epochs": 1, "training.batch_size": 8}
    )
    model = build_model(config, 1)
    partition = build_partition(config, model)
    shared = partition.take_shared(model.state_dict())
    few, many = (
        reach_of_round(
            config, 1, TrainPlan.of(config, partition, "a", images, 0).shared_steps, shared
        )
        for images in (16, 192)
    )
    assert few is not None
    assert many is not None
    assert many.usual == pytest.approx(12 * few.usual)


def test_claimed_steps_are_believed_up_to_a_multiple_of_the_others() -> None:
    # Owners of 400 and 48 images, minibatches of 16: neither is doubted, whoever lies beside them.
    assert believed_steps({"many": 25, "few": 3}, []) == {"many": 25, "few": 3}
    assert believed_steps({"many": 25, "few": 3, "liar": 62_500}, []) == {
        "many": 25,
        "few": 3,
        "liar": 10 * 25,
    }
    assert believed_steps({"few": 3, "liar": 62_500}, []) == {"few": 3, "liar": BELIEVED_STEPS}
    # Who claims one image takes nothing from the other.
    assert believed_steps({"honest": 50, "liar": 1}, [])["honest"] == 50
    assert believed_steps({"a": 4000, "b": 4000, "liar": 1}, [])["a"] == 4000
    # What the server knows by itself, and a client that has no others, stand as they are.
    assert believed_steps({"few": 3, "known": 900}, ["known"]) == {"few": 3, "known": 900}
    assert believed_steps({"alone": 900}, []) == {"alone": 900}
    assert believed_steps({}, []) == {}


# --- What Adam can do ----------------------------------------------------------------------------


def longest_step(gradients: list[float]) -> float:
    """The longest step that the clients' own optimizer makes after these gradients, in learning
    rates.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = PartOptimizer(tiny_config().training, {"w": parameter}, 1e-3)
    longest = 0.0
    for gradient in gradients:
        before = parameter.item()
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        longest = max(longest, abs(parameter.item() - before) / 1e-3)
        with torch.no_grad():
            parameter.zero_()
    return longest


def test_no_gradients_move_adam_further_than_its_reach_and_some_come_near() -> None:
    generator = torch.Generator().manual_seed(0)
    wild = [torch.randn(400, generator=generator).exp().pow(power).tolist() for power in (1, 4, 8)]
    assert all(longest_step(gradients) <= ADAM_REACH for gradients in wild)
    # A single gradient after none for long: the bound that is usually named.
    assert longest_step([1e-6] * 6000 + [1.0]) == pytest.approx(
        (1 - BETA1) / math.sqrt(1 - BETA2), rel=0.01
    )
    # Gradients that grow by β2 / β1 after a long silence reach further than that.
    growing = [1e-6] * 6000 + [(BETA2 / BETA1) ** (k - 60) for k in range(61)]
    assert 7.1 < longest_step(growing) <= ADAM_REACH


# --- Weights -------------------------------------------------------------------------------------


def test_no_client_weighs_more_than_its_cap_and_the_rest_goes_to_the_others() -> None:
    claims = {"a": 100, "b": 300, "liar": 10**9}
    weights = client_weights("examples", claims, 0.8)
    assert weights == pytest.approx({"a": 0.05, "b": 0.15, "liar": 0.8})
    assert sum(
        client_weights("examples", {**claims, "other": 10**9}, 0.4).values()
    ) == pytest.approx(1)
    assert client_weights("examples", {**claims, "other": 10**9}, 0.4)["b"] == pytest.approx(0.15)
    # Ordinary numbers are left as they are, to the bit, and a client alone has everything.
    assert client_weights("examples", {"a": 100, "b": 300}, 0.8) == client_weights(
        "examples", {"a": 100, "b": 300}
    )
    assert client_weights("examples", {"liar": 7}, 0.1) == {"liar": 1.0}
    assert client_weights("examples", {"a": 1, "b": 10**9}, 0.1) == pytest.approx(
        {"a": 0.5, "b": 0.5}
    )


def test_images_count_as_many_as_give_their_owner_its_largest_weight() -> None:
    claims = {"a": 100, "b": 300, "liar": 10**9}
    assert believed_counts(claims, [], 0.8) == {"a": 100, "b": 300, "liar": 1600}
    assert believed_counts({**claims, "other": 10**9}, [], 0.4) == {
        "a": 100,
        "b": 300,
        "liar": 800,
        "other": 800,
    }
    # Whose images the server has itself, whoever has no others, and all that are ordinary.
    assert believed_counts(claims, ["liar"], 0.8) == claims
    assert believed_counts({"liar": 7}, [], 0.1) == {"liar": 7}
    assert believed_counts({"a": 1, "b": 1}, [], 0.8) == {"a": 1, "b": 1}
    ordinary = {"a": 48, "b": 400, "c": 999_999_937}
    assert believed_counts(ordinary, [], 1.0) == ordinary


# --- Texts and settings --------------------------------------------------------------------------


def test_a_text_of_anybody_is_one_printable_line_of_bounded_length() -> None:
    assert printable("digit-0: 9x8x1 at 10 °C") == "digit-0: 9x8x1 at 10 °C"
    assert (
        printable("\x1b[31mred\x1b[0m\r\n\tline\x00two\u202eback\x9b2J")
        == "[31mred [0m line two back 2J"
    )
    assert printable("x" * 5_000_000) == "x" * 199 + "…"
    assert printable("", 10) == ""


def test_the_setting_that_has_gone_is_refused_in_words_and_read_in_what_was_stored(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["federation.largest_update=100.0"])
    assert "federation.largest_update is no setting any more" in str(caught.value)
    config = tiny_config()
    content = json.loads(config.to_json())
    content["federation"]["largest_update"] = 100.0
    assert parse_config_json(json.dumps(content)) == config

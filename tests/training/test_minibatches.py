"""The order of a task's images."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srfed.errors import UserError
from srfed.training.minibatches import MinibatchOrder
from support.local_training import Client, run_config, some_images


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


# --- The minibatches' order ----------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 30), st.integers(0, 3))
def test_batches_across_passes_are_full_and_together_one_pass_after_another(
    images: int, batch_size: int, start: int, seed: int
) -> None:
    def order() -> MinibatchOrder:
        return MinibatchOrder(images, batch_size, "continued", seed, "a")

    one = order()
    batches = [one.indices(step) for step in range(start + 4)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.long for batch in batches)
    sequence = torch.cat(batches).tolist()
    for first in range(0, len(sequence) - images + 1, images):
        assert sorted(sequence[first : first + images]) == list(range(images))
    last = sequence[len(sequence) // images * images :]
    assert len(set(last)) == len(last)
    resumed = order()
    for step in range(start, start + 4):
        assert torch.equal(resumed.indices(step), batches[step])
    assert torch.equal(resumed.indices(0), batches[0]), "any order of asking"


def test_passes_differ_and_those_that_fit_are_those_without_running_on() -> None:
    across, within = (
        MinibatchOrder(12, 4, minibatches, 0, "a") for minibatches in ("continued", "whole")
    )
    batches = [across.indices(step).tolist() for step in range(9)]
    assert batches == [within.indices(step).tolist() for step in range(9)]
    passes = [tuple(map(tuple, batches[i : i + 3])) for i in (0, 3, 6)]
    assert len(set(passes)) == 3

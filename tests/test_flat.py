"""Many tensors taken as one, against what PyTorch gives for each."""

import pytest
import torch

from srfed.federation.layout import check_finite
from srfed.flat import copies, joined, parts, runs, sent, sent_as_one


def test_what_lies_in_a_row_is_taken_as_one_and_shares_its_memory() -> None:
    row = torch.arange(10.0)
    one, other, none = row[:6].view(2, 3), row[6:], torch.zeros(0, 4)
    whole = joined([one, none, other])
    assert torch.equal(whole, row)
    assert whole.data_ptr() == row.data_ptr()
    apart = row.clone()
    assert [len(run) for run in runs([one, other, apart[:4], apart[4:]])] == [10, 10]


def test_a_part_that_numpy_has_had_is_no_longer_of_the_row() -> None:
    row = torch.arange(10.0)
    part = torch.from_numpy(row[:6].numpy())
    assert [len(run) for run in runs([part, row[6:]])] == [6, 4]
    assert torch.equal(joined([part, row[6:]]), row)


def test_what_does_not_is_joined_in_the_order_of_its_values() -> None:
    row, strided = torch.arange(12.0), torch.arange(12.0).view(3, 4).T
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    given = [row[6:], row[:6], strided, images, row[3:9]]
    assert torch.equal(joined(given), torch.cat([tensor.reshape(-1) for tensor in given]))
    assert joined([], torch.float64).dtype == torch.float64


@pytest.mark.parametrize("by_name", [False, True])
def test_copies_lie_in_a_row_for_each_type_and_keep_their_order(by_name: bool) -> None:
    weights = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    given = {"b": weights, "c": torch.tensor(3), "a": torch.rand(7)[2:5], "d": torch.tensor(4)}
    found = copies(given)
    if by_name:
        found = copies(given, by_name=True)
    assert list(found) == list(given)
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name])
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.data_ptr() != given[name].data_ptr()
    order = ("a", "b") if by_name else ("b", "a")
    assert len(runs(found[name] for name in order)) == len(runs([found["c"], found["d"]])) == 1


def test_what_goes_to_a_device_goes_as_one_of_each_type_and_stays_where_it_is_on_a_cpu() -> None:
    images = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    given = [images, torch.tensor(3), torch.rand(7)[2:5], torch.zeros(0, 4), torch.tensor(4)]
    here = torch.device("cpu")
    assert [id(tensor) for tensor in sent(given, here)] == [id(tensor) for tensor in given]
    found = sent_as_one(given, here)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in given]
    assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))
    for places in ((0, 2), (1, 4)):
        assert len(runs(found[place] for place in places)) == 1
    # Nothing can be read there, but it is the way that a GPU's copies take.
    there = sent(given, torch.device("meta"))
    assert {tensor.device.type for tensor in there} == {"meta"}
    assert [tensor.shape for tensor in there] == [tensor.shape for tensor in given]


def test_parts_are_views() -> None:
    row = torch.arange(7.0)
    one, other = parts(row, [(2, 3), ()])
    row[6] = 9
    assert (one.shape, float(other)) == ((2, 3), 9)


def test_values_are_finite_though_their_sum_is_not() -> None:
    largest = torch.finfo(torch.float32).max
    check_finite({"a": torch.full((3,), largest), "b": torch.arange(3)})
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="tensor 'b' has values that are not finite"):
            check_finite({"a": torch.full((3,), largest), "b": torch.tensor([0.0, wrong, -wrong])})

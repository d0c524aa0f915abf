"""The kernel distance against torch-fidelity's own functions and against the formula written
out.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)

from srfed.errors import UserError
from srfed.evaluation.metrics.kernel import kernel_distance, kernel_score_name

Array = npt.NDArray[Any]


def features(count: int, seed: int, offset: float = 0.0) -> Array:
    return np.random.default_rng(seed).gamma(2.0, size=(count, 16)) + offset


@pytest.mark.parametrize(
    ("seed", "subsets", "size"), [(0, 100, 50), (2020, 7, 30), (2**32 + 5, 3, 120)]
)
def test_kernel_distance_is_torch_fidelitys(seed: int, subsets: int, size: int) -> None:
    generated, reference = features(150, 0), features(120, 1, offset=0.2)
    ours = kernel_distance(generated, reference, seed=seed, subsets=subsets, subset_size=size)
    theirs = kid_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(reference),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed % 2**32,
        verbose=False,
    )
    assert ours.mean == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert ours.deviation == pytest.approx(theirs[KEY_METRIC_KID_STD], rel=1e-9)
    assert (ours.subsets, ours.subset_size) == (subsets, size)


def test_default_settings_are_torch_fidelitys() -> None:
    generated, reference = features(1100, 2), features(1050, 3)
    theirs = kid_features_to_metric(
        torch.from_numpy(generated),
        torch.from_numpy(reference),
        rng_seed=9,
        kid_subsets=4,
        verbose=False,
    )
    ours = kernel_distance(generated, reference, seed=9, subsets=4)
    assert ours.mean == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert ours.subset_size == 1000
    assert kernel_distance(features(20, 0), features(20, 1), seed=0).subsets == 100


def unbiased_mmd(first: Array, second: Array) -> float:
    """Gretton et al. 2012, eq. (3), with k(x, y) = (xᵀy / D + 1)³, pair by pair."""

    def kernel(x: Array, y: Array) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    m, n = len(first), len(second)
    within_first = sum(
        kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j
    )
    within_second = sum(
        kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j
    )
    between = sum(kernel(x, y) for x in first for y in second)
    return within_first / (m * (m - 1)) + within_second / (n * (n - 1)) - 2 * between / (m * n)


def test_a_subset_of_everything_gives_the_closed_form() -> None:
    generated, reference = features(40, 4), features(40, 5, offset=0.5)
    ours = kernel_distance(generated, reference, seed=0, subsets=3)
    assert ours.subset_size == 40
    assert ours.mean == pytest.approx(unbiased_mmd(generated, reference), rel=1e-10)
    assert ours.deviation == pytest.approx(0, abs=1e-9)


def test_the_subset_size_is_cut_to_the_smaller_side_and_told() -> None:
    assert kernel_distance(features(40, 0), features(25, 1), seed=0).subset_size == 25
    assert (
        kernel_distance(features(30, 0), features(45, 1), seed=0, subset_size=31).subset_size == 30
    )


def test_equal_distributions_score_about_zero_and_others_more() -> None:
    same = kernel_distance(features(1000, 6), features(1000, 7), seed=0, subset_size=200)
    other = kernel_distance(
        features(1000, 6), features(1000, 7, offset=0.5), seed=0, subset_size=200
    )
    assert abs(same.mean) < 3 * same.deviation
    assert other.mean > 10 * same.deviation


def test_the_seed_chooses_the_subsets() -> None:
    first, second, third = (
        kernel_distance(features(60, 8), features(60, 9), seed=seed, subset_size=20)
        for seed in (1, 1, 2)
    )
    assert first == second != third


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    generated = features(20, 10)
    generated.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_distance(generated, features(20, 11), seed=0)
    assert capfd.readouterr() == ("", "")


def test_impossible_features_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images on each side, got 1"):
        kernel_distance(features(20, 0), features(1, 1), seed=0)
    with pytest.raises(UserError, match="dimension 16 and 8"):
        kernel_distance(features(20, 0), features(20, 1)[:, :8].copy(), seed=0)
    with pytest.raises(ValueError, match="float64"):
        kernel_distance(features(20, 0), features(20, 1).astype(np.float32), seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        kernel_distance(features(20, 0), np.full((20, 16), np.nan), seed=0)
    with pytest.raises(ValueError, match="0 of 1000"):
        kernel_distance(features(20, 0), features(20, 1), seed=0, subsets=0)


def test_only_the_official_inception_earns_the_name_kid() -> None:
    names = {
        "fid": "kid",
        "fd_embedded": "kd_embedded",
        "fd_inception_0123abcd": "kd_inception_0123abcd",
    }
    assert {name: kernel_score_name(name) for name in names} == names
    with pytest.raises(ValueError, match="ssim"):
        kernel_score_name("ssim")

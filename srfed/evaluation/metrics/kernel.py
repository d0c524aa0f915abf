"""The kernel distance of two sets of features: an unbiased MMD² with a cubic polynomial kernel.

Bińkowski et al. 2018 (arXiv:1801.01401), section 4: k(x, y) = (xᵀy / D + 1)³, the mean over random
subsets of the unbiased estimate of MMD². On features of the 2015-12-05 Inception it is the KID; on
any other network's it has another name. Subsets and estimator are torch-fidelity's, which takes
seconds to import.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srfed.errors import UserError

Features = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance, and what it depends on.

    Attributes:
        mean: over the subsets; unbiased, so slightly negative where the two sets are alike.
        deviation: standard deviation over the subsets (divided by their number).
        subsets: how many pairs of subsets were drawn.
        subset_size: images in each subset.
    """

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    generated: Features,
    reference: Features,
    *,
    seed: int,
    subsets: int = 100,
    subset_size: int = 1000,
) -> KernelDistance:
    """Kernel distance, as torch-fidelity's ``kid`` with its defaults, to rounding.

    Subsets are drawn without replacement within one, anew for each.

    Args:
        generated: float64 N x D.
        reference: float64 M x D, features of the same network.
        seed: of the subsets; torch-fidelity's ``rng_seed``, modulo 2^32.
        subsets: number of pairs of subsets, at least 1.
        subset_size: images in each, at least 2; N or M where that is less.

    Raises:
        UserError: a side has fewer than 2 images, or the dimensions differ.
        ValueError: other shapes or dtypes, values that are not finite, or impossible numbers of
            subsets.
    """
    for features in (generated, reference):
        if features.ndim != 2 or features.dtype != np.float64:
            raise ValueError(
                f"need features N x D in float64, got {features.dtype} {features.shape}"
            )
        if not np.isfinite(features).all():
            raise ValueError("the features have values that are not finite")
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"need at least 1 subset of at least 2 images, got {subsets} of {subset_size}"
        )
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"features of dimension {generated.shape[1]} and {reference.shape[1]} cannot be "
            "compared: both sets must come from one network and have one number of channels"
        )
    size = min(subset_size, len(generated), len(reference))
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, got {size}")
    draws = np.random.RandomState(seed % 2**32)
    distances = [
        _unbiased(
            generated[draws.choice(len(generated), size, replace=False)],
            reference[draws.choice(len(reference), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), subsets, size)


def _unbiased(first: Features, second: Features) -> float:
    """The unbiased estimate of MMD² from two sets of one size, at least 2: Gretton et al. 2012, eq.
    (3).
    """
    size = len(first)
    within = sum(
        float(kernel.sum() - np.trace(kernel)) for kernel in (_cubic(x, x) for x in (first, second))
    )
    between = float(_cubic(first, second).sum())
    return within / (size * (size - 1)) - 2 * between / size**2


def _cubic(x: Features, y: Features) -> Features:
    linear = x @ y.T / x.shape[1] + 1
    cubic: Features = linear * linear * linear
    return cubic


def kernel_score_name(score_name: str) -> str:
    """What a kernel distance is called on features whose Fréchet distance is called ``score_name``.

    Only the official Inception, whose Fréchet distance is "fid", earns "kid"; "fd_x" becomes
    "kd_x".

    Raises:
        ValueError: no Fréchet distance is called that.
    """
    if score_name == "fid":
        return "kid"
    if not score_name.startswith("fd_"):
        raise ValueError(
            f"{score_name!r} is no Fréchet distance; they are called 'fid' or 'fd_...'"
        )
    return f"kd_{score_name.removeprefix('fd_')}"

"""Statistics of feature vectors that can be added up: count, mean, and scatter about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np
import numpy.typing as npt

from srfed.errors import UserError

_ROUNDING = 1e-5
"""Of features, float32, and of what is made of them; relative."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """How many feature vectors there are, their mean, and their scatter about that mean.

    Centred, unlike sums of squares, the statistics keep float64's full precision when they are
    added up.

    Attributes:
        count: n ≥ 1.
        mean: float64 (D,).
        scatter: float64 (D, D), Σ (f - mean)(f - mean)ᵀ.

    Raises:
        ValueError: shapes, dtypes or count are impossible, or a value is not finite.
    """

    count: int
    mean: npt.NDArray[np.float64]
    scatter: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.mean.ndim != 1 or self.scatter.shape != self.mean.shape * 2:
            raise ValueError(
                f"need mean (D,) and scatter (D, D), got {self.mean.shape} and {self.scatter.shape}"
            )
        if self.mean.dtype != np.float64 or self.scatter.dtype != np.float64:
            raise ValueError(f"need float64, got {self.mean.dtype} and {self.scatter.dtype}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scatter).all()):
            raise ValueError("the statistics have values that are not finite")

    @classmethod
    def of(cls, features: npt.NDArray[np.floating]) -> Self:
        """Statistics of features, float N x D with N ≥ 1; raises ValueError as the class does."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"need features N x D with N of at least 1, got {features.shape}")
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def check_possible(self, highest: float) -> None:
        """Raise ValueError unless there are as many vectors, with values from 0 to ``highest``,
        that have these statistics, to rounding: such means, a scatter that is symmetric and
        semidefinite, and no wider than values between these ends can lie.
        """
        count, mean, scatter = self.count, self.mean, self.scatter
        top = highest * (1 + _ROUNDING)
        if float(mean.min()) < 0 or float(mean.max()) > top:
            raise ValueError(
                f"mean has values from {mean.min():.3g} to {mean.max():.3g}, where features are "
                f"from 0 to {highest:.3g}"
            )
        spread = scatter.diagonal()
        # Bhatia and Davis 2000: a variance is at most (highest - mean)(mean - lowest).
        widest = count * (top - mean) * mean * (1 + _ROUNDING)
        if (spread < 0).any() or (spread > widest).any():
            raise ValueError(f"scatter is none of values from 0 to {highest:.3g}")
        trace = float(spread.sum())
        if not np.allclose(scatter, scatter.T):
            raise ValueError("scatter is none: it is not symmetric")
        if trace == 0:
            definite = not scatter.any()
        else:
            try:
                np.linalg.cholesky(scatter + _ROUNDING * trace * np.eye(len(mean)))
                definite = True
            except np.linalg.LinAlgError:
                definite = False
        if not definite:
            raise ValueError("scatter is none: it has a negative eigenvalue")

    def counted_as(self, count: int) -> "FeatureStatistics":
        """Statistics of ``count`` images, at least 2, with the mean and covariance of these; raises
        UserError where these are of one image.
        """
        if count == self.count:
            return self
        return FeatureStatistics(count, self.mean, self.covariance * (count - 1))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Statistics of both sets together (Chan, Golub and LeVeque 1979, eq. 2.1).

        Raises:
            UserError: the two have features of different dimensions.
        """
        check_dimensions(self, other)
        count = self.count + other.count
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(
            count,
            self.mean + difference * (other.count / count),
            self.scatter + other.scatter + between,
        )

    def of_repeated_channels(self, times: int) -> "FeatureStatistics":
        """Statistics of the same images with their channels repeated, where each channel has its
        features one after the other: what grey images are as RGB, for 3 times.
        """
        return FeatureStatistics(
            self.count, np.tile(self.mean, times), np.tile(self.scatter, (times, times))
        )

    @property
    def covariance(self) -> npt.NDArray[np.float64]:
        """float64 (D, D), unbiased: scatter / (n - 1); raises UserError where n = 1."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def merge_statistics(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """Statistics of all parts together, equal to those of the whole in any order, to float64's
    rounding; of grey images as RGB where some are RGB.

    Raises:
        UserError: the dimensions of the parts' features are no multiples of each other.
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("there are no statistics to merge")
    most = max(len(part.mean) for part in parts)
    return reduce(
        FeatureStatistics.merge,
        [
            part
            if len(part.mean) == most or most % len(part.mean)
            else part.of_repeated_channels(most // len(part.mean))
            for part in parts
        ],
    )


def repeat_channels(groups: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """All features, N x D each, as one set: those of grey images as of RGB where some are RGB."""
    most = max(group.shape[1] for group in groups)
    return np.concatenate([np.tile(group, (1, most // group.shape[1])) for group in groups])


def check_dimensions(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Raise UserError unless both have features of the same dimension."""
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features of dimension {len(first.mean)} and {len(second.mean)} cannot be compared: "
            "both sets must come from one network and have one number of channels"
        )

"""The Fréchet distance of two sets of features, from statistics that can be added up.

Heusel et al. 2017 (arXiv:1706.08500), eq. (6): d² = |μ_1 - μ_2|² + tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½),
the distance between the Gaussians with the features' means and covariances. On features of the
2015-12-05 Inception it is the FID; on any other network's it has another name.
"""

import numpy as np

from srfed.evaluation.features.statistics import FeatureStatistics, check_dimensions


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians, as every FID is reported.

    tr (Σ_1 Σ_2)^½ is the sum of the square roots of the eigenvalues of Σ_1^½ Σ_2 Σ_1^½, which is
    symmetric and positive semidefinite whatever the ranks; negative eigenvalues are rounding, and
    count as 0.

    Args:
        first, second: statistics of features of one and the same network.

    Returns:
        The distance, finite and at least 0.

    Raises:
        UserError: a side has fewer than 2 images, or the dimensions differ.
    """
    check_dimensions(first, second)
    covariance_1, covariance_2 = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ covariance_2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    root_trace = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = first.mean - second.mean
    distance = (
        difference @ difference + np.trace(covariance_1) + np.trace(covariance_2) - 2 * root_trace
    )
    return max(0.0, float(distance))

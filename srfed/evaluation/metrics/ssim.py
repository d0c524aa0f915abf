"""Structural similarity of two images, with every choice fixed, since each of them changes the
number.

Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", eq.
(13): Gaussian window of 11 with σ = 1.5, weighted (population) variances, K_1 = 0.01, K_2 = 0.03,
data range 1, only windows that lie inside the image, mean over windows and channels. scikit-image
gives the same with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1``.
"""

import torch
import torch.nn.functional as F

from srfed.errors import UserError

WINDOW = 11
SIGMA = 1.5
C_1 = 0.01**2
C_2 = 0.03**2


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair of images.

    Args:
        first, second: float N x C x H x W in [0, 1].

    Returns:
        float64 (N,) in [-1, 1] on the images' device; 1 for equal images.

    Raises:
        ValueError: shapes differ, dtypes are not float, or values are outside of [0, 1] or NaN.
        UserError: the images are smaller than 3 pixels.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"need two batches N x C x H x W, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    for images in (first, second):
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("need float images in [0, 1]")
    count, _, height, width = first.shape
    size = ssim_window(height, width)
    offsets = torch.arange(size, dtype=torch.float64, device=first.device) - size // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def average(values: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(values, weights.view(1, 1, size, 1))
        return F.conv2d(rows, weights.view(1, 1, 1, size))

    x, y = (images.double().reshape(-1, 1, height, width) for images in (first, second))
    mean_x, mean_y = average(x), average(y)
    variance_x = average(x * x) - mean_x**2
    variance_y = average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C_1) / (mean_x**2 + mean_y**2 + C_1)
    contrast_structure = (2 * covariance + C_2) / (variance_x + variance_y + C_2)
    return (luminance * contrast_structure).reshape(count, -1).mean(dim=1)


def ssim_window(height: int, width: int) -> int:
    """Side of the Gaussian window: 11, or the largest odd number that fits a smaller image (8x8
    takes 7).

    σ stays 1.5 and the weights sum to 1 whatever the side. Scores of windows of different sides are
    different numbers: report the side with the score.

    Raises:
        UserError: a side is below 3 pixels, where there is no structure to compare.
    """
    side = min(height, width)
    if side < 3:
        raise UserError(f"SSIM needs images of at least 3 pixels a side, got {height}x{width}")
    return min(WINDOW, side - (side + 1) % 2)

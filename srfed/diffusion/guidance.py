"""Guidance: samples of a task, led away from what would be drawn for nobody in particular (Ho &
Salimans 2022).

The guide is no model that was trained to be one, but a worse one of the same core, as in Karras et
al. 2024.
"""

from torch import Tensor

from srfed.diffusion.process import Denoiser


class TaskDenoiser:
    """E[x_0 | x_t] of one task, as a :data:`~srfed.diffusion.process.Denoiser`, which knows its
    guide too.

    Args:
        task: E[x_0 | x_t] of the task.
        nobody: what the same core makes of x_t for nobody; asked where samples are guided, and
            nowhere else.
    """

    def __init__(self, task: Denoiser, nobody: Denoiser) -> None:
        self._task, self._nobody = task, nobody

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        """The task's alone."""
        return self._task(x, times)

    def guided(self, weight: float) -> Denoiser:
        """D(x; θ_i) + w (D(x; θ_i) - D(x; 0)), for twice the forward passes."""

        def denoise(x: Tensor, times: Tensor) -> Tensor:
            image = self._task(x, times)
            return image + weight * (image - self._nobody(x, times))

        return denoise


def guided(denoiser: Denoiser, weight: float) -> Denoiser:
    """The denoiser that samples are drawn with; at weight 0 the one that was given.

    Raises:
        ValueError: the weight is not 0, and the denoiser has no guide.
    """
    if not weight:
        return denoiser
    if not isinstance(denoiser, TaskDenoiser):
        raise ValueError(
            f"guidance {weight} needs a TaskDenoiser, which knows its guide, not a "
            f"{type(denoiser).__name__}; allowed: 0"
        )
    return denoiser.guided(weight)

"""What a network learns to predict, and what its prediction says of x_0."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from srfed.diffusion.process import Denoiser, Forward, Process


class Objective(ABC):
    """A training target with the forward process that it is for.

    Samplers and scores see the :data:`~srfed.diffusion.process.Denoiser` alone, so a new target is
    one class, and ``srfed/config/choices.py`` names it. Its constructor takes a schedule, a device,
    and of the section ``diffusion`` the settings whose names it has.

    Attributes:
        process: x_t = signal(t) x_0 + noise(t) ε.
    """

    process: Process

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times to train at, (count,), of the process's type, on the generator's device."""

    @abstractmethod
    def loss(self, forward: Forward, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The loss of each image: for noise prediction L of eq. (7).

        The mean over a task's batch estimates eq. (7); the mean of that over tasks, eq. (8).

        Args:
            forward: the network, for task i (φ, θ_i); may compute in 16 bits.
            images: x_0, (N, C, H, W), floating point, scaled to [-1, 1].
            times: the time of each image, (N,).
            noise: ε ~ N(0, I), of the images' shape and type.

        Returns:
            (N,), of the wider of the noise's and the prediction's type, differentiable in the
            network's parameters.

        Raises:
            ValueError: as :meth:`~srfed.diffusion.process.Process.add_noise`, or the prediction has
                another shape than the noise.
        """

    @abstractmethod
    def denoiser(self, forward: Forward) -> Denoiser:
        """E[x_0 | x_t] as the network's prediction has it, of x_t's type."""


def mean_squared_error(target: Tensor, predicted: Tensor) -> Tensor:
    """Over all values of each image: (N, C, H, W) twice -> (N,); raises ValueError where the shapes
    differ.
    """
    check_prediction(predicted, target)
    return (target - predicted).square().mean(dim=(1, 2, 3))


def check_prediction(predicted: Tensor, expected: Tensor) -> None:
    """Raise ``ValueError`` unless a prediction has the expected shape (broadcasting would hide
    it).
    """
    if predicted.shape != expected.shape:
        raise ValueError(
            f"the network returned {tuple(predicted.shape)} for images of {tuple(expected.shape)}; "
            "the shapes must be equal"
        )

"""The forward process, eq. (3), and the training loss, eq. (7)-(8)."""

from collections.abc import Callable

import torch
from torch import Tensor

from srfed.diffusion.schedule import NoiseSchedule

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""ε_ψ of eq. (6): (x_t (N, C, H, W), t long (N,) in 1..T) -> predicted noise (N, C, H, W)."""


class Diffusion:
    """Forward process and loss of one schedule on one device.

    The coefficients of eq. (3) are computed in float64, cast once to float32 and kept on the
    device, so that a training step neither copies tables nor waits for the device.

    Args:
        schedule: the β_t.
        device: where the images will be.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> None:
        self.schedule = schedule
        # Row t holds timestep t: row 0 is x_0 itself, ᾱ_0 = 1.
        alpha_bars = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bars])
        self._signal = alpha_bars.sqrt().to(device, torch.float32)
        self._noise = (1 - alpha_bars).sqrt().to(device, torch.float32)

    @property
    def timesteps(self) -> int:
        """T, the length of the diffusion."""
        return self.schedule.timesteps

    @property
    def device(self) -> torch.device:
        """Where the tables are, and so the images have to be."""
        return self._signal.device

    def add_noise(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Diffuse images to their timesteps, eq. (3).

        Args:
            images: x_0, (N, C, H, W), floating point, scaled to [-1, 1].
            timesteps: t of each image, long (N,), in 1..T.
            noise: ε ~ N(0, I), of the images' shape and type.

        Returns:
            x_t, of the images' shape and type.

        Raises:
            ValueError: a shape, type or device does not fit, or (seen on the CPU only, elsewhere
                the check would wait for the device) a timestep is outside 1..T.
        """
        self._check(images, timesteps, noise)
        signal = self._signal[timesteps].view(-1, 1, 1, 1).to(images.dtype)
        spread = self._noise[timesteps].view(-1, 1, 1, 1).to(images.dtype)
        return signal * images + spread * noise  # x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε   (3)

    def loss_per_image(
        self, predict_noise: PredictNoise, images: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared error between ε and its prediction, for each image: L of eq. (7).

        The mean over a task's batch estimates eq. (7); the mean of that over tasks, eq. (8).

        Args:
            predict_noise: ε_ψ, for task i the network (φ, θ_i); may compute in 16 bits.
            images: x_0, (N, C, H, W), floating point, scaled to [-1, 1].
            timesteps: t of each image, long (N,), in 1..T.
            noise: ε ~ N(0, I), of the images' shape and type.

        Returns:
            (N,), of the wider of the noise's and the prediction's type, differentiable in the
            network's parameters.

        Raises:
            ValueError: as :meth:`add_noise`, or the prediction has another shape than the noise.
        """
        predicted = predict_noise(self.add_noise(images, timesteps, noise), timesteps)
        check_prediction(predicted, noise)
        return (
            (noise - predicted).square().mean(dim=(1, 2, 3))
        )  # L(ε, ε_ψ(x_t, t)) = mean (ε - ε_ψ)²   (7)

    def _check(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> None:
        check_images("images", images, self.device)
        if (
            noise.shape != images.shape
            or noise.dtype != images.dtype
            or noise.device != images.device
        ):
            raise ValueError(
                f"noise is {tuple(noise.shape)} {noise.dtype} on {noise.device}; it must be as the "
                f"images, {tuple(images.shape)} {images.dtype} on {images.device}"
            )
        if timesteps.shape != images.shape[:1] or timesteps.dtype != torch.long:
            raise ValueError(
                f"timesteps is {tuple(timesteps.shape)} {timesteps.dtype}; it must be one "
                f"torch.int64 for each of the {len(images)} images"
            )
        if timesteps.device != images.device:
            raise ValueError(f"timesteps is on {timesteps.device}, the images on {images.device}")
        if timesteps.device.type == "cpu" and bool(
            ((timesteps < 1) | (timesteps > self.timesteps)).any()
        ):
            raise ValueError(
                f"timesteps run from {int(timesteps.min())} to {int(timesteps.max())}; they must "
                f"lie in 1..{self.timesteps}"
            )


def check_images(name: str, images: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``images`` is (N, C, H, W), floating point and on the device."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} is {tuple(images.shape)} {images.dtype}; it must be N x C x H x W in floating "
            "point, scaled to [-1, 1]"
        )
    if images.device != device:
        raise ValueError(f"{name} is on {images.device}, the diffusion on {device}")


def check_prediction(predicted: Tensor, noise: Tensor) -> None:
    """Raise ``ValueError`` unless the predicted noise has the noise's shape (broadcasting would
    hide it).
    """
    if predicted.shape != noise.shape:
        raise ValueError(
            f"predict_noise returned {tuple(predicted.shape)} for images of {tuple(noise.shape)}; "
            "the shapes must be equal"
        )

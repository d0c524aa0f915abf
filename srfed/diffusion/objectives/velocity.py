"""Velocity prediction (Salimans & Ho 2022, section 4 and appendix D)."""

import torch
from torch import Tensor

from srfed.diffusion.objective import Objective, check_prediction, mean_squared_error
from srfed.diffusion.process import Denoiser, Forward, VariancePreserving
from srfed.diffusion.schedule import NoiseSchedule


class VelocityPrediction(Objective):
    """The network predicts v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0, which is ε near the image and -x_0
    near noise; every timestep is drawn as often as any other.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", /) -> None:
        self.process: VariancePreserving = VariancePreserving(schedule, device)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, self.process.timesteps + 1, (count,), generator=generator)

    def loss(self, forward: Forward, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        predicted = forward(self.process.add_noise(images, times, noise), times)
        signal, spread = self.process.coefficients(times, images)
        return mean_squared_error(signal * noise - spread * images, predicted)

    def denoiser(self, forward: Forward) -> Denoiser:
        def denoise(x: Tensor, times: Tensor) -> Tensor:
            velocity = forward(x, times)
            check_prediction(velocity, x)
            signal, spread = self.process.coefficients(times, x)
            # signal² + noise² = 1, so signal x_t - noise v = x_0.
            return signal * x - spread * velocity.to(x.dtype)

        return denoise

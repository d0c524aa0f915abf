"""The paper's objective: the network predicts ε, eq. (7)-(8)."""

import torch
from torch import Tensor

from srfed.diffusion.objective import Objective, check_prediction, mean_squared_error
from srfed.diffusion.process import Denoiser, Forward, VariancePreserving
from srfed.diffusion.schedule import NoiseSchedule


class NoisePrediction(Objective):
    """ε_ψ(x_t, t) of DDPM (Ho et al. 2020); every timestep is drawn as often as any other."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", /) -> None:
        self.process: VariancePreserving = VariancePreserving(schedule, device)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, self.process.timesteps + 1, (count,), generator=generator)

    def loss(self, forward: Forward, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        predicted = forward(self.process.add_noise(images, times, noise), times)
        # L(ε, ε_ψ(x_t, t)) = mean (ε - ε_ψ)²   (7)
        return mean_squared_error(noise, predicted)

    def denoiser(self, forward: Forward) -> Denoiser:
        def denoise(x: Tensor, times: Tensor) -> Tensor:
            noise = forward(x, times)
            check_prediction(noise, x)
            signal, spread = self.process.coefficients(times, x)
            # Eq. (3) solved for x_0. The prediction is widened before any arithmetic: 16 bits times
            # a number would be rounded to 16 bits again.
            return (x - spread * noise.to(x.dtype)) / signal

        return denoise

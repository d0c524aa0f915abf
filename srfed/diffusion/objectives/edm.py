"""EDM: a preconditioned denoiser with its own draw of noise levels (Karras et al. 2022, table
1).
"""

import torch
from torch import Tensor

from srfed.diffusion.objective import Objective, check_prediction, mean_squared_error
from srfed.diffusion.process import Denoiser, Forward, VarianceExploding
from srfed.diffusion.schedule import NoiseSchedule

TIME_SCALE = 1000 / 4
"""c_noise = ln(σ) / 4 as the network is told it: a thousandfold, because its time embedding counts
in timesteps."""


class PreconditionedDenoising(Objective):
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise), trained at ln σ ~ N(mean, deviation²).

    Args:
        schedule: says which σ a timestep of SSIM-rec is, and nothing else.
        device: where the images will be.
        sigma_data: standard deviation of the images' values, in [-1, 1].
        sigma_min, sigma_max, rho: of the sampler's times.
        log_sigma_mean, log_sigma_deviation: of the noise levels in training.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        device: torch.device | str = "cpu",
        /,
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        log_sigma_mean: float = -1.2,
        log_sigma_deviation: float = 1.2,
    ) -> None:
        self.process: VarianceExploding = VarianceExploding(
            schedule, device, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho
        )
        self._data = sigma_data
        self._mean, self._deviation = log_sigma_mean, log_sigma_deviation

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return (self._mean + self._deviation * torch.randn(count, generator=generator)).exp()

    def loss(self, forward: Forward, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """λ(σ) mean (D - x_0)² with λ = 1 / c_out², which is the squared error of F itself."""
        x = self.process.add_noise(images, times, noise)
        skip, out = self._skip_and_out(times, images)
        return mean_squared_error((images - skip * x) / out, self._predict(forward, x, times))

    def denoiser(self, forward: Forward) -> Denoiser:
        def denoise(x: Tensor, times: Tensor) -> Tensor:
            predicted = self._predict(forward, x, times)
            check_prediction(predicted, x)
            skip, out = self._skip_and_out(times, x)
            return skip * x + out * predicted.to(x.dtype)

        return denoise

    def _predict(self, forward: Forward, x: Tensor, times: Tensor) -> Tensor:
        _, sigma = self.process.coefficients(times, x)
        # c_in = 1 / sqrt(σ² + σ_data²)
        return forward(x / (sigma**2 + self._data**2).sqrt(), TIME_SCALE * times.log())

    def _skip_and_out(self, times: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = self.process.coefficients(times, images)
        total = sigma**2 + self._data**2
        # c_skip = σ_data² / (σ² + σ_data²), c_out = σ σ_data / sqrt(σ² + σ_data²)
        return self._data**2 / total, sigma * self._data / total.sqrt()

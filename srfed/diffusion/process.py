"""The forward process, eq. (3): x_t = signal(t) x_0 + noise(t) ε.

What a time is, is the process's own affair: a timestep 1..T, or a noise level σ. Everything that
speaks of timesteps, such as SSIM-rec@t*, asks the process which of its times that is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from srfed.diffusion.schedule import NoiseSchedule

Forward = Callable[[Tensor, Tensor], Tensor]
"""A network: (x (N, C, H, W), time (N,), in units of timesteps) -> (N, C, H, W)."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, C, H, W), times (N,)) -> E[x_0 | x_t] (N, C, H, W): all that samplers and scores see of
a model."""

QUARTERS = 4
"""Parts of the way from image to noise by which losses are told apart."""


class Process(ABC):
    """A forward process on one device.

    Args:
        schedule: the β_t, which say what a timestep is.
        device: where the images will be.
    """

    time_dtype: torch.dtype
    """Of a tensor of times."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> None:
        self.schedule = schedule
        self.device = torch.zeros(0, device=device).device

    @property
    def timesteps(self) -> int:
        """T, the length of the diffusion."""
        return self.schedule.timesteps

    @abstractmethod
    def coefficients(self, times: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) of each image's time, (N, 1, 1, 1), of the images' type."""

    @abstractmethod
    def levels(self, time: float) -> tuple[float, float]:
        """(signal, noise) of one time, in float64; of time 0, (1, 0)."""

    @abstractmethod
    def time_of(self, timestep: int) -> float:
        """The time of a timestep 0..T; its ratio of noise to signal is the schedule's."""

    @abstractmethod
    def path(self, steps: int, from_timestep: int | None = None) -> list[float]:
        """The times that a sampler visits, from that of ``from_timestep`` (None: T) to 0, both
        included: at most ``steps`` steps, and at most ``from_timestep``.
        """

    @abstractmethod
    def start(self, noise: Tensor) -> Tensor:
        """x at the first time of a whole path, from ε ~ N(0, I)."""

    @abstractmethod
    def quarter(self, times: Tensor) -> Tensor:
        """Which quarter of 1..T each time is in: 0 (nearly an image) to 3 (nearly noise), int64."""

    def as_picture(self, x: Tensor, time: float) -> Tensor:
        """x_t as it can be looked at: of the size that noise and images have by themselves."""
        return x

    def add_noise(self, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Diffuse images to their times, eq. (3).

        Args:
            images: x_0, (N, C, H, W), floating point, scaled to [-1, 1].
            times: the time of each image, (N,), of ``time_dtype``.
            noise: ε ~ N(0, I), of the images' shape and type.

        Returns:
            x_t, of the images' shape and type.

        Raises:
            ValueError: a shape, type or device does not fit, or (seen on the CPU only, elsewhere
                the check would wait for the device) a time is outside the process.
        """
        self._check(images, times, noise)
        signal, spread = self.coefficients(times, images)
        return signal * images + spread * noise  # x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε   (3)

    @abstractmethod
    def _check_times(self, times: Tensor) -> None:
        """Raise ValueError where a time, on the CPU, is outside the process."""

    def _check(self, images: Tensor, times: Tensor, noise: Tensor) -> None:
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
        if times.shape != images.shape[:1] or times.dtype != self.time_dtype:
            raise ValueError(
                f"times is {tuple(times.shape)} {times.dtype}; it must be one {self.time_dtype} "
                f"for each of the {len(images)} images"
            )
        if times.device != images.device:
            raise ValueError(f"times is on {times.device}, the images on {images.device}")
        if times.device.type == "cpu":
            self._check_times(times)


class VariancePreserving(Process):
    """DDPM's process (Ho et al. 2020): a time is a timestep t in 1..T, signal sqrt(ᾱ_t), noise
    sqrt(1 - ᾱ_t).

    The coefficients are computed in float64 and kept on the device, so that a training step neither
    copies tables nor waits for the device.
    """

    time_dtype = torch.long

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu") -> None:
        super().__init__(schedule, device)
        # Row t holds timestep t: row 0 is x_0 itself, ᾱ_0 = 1.
        alpha_bars = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bars])
        self._alpha_bars: list[float] = alpha_bars.tolist()
        self._signal = alpha_bars.sqrt().to(self.device)
        self._noise = (1 - alpha_bars).sqrt().to(self.device)

    def coefficients(self, times: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._signal[times].view(-1, 1, 1, 1), self._noise[times].view(-1, 1, 1, 1)
        return signal.to(images.dtype), noise.to(images.dtype)

    def levels(self, time: float) -> tuple[float, float]:
        alpha_bar = self._alpha_bars[int(time)]
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def time_of(self, timestep: int) -> float:
        return timestep

    def path(self, steps: int, from_timestep: int | None = None) -> list[float]:
        """Equal strides, rounded half up."""
        top = check_path(self, steps, from_timestep)
        count = min(steps, top)
        return [(2 * top * (count - i) + count) // (2 * count) for i in range(count + 1)]

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def quarter(self, times: Tensor) -> Tensor:
        return (times - 1) * QUARTERS // self.timesteps

    def _check_times(self, times: Tensor) -> None:
        if bool(((times < 1) | (times > self.timesteps)).any()):
            raise ValueError(
                f"timesteps run from {int(times.min())} to {int(times.max())}; they must lie in "
                f"1..{self.timesteps}"
            )


class VarianceExploding(Process):
    """EDM's process (Karras et al. 2022): a time is the noise level σ itself, x = x_0 + σ ε.

    Args:
        schedule: says which σ stands for a timestep, sqrt((1 - ᾱ_t) / ᾱ_t), and nothing else.
        device: where the images will be.
        sigma_min, sigma_max: σ of the last step before x_0, and of pure noise.
        rho: how the steps between them are spaced; larger takes shorter steps near the image.
    """

    time_dtype = torch.float32

    def __init__(
        self,
        schedule: NoiseSchedule,
        device: torch.device | str = "cpu",
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> None:
        super().__init__(schedule, device)
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        sigmas = ((1 - schedule.alpha_bars) / schedule.alpha_bars).sqrt()
        self._sigmas: list[float] = [0.0, *sigmas.tolist()]
        ends = [self._sigmas[-(-self.timesteps * q // QUARTERS)] for q in range(1, QUARTERS)]
        self._borders = torch.tensor(ends, dtype=torch.float32, device=self.device)

    def coefficients(self, times: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.view(-1, 1, 1, 1).to(images.dtype)
        return torch.ones_like(sigma), sigma

    def levels(self, time: float) -> tuple[float, float]:
        return 1.0, time

    def time_of(self, timestep: int) -> float:
        return self._sigmas[timestep]

    def path(self, steps: int, from_timestep: int | None = None) -> list[float]:
        """σ_i = (a^(1/ρ) + i / (n - 1) (b^(1/ρ) - a^(1/ρ)))^ρ, then 0 (Karras et al., 5)."""
        top = check_path(self, steps, from_timestep)
        first = self.sigma_max if from_timestep is None else self.time_of(top)
        count = min(steps, top)
        if count == 1 or first <= self.sigma_min:
            return [first, 0.0]
        high, low = first ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        inner = [(high + i / (count - 1) * (low - high)) ** self.rho for i in range(1, count)]
        return [first, *inner, 0.0]

    def start(self, noise: Tensor) -> Tensor:
        return self.sigma_max * noise

    def quarter(self, times: Tensor) -> Tensor:
        return torch.bucketize(times, self._borders.to(times.device))

    def as_picture(self, x: Tensor, time: float) -> Tensor:
        return x / math.sqrt(1 + time**2)

    def _check_times(self, times: Tensor) -> None:
        if not bool((times > 0).all()):
            raise ValueError(
                f"noise levels run from {float(times.min()):.3g} to {float(times.max()):.3g}; they "
                "must be above 0"
            )


def check_path(process: Process, steps: int, from_timestep: int | None) -> int:
    """The timestep that a path begins at; raises ValueError where it or the steps are outside
    1..T.
    """
    if not 1 <= steps <= process.timesteps:
        raise ValueError(f"steps {steps} is impossible; it must lie in 1..{process.timesteps}")
    top = process.timesteps if from_timestep is None else from_timestep
    if not 1 <= top <= process.timesteps:
        raise ValueError(
            f"from_timestep {top} is impossible; it must lie in 1..{process.timesteps}"
        )
    return top


def check_images(name: str, images: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``images`` is (N, C, H, W), floating point and on the device."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"{name} is {tuple(images.shape)} {images.dtype}; it must be N x C x H x W in floating "
            "point, scaled to [-1, 1]"
        )
    if images.device != device:
        raise ValueError(f"{name} is on {images.device}, the process on {device}")

"""The forward process, and what the network learns to predict."""

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from srfed.config.choices import OBJECTIVES
from srfed.config.settings import Section, setting

if TYPE_CHECKING:
    PredictionName = str
else:
    PredictionName = OBJECTIVES.names


class DiffusionConfig(Section):
    timesteps: int = setting(500, ge=2, le=10_000, description="T, the length of the diffusion")
    schedule: Literal["linear", "cosine"] = setting("linear", description="how β_t grows")
    beta_start: float = setting(
        1e-4, ge=1e-9, lt=1, description="β_1 of the linear schedule, before scaling"
    )
    beta_end: float = setting(
        0.02, gt=0, lt=1, description="β_T of the linear schedule, before scaling"
    )
    beta_scale: Literal["none", "match_1000"] = setting(
        "match_1000",
        description="match_1000 multiplies the linear β by 1000/T, so that x_T is noise for every "
        "T",
    )
    prediction: PredictionName = setting(
        "noise",
        description="what the network learns to predict: noise is ε, as in the paper; velocity is "
        "v "
        "of Salimans & Ho (2022); edm a preconditioned denoiser with noise levels of its own "
        "(Karras et al. 2022), for which the schedule only says what a timestep of SSIM-rec is",
    )
    sigma_data: float = setting(
        0.5, gt=0, le=10, description="edm: standard deviation of the images' values in [-1, 1]"
    )
    sigma_min: float = setting(
        0.002,
        gt=0,
        le=1,
        decides="scores",
        description="edm: noise level of the sampler's last step before x_0",
    )
    sigma_max: float = setting(
        80.0, gt=1, le=1e4, decides="scores", description="edm: noise level of pure noise"
    )
    rho: float = setting(
        7.0,
        ge=1,
        le=100,
        decides="scores",
        description="edm: larger takes shorter steps near the image",
    )
    log_sigma_mean: float = setting(
        -1.2, ge=-10, le=10, description="edm: mean of ln σ of the noise levels in training"
    )
    log_sigma_deviation: float = setting(
        1.2, gt=0, le=10, description="edm: standard deviation of ln σ in training"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        scale = 1000 / self.timesteps if self.beta_scale == "match_1000" else 1.0
        if self.schedule == "linear" and self.beta_end * scale >= 1:
            raise ValueError(
                f"beta_end {self.beta_end} times 1000/T = {self.beta_end * scale:.3g} reaches 1; "
                "allowed: a larger timesteps, a smaller beta_end, or beta_scale none"
            )
        if self.schedule == "linear":
            shares = [i / (self.timesteps - 1) for i in range(self.timesteps)]
            betas = [
                scale * (self.beta_start * (1 - share) + self.beta_end * share) for share in shares
            ]
            if sum(math.log1p(-beta) for beta in betas) < math.log(1e-30):
                raise ValueError(
                    f"beta_end {self.beta_end} over {self.timesteps} timesteps leaves ᾱ_T below "
                    "1e-30, too little to predict x_0 from; allowed: a smaller beta_end"
                )
        return self

"""The reverse process."""

from typing import Literal

from srfed.config.settings import Section, setting


class SamplingConfig(Section):
    sampler: Literal["ddim", "ancestral"] = setting(
        "ddim", decides="scores", description="DDIM, or Algorithm 2 over all T timesteps"
    )
    steps: int = setting(
        25, ge=1, decides="scores", description="DDIM's steps; ancestral sampling always takes T"
    )
    eta: float = setting(
        1.0,
        ge=0,
        le=1,
        decides="scores",
        description="DDIM's noise: 0 is deterministic, 1 is like ancestral",
    )
    variance: Literal["beta", "posterior"] = setting(
        "beta", decides="scores", description="σ_t² of ancestral sampling: β_t or β̃_t"
    )
    clip: bool = setting(True, decides="scores", description="clamp each predicted x_0 to [-1, 1]")
    batch_size: int = setting(256, ge=1, decides="scores", description="images sampled at once")

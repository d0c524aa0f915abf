"""The reverse process."""

from typing import TYPE_CHECKING, Literal

from srfed.config.choices import SAMPLERS
from srfed.config.settings import Section, setting

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = SAMPLERS.names


MOST_AT_ONCE = 256
PIXELS_AT_ONCE = MOST_AT_ONCE * 48 * 48
"""Of images that are sampled at once, so that large ones take less memory than training does."""


def most_at_once(height: int, width: int) -> int:
    """How many images of this size go through a network at once, where nobody says it."""
    return max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // (height * width)))


class SamplingConfig(Section):
    sampler: SamplerName = setting(
        "ddim",
        decides="scores",
        description="DDIM; Algorithm 2 over all T timesteps (ancestral); or DPM-Solver++ 2M, a "
        "second-order solver without noise of its own",
    )
    steps: int = setting(
        25,
        ge=1,
        decides="scores",
        description="steps of DDIM and DPM-Solver++; ancestral always takes T",
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
    guidance: float = setting(
        0.0,
        ge=0,
        le=10,
        decides="scores",
        description="w of x_0 = D(x_t; θ_i) + w (D(x_t; θ_i) - D(x_t; 0)), for generated images "
        "alone: away from what is drawn with zeros for all that is a task's own (model.owned); "
        "0: none, and no second forward pass",
    )
    batch_size: int | None = setting(
        None,
        ge=1,
        decides="nothing",
        description="images sampled at once, which decides no image; null: 256 of up to 48 px, and "
        "of larger ones as many as have so many pixels. Half as many where memory is short",
    )

    def images_at_once(self, height: int, width: int) -> int:
        """How many images of this size are sampled at once."""
        return self.batch_size or most_at_once(height, width)

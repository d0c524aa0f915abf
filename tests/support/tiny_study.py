"""The smallest study of owners that join, or come later."""

from typing import Any

from srfed.config import RunConfig
from srfed.studies.cases import change
from srfed.studies.joining import COMMON


def tiny_base(rounds: int = 2, **changes: Any) -> RunConfig:
    """What all sides have in common: three digits, a few thousand weights, three steps a round."""
    return change(
        change(RunConfig(), **COMMON),
        data__images_per_task=16,
        data__validation_images=4,
        data__image_size=8,
        model__channels=(8, 16, 16, 16),
        model__groups=4,
        training__local_steps=3,
        federation__clients=3,
        federation__rounds=rounds,
        sampling__steps=4,
        evaluation__samples=6,
        evaluation__samples_between=6,
        evaluation__ssim_timestep=5,
        evaluation__ssim_curve=(5,),
        resources__device="cpu",
        **changes,
    )

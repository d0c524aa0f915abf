"""What is measured, how often, and on how many images."""

from typing import Annotated, Literal

from pydantic import Field

from srfed.config.settings import Section, setting


class EvaluationConfig(Section):
    mode: Literal["samples", "statistics"] = setting(
        "samples",
        decides="scores",
        description="samples: generated images go to the server, which scores them; statistics: "
        "each "
        "client sends mean and scatter of their features and of its own images' features, and no "
        "image leaves it",
    )
    clients: int | None = setting(
        None,
        ge=1,
        decides="scores",
        description="clients drawn for an evaluation; null takes all of them",
    )
    every: int = setting(
        10,
        ge=0,
        decides="scores",
        description="rounds between evaluations; 0 evaluates at the end only",
    )
    samples: int = setting(
        1000,
        ge=2,
        decides="scores",
        description="generated images scored at the end, in equal shares of the clients that are "
        "asked, rounded up",
    )
    samples_between: int = setting(
        200,
        ge=2,
        decides="scores",
        description="generated images scored at evaluations before the end",
    )
    feature_network: Literal["embedded", "inception"] = setting(
        "embedded",
        decides="scores",
        description="network whose features are compared; `inception` gives the standard FID",
    )
    inception_weights: str = setting(
        "",
        decides="nothing",
        description="file with the 2015-12-05 Inception weights; empty downloads and verifies them "
        "on first use",
    )
    ssim_images: int = setting(
        16,
        ge=0,
        decides="scores",
        description="test images a client reconstructs for SSIM; 0 switches it off",
    )
    ssim_timestep: int = setting(
        50, ge=1, decides="scores", description="t*, the timestep of the headline SSIM-rec@t*"
    )
    ssim_curve: tuple[Annotated[int, Field(ge=1)], ...] = setting(
        (10, 25, 50, 100),
        decides="scores",
        description="timesteps of the SSIM-rec curve, measured at the end",
    )
    ssim_steps: int | None = setting(
        4,
        ge=1,
        decides="scores",
        description="steps of DDIM without noise, at most t*, in which SSIM-rec takes images back, "
        "from all timesteps in one batch; null takes Algorithm 2, as the paper does",
    )
    memorisation_quantile: float = setting(
        0.05,
        ge=0,
        lt=0.5,
        decides="scores",
        description="q of the memorisation audit at the last evaluation: how many held-out images "
        "may be closer to a training image; 0 switches it off",
    )
    grid_columns: int = setting(
        12, ge=1, le=100, decides="nothing", description="samples a task in the pictures"
    )
    strip_steps: int = setting(
        11,
        ge=2,
        le=101,
        decides="nothing",
        description="pictures in a reverse-process strip, x_T to x_0",
    )


def strip_timesteps(timesteps: int, steps: int) -> list[int]:
    """The timesteps of a strip of ``steps`` pictures: T first, 0 last, evenly spaced; none where
    steps is below 2.
    """
    return [round(timesteps * (1 - k / (steps - 1))) for k in range(steps)] if steps > 1 else []

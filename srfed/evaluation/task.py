"""One task's part of an evaluation: what its owner generates, and how well its test images come
back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from srfed.config import RunConfig
from srfed.data import to_model_range
from srfed.data.images import Images
from srfed.diffusion.process import Denoiser, Process
from srfed.errors import UserError
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.generation import Generated, generate
from srfed.evaluation.metrics.memorisation import Audit, audit
from srfed.evaluation.metrics.reconstruction import ssim_of_reconstructions
from srfed.evaluation.metrics.ssim import ssim_window


@dataclass(frozen=True, eq=False)
class TaskEvaluation:
    """What one task contributes.

    Attributes:
        generated: its share of the samples.
        ssim: SSIM-rec by timestep; empty where there is no test image to judge.
        ssim_images: test images judged.
        ssim_window: side of the SSIM window, px.
        audit: the memorisation audit, with the embedded network's features; None where there is
            none.
        no_audit: why there is none although it was asked for; otherwise empty.
    """

    generated: Generated
    ssim: dict[int, float]
    ssim_images: int
    ssim_window: int
    audit: Audit | None
    no_audit: str


def generate_share(
    denoiser: Denoiser,
    process: Process,
    config: RunConfig,
    *,
    task: str,
    shape: tuple[int, ...],
    samples: int,
    give_back: Callable[[], None] | None = None,
) -> Generated:
    """A task's share of the run's samples, of this shape; ``give_back`` and what is raised as of
    :func:`~srfed.evaluation.generation.generate`.
    """
    return generate(
        denoiser,
        process,
        config.sampling,
        count=samples,
        shape=shape,
        seed=config.seed,
        task=task,
        strip_steps=config.evaluation.strip_steps,
        give_back=give_back,
    )


def evaluate_task(
    denoiser: Denoiser,
    process: Process,
    config: RunConfig,
    *,
    task: str,
    train: Images,
    test: Images,
    generated: Generated,
    final: bool,
) -> TaskEvaluation:
    """Measure SSIM-rec on a task's own test images, and how close its samples come to its images.

    Args:
        denoiser: E[x_0 | x_t] of (φ, θ_i), averaged, in evaluation mode.
        process: the forward process.
        config: the run's configuration.
        task: the task's name, part of every seed.
        train: the task's training images, uint8 N x H x W x C.
        test: held-out images, likewise; N may be 0.
        generated: its share of the samples.
        final: measure the whole SSIM-rec curve, not only t*, and audit for memorisation.
    """
    judged = test[: config.evaluation.ssim_images]
    timesteps = {config.evaluation.ssim_timestep, *(config.evaluation.ssim_curve if final else ())}
    found, reason = (
        _audit(config, generated.images, train, test, process.device) if final else (None, "")
    )
    return TaskEvaluation(
        generated,
        ssim_curve(
            denoiser,
            process,
            config,
            task=task,
            images=judged,
            timesteps=sorted(timesteps),
            steps=config.evaluation.ssim_steps,
        ),
        len(judged),
        ssim_window(*test.shape[1:3]),
        found,
        reason,
    )


def _audit(
    config: RunConfig, generated: Images, train: Images, test: Images, device: torch.device
) -> tuple[Audit | None, str]:
    """The audit; or why it cannot be made, which is no reason to withhold the samples."""
    quantile = config.evaluation.memorisation_quantile
    if not quantile:
        return None, ""
    try:
        # Always the network that everybody has: a client of a run that is scored with another need
        # not load that.
        return audit(generated, train, test, EmbeddedFeatures(device), quantile=quantile), ""
    except UserError as error:
        return None, str(error)


def ssim_curve(
    denoiser: Denoiser,
    process: Process,
    config: RunConfig,
    *,
    task: str,
    images: Images,
    timesteps: list[int],
    steps: int | None,
) -> dict[int, float]:
    """SSIM-rec of test images (uint8 N x H x W x C) by timestep, in so many steps or by Algorithm
    2; nothing where there is no image.
    """
    if not len(images):
        return {}
    return ssim_of_reconstructions(
        denoiser,
        process,
        to_model_range(images).to(process.device),
        timesteps,
        steps=steps,
        variance=config.sampling.variance,
        batch_size=config.sampling.images_at_once(*images.shape[1:3]),
        seed=config.seed,
        task=task,
    )

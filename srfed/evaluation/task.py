"""One task's part of an evaluation: what its owner generates, and how well its test images come back."""

from dataclasses import dataclass

from srfed.config import RunConfig
from srfed.data import to_model_range
from srfed.data.images import Images
from srfed.diffusion.process import Diffusion, PredictNoise
from srfed.evaluation.generation import Generated, generate
from srfed.evaluation.reconstruction import ssim_of_reconstructions
from srfed.evaluation.ssim import ssim_window


@dataclass(frozen=True, eq=False)
class TaskEvaluation:
    """What one task contributes.

    Attributes:
        generated: its share of the samples.
        ssim: SSIM-rec by timestep; empty where there is no test image to judge.
        ssim_images: test images judged.
        ssim_window: side of the SSIM window, px.
    """

    generated: Generated
    ssim: dict[int, float]
    ssim_images: int
    ssim_window: int


def evaluate_task(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    config: RunConfig,
    *,
    task: str,
    test: Images,
    samples: int,
    final: bool,
) -> TaskEvaluation:
    """Generate a task's share of the samples, and measure SSIM-rec on its own test images.

    Args:
        predict_noise: ε of (φ, θ_i), averaged, in evaluation mode.
        diffusion: the forward process.
        config: the run's configuration.
        task: the task's name, part of every seed.
        test: held-out images, uint8 N x H x W x C; N may be 0.
        samples: images to generate.
        final: measure the whole SSIM-rec curve, not only t*.
    """
    generated = generate(
        predict_noise,
        diffusion,
        config.sampling,
        count=samples,
        shape=test.shape[1:],
        seed=config.seed,
        task=task,
        strip_steps=config.evaluation.strip_steps,
    )
    judged = test[: config.evaluation.ssim_images]
    timesteps = {config.evaluation.ssim_timestep, *(config.evaluation.ssim_curve if final else ())}
    return TaskEvaluation(
        generated,
        ssim_curve(predict_noise, diffusion, config, task=task, images=judged, timesteps=sorted(timesteps)),
        len(judged),
        ssim_window(*test.shape[1:3]),
    )


def ssim_curve(
    predict_noise: PredictNoise,
    diffusion: Diffusion,
    config: RunConfig,
    *,
    task: str,
    images: Images,
    timesteps: list[int],
) -> dict[int, float]:
    """SSIM-rec of test images (uint8 N x H x W x C) by timestep; nothing where there is no image."""
    if not len(images):
        return {}
    return {
        timestep: ssim_of_reconstructions(
            predict_noise,
            diffusion,
            to_model_range(images).to(diffusion.device),
            timestep,
            variance=config.sampling.variance,
            seed=config.seed,
            task=task,
        )
        for timestep in timesteps
    }

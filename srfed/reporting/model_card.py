"""The card of an exported model: what it is, how it is used, what it scored."""

from collections.abc import Mapping, Sequence
from typing import Any

from srfed import __version__
from srfed.config import RunConfig
from srfed.config.model import exclusive_in_words
from srfed.records import Shape, TaskInfo, ssim_name
from srfed.reporting.joining import VERDICTS
from srfed.reporting.summary import comparisons_of
from srfed.storage.metrics_log import Line

FRONT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- srfed
- federated-learning
- diffusion
---
"""
USE = """## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)
images = pipe({call}).images
```

`trust_remote_code` is for `unet/srfed_unet.py`, the network's own code: it imports torch and
diffusers alone, and can be read first. It needs diffusers 0.35 or newer, and no srfed.
"""
WARNING = """## Before it is passed on

Whoever has these weights can draw images like the owner's, and a model of few images can give some
of them back. """


def model_card(
    config: RunConfig,
    task: TaskInfo,
    shape: Shape,
    weights_round: int,
    *,
    lineage: str | None,
    owners: int | None,
    evaluation: Line | None,
) -> str:
    """The card of one owner's model, as Markdown with what a hub reads at its head.

    Args:
        config: of the run.
        task: the owner's.
        shape: H, W, C of its images.
        weights_round: the round of the weights.
        lineage: of the run; None where it is not known.
        owners: how many took part; None likewise.
        evaluation: the run's last, as metrics.jsonl has it; None where there is none here.
    """
    scores = _scores(task, evaluation)
    return "\n".join(
        [
            FRONT,
            f"# {config.name}: {task.task}\n",
            "A denoising diffusion model of one owner's images, trained with srfed.\n",
            *_facts(config, task, shape, weights_round, lineage, owners),
            "",
            USE.format(call=call_in_words(config)),
            *_differences(config),
            "## Scores\n",
            *(
                [*scores, "", *_rests_on(evaluation, weights_round), ""]
                if evaluation is not None and scores
                else ["None are known where it was exported.\n"]
            ),
            WARNING + _audit(task, evaluation),
            "",
        ]
    )


def call_in_words(config: RunConfig, images: int = 16) -> str:
    """The arguments with which diffusers' pipeline draws as the run does."""
    sampling, timesteps = config.sampling, config.diffusion.timesteps
    if sampling.sampler == "ancestral":
        return f"batch_size={images}, num_inference_steps={timesteps}"
    eta = sampling.eta if sampling.sampler == "ddim" else 0.0
    return (
        f"batch_size={images}, num_inference_steps={pipeline_steps(config)}, eta={eta}, "
        "use_clipped_model_output=True"
    )


def pipeline_steps(config: RunConfig) -> int:
    """The number of steps nearest to the run's that divides T: diffusers' DDIM takes strides of
    whole timesteps, and goes wrong at the end with any other.
    """
    timesteps = config.diffusion.timesteps
    divisors = (count for count in range(1, timesteps + 1) if timesteps % count == 0)
    return min(divisors, key=lambda count: abs(count - config.sampling.steps))


def _facts(
    config: RunConfig,
    task: TaskInfo,
    shape: Shape,
    weights_round: int,
    lineage: str | None,
    owners: int | None,
) -> list[str]:
    height, width, channels = shape
    training, model = config.training, config.model
    how = "a federation" if training.method == "federated" else f"{training.method}, centralised"
    facts = {
        "owner": task.task
        + (
            f", {task.images:,} training and {task.test_images:,} held-out images"
            * bool(task.images)
        ),
        "images": f"{height} x {width} px, {channels} channel{'s' * (channels > 1)}",
        "training": how
        + ("" if owners is None else f" of {owners} owner{'s' * (owners > 1)}")
        + f", {config.federation.rounds} rounds asked for",
        "partition": exclusive_in_words(model.exclusive_stages, model.owned),
        "holds": "φ, which all owners have trained, and this owner's own θ; no other owner's",
        "weights": f"moving averages after round {weights_round}",
        "predicts": f"{config.diffusion.prediction}, T = {config.diffusion.timesteps}",
        "seed": str(config.seed),
        "run": ", ".join(
            [
                *([] if lineage is None else [f"lineage {lineage}"]),
                f"configuration {config.fingerprint()[:12]}",
            ]
        ),
        "exported by": f"srfed {__version__}",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _differences(config: RunConfig) -> list[str]:
    """Where the pipeline draws otherwise than the run."""
    sampling, notes = config.sampling, []
    if sampling.sampler == "dpm_solver":
        notes.append("The run draws with DPM-Solver++, this pipeline with DDIM.")
    if sampling.sampler != "ancestral" and pipeline_steps(config) != sampling.steps:
        notes.append(
            f"The run draws in {sampling.steps} steps; diffusers needs a number that divides T = "
            f"{config.diffusion.timesteps}."
        )
    if sampling.guidance:
        notes.append(
            f"The run's samples are guided (weight {sampling.guidance:g}); this pipeline's are not."
        )
    return [f"{note}\n" for note in notes]


def _scores(task: TaskInfo, evaluation: Line | None) -> list[str]:
    """A table: what was measured, of this owner, of all."""
    if evaluation is None or task.client not in evaluation["score_by_client"]:
        return []
    timestep = evaluation["ssim_timestep"]
    rows: list[tuple[str, Any, Any]] = [
        (
            f"{evaluation['score_name']} (0 is best)",
            evaluation["score_by_client"][task.client],
            evaluation["score"],
        ),
        (
            f"{ssim_name(timestep, evaluation.get('ssim_steps'))} (1 is best)",
            evaluation["ssim_by_client"].get(task.client),
            evaluation["ssim"].get(str(timestep)),
        ),
        (
            "recognised as its own",
            evaluation.get("recognised_by_client", {}).get(task.client),
            evaluation.get("recognised"),
        ),
    ]
    table = [
        f"| {name} | {_number(own)} | {_number(everybody)} |"
        for name, own, everybody in rows
        if own is not None
    ]
    if compared := comparisons_of([task], evaluation).get(task.task):
        table.append(
            f"| held-out loss alone / together (95%): {VERDICTS[compared.verdict]} | "
            f"{compared.ratio:.3f} ({compared.low:.3f} to {compared.high:.3f}) | – |"
        )
    return ["| score | this owner | all owners |", "|---|---|---|", *table]


def _rests_on(evaluation: Mapping[str, Any], weights_round: int) -> Sequence[str]:
    judged = (evaluation.get("result") or {}).get("round", evaluation["round"])
    floor = evaluation["floor"]
    lines = [
        f"Of {evaluation['samples']} samples of all owners against {evaluation['references']} "
        "held-out images"
        + ("." if floor is None else f"; real training images score {floor:.3f}.")
        + " By owner the distance rests on few images and is biased upwards."
    ]
    if judged != weights_round:
        lines.append(f"These scores are of round {judged}, the weights of round {weights_round}.")
    return lines


def _audit(task: TaskInfo, evaluation: Line | None) -> str:
    found = (evaluation or {}).get("audits", {}).get(task.client)
    if found is None:
        return "Whether this one does was not measured."
    numbers = (
        f"{found['pixels_share']:.1%} (pixels) and {found['features_share']:.1%} (features) of its "
        f"samples are nearer to a training image than {found['pixels_quantile']:.1%} of held-out "
        "images are"
    )
    return (
        f"The run's memorisation audit fires for this one: {numbers}."
        if found["fires"]
        else f"The run's memorisation audit does not fire for this one: {numbers}."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""Scoring a trained run again: its samples, then every score, each kept in the run's folder.

    <run>/evaluations/<key>/samples.safetensors     the generated images, uint8, by task
    <run>/evaluations/<key>/scores.json             everything that was measured on them

The key names all that the result depends on, so a second call finds what the first has left.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srfed.config import SamplingConfig
from srfed.data import ImageRecord, load_recorded_tasks, load_tasks
from srfed.data.images import Images
from srfed.data.record import read_records
from srfed.errors import DamagedError
from srfed.evaluation.features.network import FeatureNetwork
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.memorisation import merge_audits
from srfed.evaluation.metrics.ssim import ssim_window
from srfed.evaluation.scores import ReferenceStatistics, audit_numbers, score_samples
from srfed.evaluation.shares import share_of_samples
from srfed.evaluation.task import ssim_curve
from srfed.files import exists, read_json, try_output, write_json
from srfed.reporting.summary import totals
from srfed.runs.run import TrainedRun
from srfed.storage.checkpoint import read_arrays, write_arrays
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

SAMPLES_FILE = "samples.safetensors"
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class ScoringSettings:
    """What to measure.

    Attributes:
        samples: generated images, shared out equally among the tasks.
        seed: of the samples; with the same one two people get the same digits.
        sampling: how they are drawn.
        ssim_images: test images of each task for SSIM-rec; 0 leaves it out.
        ssim_timesteps: the points of the SSIM-rec curve.
        ssim_steps: in which images are taken back for it; None takes Algorithm 2.
        quantile: of the memorisation audit.
    """

    samples: int
    seed: int
    sampling: SamplingConfig
    ssim_images: int
    ssim_timesteps: tuple[int, ...]
    ssim_steps: int | None
    quantile: float = 0.05


def evaluate_run(
    path: Path,
    trained: TrainedRun,
    wanted: ScoringSettings,
    network: FeatureNetwork,
    *,
    reference_folder: Path | None = None,
    progress: Callable[[str], object] = lambda _: None,
    on_changed_images: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Sample a run's weights and score it, or read what an earlier call has left.

    Args:
        path: the run's folder.
        trained: the same run, opened.
        wanted: what to measure.
        network: the feature network.
        reference_folder: where statistics of real images are kept between runs; None keeps none.
        progress: told each task's name when its samples are there.
        on_changed_images: told how the images differ from those that the run was begun with, which
            are then scored against all the same; None refuses.

    Returns:
        A record of plain values: the run, what was measured on how many images and how, and the
        scores.

    Raises:
        UserError: the data are not where the run's configuration says, or have changed, or a file
            is damaged.
    """
    config, run = trained.config, RunFolder.open(path)
    changes: list[str] = []
    tasks = load_recorded_tasks(
        config.data,
        config.federation.clients,
        run.images,
        None if on_changed_images is None else changes.append,
    )
    if on_changed_images is not None and changes:
        on_changed_images(changes[0])
    others = [asdict(ImageRecord.of(task)) for task in tasks] if changes else None
    folder = path / "evaluations" / _key(trained, wanted, network, others)
    if exists(folder / SCORES_FILE):
        return read_json(folder / SCORES_FILE, "scores")
    try_output(folder / SCORES_FILE)
    torch.set_num_threads(config.resources.client_cpus)
    samples, sampling_seconds = _samples(folder, trained, wanted, progress)
    began, log = time.perf_counter(), MetricsLog(run.metrics)
    whole = load_tasks(
        config.data.model_copy(update={"images_per_task": None, "validation_images": 0}),
        config.federation.clients,
        read_records(run.images),
    )
    scored = score_samples(
        samples,
        tasks,
        {task.name: task.train for task in whole},
        network,
        ReferenceStatistics(network, reference_folder),
        seed=wanted.seed,
        quantile=wanted.quantile,
    )
    curves = {
        info.task: ssim_curve(
            trained.denoiser(info),
            trained.objective.process,
            config,
            task=info.client,
            images=task.test[: wanted.ssim_images],
            timesteps=list(wanted.ssim_timesteps),
            steps=wanted.ssim_steps,
        )
        for info, task in zip(trained.tasks, tasks, strict=True)
    }
    sizes = trained.sizes_of(trained.tasks[0])
    record = {
        "run": str(path),
        "round": trained.round,
        "fingerprint": config.fingerprint(),
        "training_seed": config.seed,
        "seed": wanted.seed,
        "samples": wanted.samples,
        "images_per_task": float(np.mean([len(task.train) for task in tasks])),
        "sampling": wanted.sampling.model_dump(mode="json", exclude={"batch_size"}),
        "network": network.identity,
        "scores": [asdict(score) for score in scored.scores],
        "by_task": scored.by_task,
        "agreement": {"all": float(np.mean(list(scored.agreement.values()))), **scored.agreement},
        "ssim": {
            str(t): float(np.mean([curve[t] for curve in curves.values()]))
            for t in wanted.ssim_timesteps
        }
        if wanted.ssim_images
        else {},
        "ssim_images": wanted.ssim_images,
        "ssim_steps": wanted.ssim_steps,
        "ssim_window": min(ssim_window(*shape[:2]) for shape in trained.shapes),
        "memorisation": {
            "all": merge_audits(list(scored.audits.values())) if scored.audits else None,
            "by_task": audit_numbers(scored.audits),
            "none": scored.no_audit,
        },
        "parameters": {
            part: sum(sizes[name] for name in names)
            for part, names in (
                ("shared", trained.partition.shared),
                ("exclusive", trained.partition.exclusive),
            )
        },
        "training": asdict(totals(log)),
        "round_bytes": sum(line["bytes_up"] + line["bytes_down"] for line in log.rounds()),
        "sampling_seconds": sampling_seconds,
        "scoring_seconds": time.perf_counter() - began,
    }
    write_json(folder / SCORES_FILE, record)
    return record


def read_samples(
    path: Path, trained: TrainedRun, wanted: ScoringSettings, network: FeatureNetwork
) -> dict[str, Images]:
    """The samples that :func:`evaluate_run` has scored, by task in order; raises UserError where
    there are none.
    """
    return _read_samples(
        path / "evaluations" / _key(trained, wanted, network) / SAMPLES_FILE, trained
    )


def _read_samples(file: Path, trained: TrainedRun) -> dict[str, Images]:
    """By task in order; raises UserError where the file is damaged, saying what to do."""
    try:
        found, _ = read_arrays(file)
        return {info.task: found[info.task] for info in trained.tasks}
    except DamagedError as error:
        raise DamagedError(f"{error}; remove {file.parent}, and it is made again") from error
    except KeyError as error:
        raise DamagedError(
            f"{file} has no samples of {error}; remove {file.parent}, and it is made again"
        ) from error


def _samples(
    folder: Path, trained: TrainedRun, wanted: ScoringSettings, progress: Callable[[str], object]
) -> tuple[dict[str, Images], float]:
    file = folder / SAMPLES_FILE
    if exists(file):
        return _read_samples(file, trained), float(
            read_json(folder / "sampling.json", "seconds")["seconds"]
        )
    began = time.perf_counter()
    samples = {}
    share = share_of_samples(wanted.samples, len(trained.tasks))
    for info in trained.tasks:
        samples[info.task] = generate(
            trained.denoiser(info),
            trained.objective.process,
            wanted.sampling,
            count=share,
            shape=trained.shape_of(info),
            seed=wanted.seed,
            task=info.client,
        ).images
        progress(info.task)
    seconds = time.perf_counter() - began
    write_json(folder / "sampling.json", {"seconds": seconds})
    write_arrays(file, samples)
    return samples, seconds


def _key(
    trained: TrainedRun, wanted: ScoringSettings, network: FeatureNetwork, others: Any = None
) -> str:
    """What names an evaluation; ``others`` describes images that are not the run's own."""
    # Without guidance, and with Algorithm 2, a key is what it was before there was anything else.
    unguided = None if wanted.sampling.guidance else {"guidance"}
    named = asdict(wanted)
    if wanted.ssim_steps is None:
        del named["ssim_steps"]
    # No image depends on how many are sampled at once.
    sampling = wanted.sampling.model_copy(update={"batch_size": trained.config.sampling.batch_size})
    content = {
        **named,
        "sampling": sampling.model_dump(mode="json", exclude=unguided),
        "network": network.fingerprint,
        "weights": trained.weights_hash,
        **({} if others is None else {"images": others}),
    }
    digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"round-{trained.round:05d}-{wanted.samples}-{digest}"

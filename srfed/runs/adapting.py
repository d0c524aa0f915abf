"""A new task's adaptation, scored on the way and kept: the folder that ``srfed adapt``
writes.

<out>/adaptation.json             what was adapted to what, and how: the same for all modes
<out>/scores.csv                  one line for every mode and number of steps
<out>/<mode>/<task>/models/...    the model, in a store such as a deployed site has
"""

import csv
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
from torch import Tensor

from srfed.config import DataConfig, RunConfig, parse_config
from srfed.data import Task
from srfed.data.images import Images
from srfed.data.tasks import extents
from srfed.data.validation import set_aside
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.network import FeatureNetwork
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.denoising_loss import denoising_losses, mean_loss
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.files import exists, held, list_folder, read_json, try_output, write_bytes, write_json
from srfed.model import build_model, build_objective, captured_forwards, denoiser_of_task
from srfed.records import Shape
from srfed.storage.site_model import MODELS, save_site_model
from srfed.training.adaptation import Adapted, Mode, adapt
from srfed.training.part import load_tensors

IDENTITY, LOCK = "adaptation.json", "lock"
DIGITS = 16
"""Hexadecimal digits of a hash that names what was adapted."""
VALIDATION_NOISE = 1
"""A seed: the noise is the same for every mode and step, whatever the adaptation's own seed."""


@dataclass(frozen=True)
class Point:
    """One point of a curve of scores, with all that the score depends on.

    Attributes:
        mode: what moved; see :data:`srfed.training.adaptation.Mode`.
        images: training images.
        steps: local steps so far.
        loss: mean training loss since the point before.
        score_name: what the distance is called; names the feature network.
        score: the Fréchet distance of the samples to the task's held-out images.
        samples, references: how many images on either side.
        floor: the distance of the training images to the held-out ones.
        network_sha256: of the feature network's weights.
        seed: of training and of the samples.
        validation: loss on the validation images; infinite where there are none.
    """

    mode: str
    images: int
    steps: int
    loss: float
    score_name: str
    score: float
    samples: int
    references: int
    floor: float
    network_sha256: str
    seed: int
    validation: float = field(default=math.inf, kw_only=True)


SomePoint = TypeVar("SomePoint", bound=Point)


@dataclass(frozen=True, eq=False)
class ScoredAdaptation:
    """A point with the model and the samples (uint8 N x H x W x C) that it was measured on."""

    point: Point
    adapted: Adapted
    samples: Images


def best_step(curve: Sequence[ScoredAdaptation]) -> ScoredAdaptation:
    """The first with the least validation loss; the last where none has a finite one."""
    known = [scored for scored in curve if math.isfinite(scored.point.validation)]
    return min(known, key=lambda scored: scored.point.validation) if known else curve[-1]


def computed_here(config: RunConfig, device: str, *, cuda: bool) -> RunConfig:
    """A run's configuration, to be computed on this device: in float32 on a CPU, whatever the run
    was trained in.
    """
    content = config.model_dump(mode="json")
    content["resources"] |= {"device": device}
    if not cuda:
        content["resources"] |= {"precision": "float32"}
    return parse_config(content, "--device")


def fitting_task(
    shapes: Sequence[Shape], task: Task, images: int | None = None, *, name: str = "images"
) -> Task:
    """A new task with as many training images as asked for, if a run of such images can take it.

    Args:
        shapes: the different H, W, C of the run's images.
        task: the new task.
        images: training images to use, the first; None takes all.
        name: what the caller calls that number.

    Raises:
        UserError: its images are of another shape, or too few.
    """
    count = len(task.train)
    if task.shape not in shapes:
        raise UserError(
            f"the images of {task.name} are {extents(task.shape)} (height x width x channels); the "
            f"run has {' and '.join(map(extents, shapes))}"
        )
    if images is not None and not 1 <= images <= count:
        raise UserError(
            f"{name} {images} is impossible: {task.name} has {count} training images "
            f"besides {len(task.test)} that are held out; allowed: 1 to {count}"
        )
    if min(len(task.test), count if images is None else images) < 2:
        raise UserError(
            f"{task.name} has {count} training and {len(task.test)} held-out images; a score needs "
            "2 of each, so add images, or a folder `test` beside `train`"
        )
    return replace(task, train=task.train[:images])


def with_validation(
    config: DataConfig, task: Task, count: int | None = None, *, name: str = "validation"
) -> Task:
    """A new task with some of its training images set aside, to choose a step by.

    Args:
        config: the run's settings of data.
        task: the new task.
        count: how many to set aside; None takes ``data.validation_images`` where at least as many
            are left to train on, and otherwise none.
        name: what the caller calls that number.

    Raises:
        UserError: so many cannot be set aside.
    """
    images = len(task.train)
    if count is None:
        count = config.validation_images if images >= 2 * config.validation_images else 0
    allowed = f"0, or 2 to {images - 2}" if images >= 4 else "0"
    if count != 0 and not 2 <= count <= images - 2:
        raise UserError(
            f"{name} {count} is impossible: {task.name} has {images} training images, 2 of which "
            f"are left to train on; allowed: {allowed}"
        )
    train, validation = set_aside(
        config.model_copy(update={"validation_images": count}), task.name, task.train
    )
    if len(train) < 2:
        raise UserError(
            f"{name} {count} is impossible: {task.name} has too many equal images, which stay on "
            "one side; allowed: fewer, or 0"
        )
    return replace(task, train=train, validation=validation)


def score_adaptation(
    config: RunConfig,
    shared: Mapping[str, Tensor],
    task: Task,
    network: FeatureNetwork,
    *,
    mode: Mode,
    steps: int,
    every: int,
    samples: int,
    seed: int,
) -> Iterator[ScoredAdaptation]:
    """Adapt to a task, and score the moving averages on the way.

    Args:
        config: the run's configuration.
        shared: the run's averaged φ.
        task: the new task; all its training images are trained on, its validation images looked
            at.
        network: the feature network.
        mode, steps, every: see :func:`~srfed.training.adaptation.adapt`.
        samples: images to generate for each score.
        seed: of training and samples; every score is of the same noise.

    Raises:
        UserError: as :func:`~srfed.training.adaptation.adapt`; or fewer than two samples or
            held-out images.
    """
    device = resolve_device(config.resources)
    model = build_model(config, task.train.shape[-1]).to(device).eval()
    objective = build_objective(config, device)
    forwards = captured_forwards(model, config.resources, device)
    denoiser = denoiser_of_task(objective, model, None, forwards)
    held_out = FeatureStatistics.of(network(task.test))
    floor = frechet_distance(FeatureStatistics.of(network(task.train)), held_out)
    for adapted in adapt(
        config, shared, task.train, task=task.name, mode=mode, steps=steps, every=every, seed=seed
    ):
        load_tensors(model, adapted.shared, adapted.exclusive)
        images = generate(
            denoiser,
            objective.process,
            config.sampling,
            count=samples,
            shape=task.train.shape[1:],
            seed=seed,
            task=task.name,
        ).images
        score = frechet_distance(FeatureStatistics.of(network(images)), held_out)
        validation = math.inf
        if len(task.validation):
            validation = mean_loss(
                denoising_losses(
                    denoiser,
                    objective.process,
                    task.validation,
                    task=task.name,
                    seed=VALIDATION_NOISE,
                )
            )
        point = Point(
            mode=mode,
            images=len(task.train),
            steps=adapted.steps,
            loss=adapted.loss,
            score_name=network.score_name,
            score=score,
            samples=samples,
            references=len(task.test),
            floor=floor,
            network_sha256=network.sha256,
            seed=seed,
            validation=validation,
        )
        yield ScoredAdaptation(point, adapted, images)


class AdaptationFolder:
    """What has been adapted so far, mode by mode.

    Args:
        path: the folder; it may not exist yet.
        about: all that its scores depend on but the mode; plain values.

    Raises:
        UserError: the folder is another adaptation's, or a file in it is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        _refuse_other(path, about)
        if not exists(path / IDENTITY):
            write_json(path / IDENTITY, about)
        try_output(self.scores)
        self.points = read_points(self.scores, Point)

    @classmethod
    @contextmanager
    def held(cls, path: Path, about: Mapping[str, Any]) -> Iterator["AdaptationFolder"]:
        """The folder, for this process alone; raises UserError where another one has it, and as the
        class does.
        """
        _refuse_other(path, about)
        with held(path / LOCK, wait=False):
            yield cls(path, about)

    @property
    def scores(self) -> Path:
        return self.path / "scores.csv"

    def store(self, mode: str, task: str) -> Path:
        """Where the model of a mode is, in the form of a site's own store."""
        return self.path / mode / task

    def has(self, mode: str, task: str) -> bool:
        """Whether this mode is finished."""
        kept = any(point.mode == mode for point in self.points)
        return kept and (self.store(mode, task) / MODELS).is_dir()

    def add(self, config: RunConfig, mode: Mode, task: str, curve: list[ScoredAdaptation]) -> None:
        """Keep a finished mode: its model first, then its scores; raises UserError where that
        cannot be.

        Args:
            config: of the adaptation, as :func:`~srfed.training.adaptation.adaptation_config` gives
                it.
            mode: the mode.
            task: the new task's name.
            curve: the mode's results, the best of which (:func:`best_step`) is kept as a model.
        """
        best = best_step(curve)
        save_site_model(
            self.store(mode, task),
            config,
            f"adapted-{mode}",
            best.adapted.chunk,
            best.samples.shape[1:],
            best.adapted.shared,
            best.adapted.exclusive,
        )
        self.points = [point for point in self.points if point.mode != mode] + [
            scored.point for scored in curve
        ]
        write_points(self.scores, self.points)


def _refuse_other(path: Path, about: Mapping[str, Any]) -> None:
    if exists(path / IDENTITY):
        found = read_json(path / IDENTITY, "task")
        changed = [
            f"{key}: {found.get(key)} -> {value}"
            for key, value in about.items()
            if found.get(key) != value
        ]
        if changed:
            raise UserError(
                f"{path} holds another adaptation ({'; '.join(changed)}); name another folder with "
                "--out"
            )
    elif exists(path) and (not path.is_dir() or set(list_folder(path)) - {LOCK}):
        raise UserError(f"{path} is not an empty folder; name another one with --out")


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write points of one kind as a table with a header, atomically; raises UserError where that
    cannot be.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, [field.name for field in fields(points[0])], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_bytes(path, buffer.getvalue().encode())


def read_points(path: Path, kind: type[SomePoint]) -> list[SomePoint]:
    """The points that :func:`write_points` has written; none where there is no file. A column that
    an earlier version did not write is as its default.

    Raises:
        UserError: the file is damaged, or holds another kind.
    """
    if not exists(path):
        return []
    # The type of each field is str, int or float, and reads its own text.
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                kind(**{name: kinds[name](row[name]) for name in kinds if name in row})
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; name another folder with --out") from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The head of the SHA-256 of tensors with their names: equal where every bit is."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return hashlib.sha256(safetensors.torch.save(ordered)).hexdigest()[:DIGITS]


def images_hash(task: Task) -> str:
    """The same of a task's training, held-out and, if any, validation images."""
    digest = hashlib.sha256()
    for images in (task.train, task.test, *([task.validation] if len(task.validation) else [])):
        digest.update(repr(images.shape).encode() + np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()[:DIGITS]

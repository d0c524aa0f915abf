"""Every score of one set of samples, each with what it was measured against.

A number alone says little: the Fréchet distance depends on how many images there are, on the
reference, on the feature network and its resize rule. So a score here is a record that names all of
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from srfed.data import Task
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features.network import FeatureNetwork
from srfed.evaluation.features.statistics import (
    FeatureStatistics,
    merge_statistics,
    repeat_channels,
)
from srfed.evaluation.features.statistics_file import load_statistics, save_statistics
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.evaluation.metrics.kernel import kernel_distance, kernel_score_name
from srfed.evaluation.metrics.memorisation import Audit, audit
from srfed.evaluation.metrics.nearest_neighbour import class_agreement

ReferenceName = Literal["test", "train", "subset"]
REFERENCES: tuple[ReferenceName, ...] = ("test", "train", "subset")
"""The held-out images; the whole training split; the training images that the run has used."""


@dataclass(frozen=True)
class Score:
    """One distance of a set of samples to a reference.

    Attributes:
        name: what the distance is called; names the feature network.
        reference: "test", "train" or "subset".
        value: the distance.
        images, references: how many images on either side.
        floor: the distance of real images to the same reference: the whole training split to
            "test", the test images to the other two. What a perfect model would score, were it
            judged on as many images.
        floor_images: how many real images that were.
        deviation: standard deviation over the subsets of a kernel distance; None of a Fréchet
            distance.
        subsets, subset_size: of a kernel distance.
    """

    name: str
    reference: ReferenceName
    value: float
    images: int
    references: int
    floor: float | None = None
    floor_images: int = 0
    deviation: float | None = None
    subsets: int = 0
    subset_size: int = 0


@dataclass(frozen=True)
class SampleScores:
    """What is measured on samples alone.

    Attributes:
        scores: distances over all tasks together.
        by_task: the Fréchet distance to the task's own test images, where it has two.
        agreement: share of samples that a nearest-neighbour judge gives to their task, by task.
        audits: the memorisation audit of each task for which one can be made.
        no_audit: of the others, why not.
    """

    scores: list[Score]
    by_task: dict[str, float]
    agreement: dict[str, float]
    audits: dict[str, Audit]
    no_audit: dict[str, str]


class ReferenceStatistics:
    """Feature statistics of real images, by content: computed once, and kept in files if there is a
    folder for them.

    Args:
        network: the feature network.
        folder: where files are kept between commands; None keeps none.
    """

    def __init__(self, network: FeatureNetwork, folder: Path | None = None) -> None:
        self._network, self._folder = network, folder
        self._known: dict[str, FeatureStatistics] = {}

    def of(self, images: Images) -> FeatureStatistics:
        """Statistics of images, uint8 N x H x W x C; raises UserError where a file is damaged."""
        content = np.ascontiguousarray(images)
        key = sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
        if key not in self._known:
            self._known[key] = self._read_or_make(key, content)
        return self._known[key]

    def _read_or_make(self, key: str, images: Images) -> FeatureStatistics:
        if self._folder is None:
            return FeatureStatistics.of(self._network(images))
        path = self._folder / f"{key[:16]}-{self._network.fingerprint[:8]}.safetensors"
        if path.exists():
            return load_statistics(path, self._network)
        statistics = FeatureStatistics.of(self._network(images))
        save_statistics(path, statistics, self._network)
        return statistics


def score_samples(
    samples: Mapping[str, Images],
    tasks: Sequence[Task],
    whole_train: Mapping[str, Images],
    network: FeatureNetwork,
    references: ReferenceStatistics,
    *,
    seed: int,
    quantile: float,
) -> SampleScores:
    """Score samples of all tasks.

    Args:
        samples: uint8 N x H x W x C by task.
        tasks: the tasks, with the training images that the run has used and the held-out ones.
        whole_train: each task's whole training split; the same images where there are no more.
        network: the feature network.
        references: statistics of real images under it.
        seed: of the kernel distance's subsets.
        quantile: of the memorisation audit.

    Raises:
        UserError: there are too few images, or they mean nothing to the network.
    """
    features = {task.name: network(samples[task.name]) for task in tasks}
    together = repeat_channels(list(features.values()))
    generated = FeatureStatistics.of(together)
    groups: dict[str, dict[str, Images]] = {
        "test": {task.name: task.test for task in tasks},
        "train": dict(whole_train),
        "subset": {task.name: task.train for task in tasks},
    }
    statistics = {
        name: merge_statistics([references.of(images) for images in group.values()])
        for name, group in groups.items()
    }
    scores = []
    for reference in REFERENCES:
        real = statistics["train" if reference == "test" else "test"]
        scores.append(
            Score(
                network.score_name,
                reference,
                frechet_distance(generated, statistics[reference]),
                generated.count,
                statistics[reference].count,
                frechet_distance(real, statistics[reference]),
                real.count,
            )
        )
    test = repeat_channels([network(task.test) for task in tasks])
    kernel = kernel_distance(together, test, seed=seed)
    scores.append(
        Score(
            kernel_score_name(network.score_name),
            "test",
            kernel.mean,
            generated.count,
            len(test),
            deviation=kernel.deviation,
            subsets=kernel.subsets,
            subset_size=kernel.subset_size,
        )
    )
    audits, no_audit = {}, {}
    for task in tasks:
        try:
            audits[task.name] = audit(
                samples[task.name], task.train, task.test, network, quantile=quantile
            )
        except UserError as error:
            no_audit[task.name] = str(error)
    return SampleScores(
        scores=scores,
        by_task={
            task.name: frechet_distance(
                FeatureStatistics.of(features[task.name]), references.of(task.test)
            )
            for task in tasks
            if len(task.test) >= 2
        },
        agreement=class_agreement(tasks, samples),
        audits=audits,
        no_audit=no_audit,
    )


def describe_score(score: Score, network: Mapping[str, str], seed: int) -> str:
    """One line with everything that the number depends on; ``network`` is
    :attr:`FeatureNetwork.identity`.
    """
    words = f"{score.name} against {score.reference}: {score.value:.4f}"
    if score.deviation is not None:
        words += f" ± {score.deviation:.4f} over {score.subsets} subsets of {score.subset_size}"
    words += f" (n = {score.images:,} samples, {score.references:,} references"
    if score.floor is not None:
        words += f"; {score.floor_images:,} real images score {score.floor:.4f}"
    return (
        f"{words}; {network['network']} {network['sha256'][:8]}, {network['resize_rule']}; seed "
        f"{seed})"
    )


def audit_numbers(audits: Mapping[str, Audit]) -> dict[str, dict[str, Any]]:
    """The audits as plain numbers by task, with the verdict."""
    return {name: {**one.to_numbers(), "fires": one.fires} for name, one in audits.items()}

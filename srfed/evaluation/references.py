"""Central evaluation: Fréchet distances of the collected samples, over all tasks and for each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from srfed.data import Task
from srfed.data.images import Images
from srfed.evaluation.features.load import FeatureNetwork
from srfed.evaluation.features.statistics import FeatureStatistics, merge_statistics
from srfed.evaluation.metrics.frechet import frechet_distance


@dataclass(frozen=True)
class Scores:
    """Fréchet distances to the reference images.

    Attributes:
        name: what the distance is called; names the feature network.
        overall: between the union of the samples and the union of the references.
        per_task: between a task's samples and its own references, where there are two of either.
            With few images it is biased upwards; compare it only with itself.
        samples: generated images scored.
        references: reference images.
    """

    name: str
    overall: float
    per_task: dict[str, float]
    samples: int
    references: int


@dataclass(frozen=True)
class ClientStatistics:
    """What a client says of its images in ``statistics`` mode: feature statistics, from which no
    image can be read.

    Attributes:
        generated: of what it generated.
        test, train: of its own held-out and training images.
    """

    generated: FeatureStatistics
    test: FeatureStatistics
    train: FeatureStatistics


def score_statistics(
    name: str, own: Mapping[str, FeatureStatistics], references: Mapping[str, FeatureStatistics]
) -> Scores:
    """Score feature statistics by task against references of the same tasks; merged in the order of
    their names, and grey images count as RGB where some are RGB.
    """
    generated, reference = (
        merge_statistics([statistics[task] for task in sorted(own)])
        for statistics in (own, references)
    )
    return Scores(
        name=name,
        overall=frechet_distance(generated, reference),
        per_task={
            task: frechet_distance(own[task], references[task])
            for task in sorted(own)
            if min(own[task].count, references[task].count) >= 2
        },
        samples=generated.count,
        references=reference.count,
    )


class References:
    """Scores samples against reference images that the server itself has.

    Args:
        network: the feature network; its name names the scores.
        references: reference images by task, uint8 N x H x W x C.
    """

    def __init__(self, network: FeatureNetwork, references: Mapping[str, Images]) -> None:
        self.network = network
        self._images = references
        self._references: dict[str, FeatureStatistics] = {}

    def score(self, samples: Mapping[str, Images]) -> Scores:
        """Score the samples of some or all tasks; the reference is that of the same tasks."""
        own = {task: self._statistics(images) for task, images in samples.items()}
        # Of ten thousand tasks only some are ever judged.
        for task in own.keys() - self._references.keys():
            self._references[task] = self._statistics(self._images[task])
        return score_statistics(
            self.network.score_name, own, {task: self._references[task] for task in own}
        )

    def _statistics(self, images: Images) -> FeatureStatistics:
        return FeatureStatistics.of(self.network(images))


class RealFloor:
    """The score that the real training images of some tasks would get: what a perfect model scores.

    Args:
        evaluation: scores them, once for each choice of tasks.
        tasks: whose training images count.
    """

    def __init__(self, evaluation: References, tasks: Sequence[Task]) -> None:
        self._evaluation = evaluation
        self._images = {task.name: task.train for task in tasks}
        self._known: dict[tuple[str, ...], float] = {}

    def __call__(self, tasks: Iterable[str]) -> float:
        key = tuple(sorted(tasks))
        if key not in self._known:
            self._known[key] = self._evaluation.score(
                {name: self._images[name] for name in key}
            ).overall
        return self._known[key]

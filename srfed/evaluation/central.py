"""Central evaluation: Fréchet distances of the collected samples, over all tasks and for each."""

from collections.abc import Mapping
from dataclasses import dataclass

from srfed.data.images import Images
from srfed.evaluation.features import FeatureNetwork
from srfed.evaluation.frechet import FeatureStatistics, frechet_distance, merge_statistics


@dataclass(frozen=True)
class Scores:
    """Fréchet distances to the reference images.

    Attributes:
        name: what the distance is called; names the feature network.
        overall: between the union of the samples and the union of the references.
        per_task: between a task's samples and its own references. With few images it is biased
            upwards; compare it only with itself.
        samples: generated images scored.
        references: reference images.
    """

    name: str
    overall: float
    per_task: dict[str, float]
    samples: int
    references: int


class CentralEvaluation:
    """Scores samples against reference images that the server itself has.

    Args:
        network: the feature network; its name names the scores.
        references: reference images by task, uint8 N x H x W x C, at least two of each.
    """

    def __init__(self, network: FeatureNetwork, references: Mapping[str, Images]) -> None:
        self.network = network
        self._references = {task: self._statistics(images) for task, images in references.items()}

    def score(self, samples: Mapping[str, Images]) -> Scores:
        """Score the samples of some or all tasks; the reference is that of the same tasks."""
        own = {task: self._statistics(images) for task, images in sorted(samples.items())}
        references = {task: self._references[task] for task in own}
        generated, reference = (
            merge_statistics(list(own.values())),
            merge_statistics(list(references.values())),
        )
        return Scores(
            name=self.network.score_name,
            overall=frechet_distance(generated, reference),
            per_task={
                task: frechet_distance(statistics, references[task])
                for task, statistics in own.items()
                if statistics.count >= 2
            },
            samples=generated.count,
            references=reference.count,
        )

    def _statistics(self, images: Images) -> FeatureStatistics:
        return FeatureStatistics.of(self.network(images))

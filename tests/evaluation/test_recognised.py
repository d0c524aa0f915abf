"""Whose samples are these? The judge of a run's evaluations against neighbours counted by hand."""

from collections import Counter

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from srfed.data import Task
from srfed.data.images import Images
from srfed.evaluation.metrics import nearest_neighbour
from srfed.evaluation.metrics.nearest_neighbour import BLOCK, MOST_IMAGES, Recogniser, nearest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.images import random_images


def near(centre: int, count: int, seed: int) -> Images:
    """Images of noise around a grey."""
    noise = np.random.default_rng(seed).integers(-60, 60, (count, 6, 6, 1))
    return np.clip(centre + noise, 0, 255).astype(np.uint8)


TASKS = [
    Task("dark", near(100, 20, 0), near(100, 8, 1)),
    Task("light", near(125, 15, 2), near(125, 5, 3)),
    Task("untested", near(150, 9, 4), near(150, 0, 5)),
]


def by_hand(images: Images) -> list[str]:
    """The most frequent task among the three nearest training images of each."""
    known = [(task.name, image) for task in TASKS for image in task.train.astype(float)]
    verdicts = []
    for image in images.astype(float):
        ordered = sorted(known, key=lambda one: float(((one[1] - image) ** 2).sum()))
        names = [name for name, _ in ordered[:3]]
        # Of three different ones scikit-learn takes the first in the order of names.
        verdicts.append(min(names, key=lambda name: (-Counter(names)[name], name)))
    return verdicts


def test_a_share_is_that_of_the_three_nearest_training_images() -> None:
    samples = {"dark": near(110, 30, 6), "light": near(120, 25, 7)}
    shares = Recogniser(TASKS).shares(samples)
    assert shares == {
        name: pytest.approx(np.mean([verdict == name for verdict in by_hand(images)]))
        for name, images in samples.items()
    }
    assert 0 < min(shares.values()) < max(shares.values()) < 1


@pytest.mark.parametrize("names", [["dark", "light", "untested"], ["light"]])
def test_accuracy_is_over_the_test_images_of_those_who_are_judged(names: list[str]) -> None:
    recogniser = Recogniser(TASKS)
    # Asked of others before.
    recogniser.accuracy(["dark"])
    right = [
        verdict == task.name
        for task in TASKS
        if task.name in names
        for verdict in by_hand(task.test)
    ]
    assert len(right) == (13 if "dark" in names else 5)
    assert recogniser.accuracy(names) == pytest.approx(np.mean(right))
    assert recogniser.accuracy(["untested"]) is None


@pytest.mark.parametrize("block", [BLOCK, 7, 2])
def test_the_three_nearest_are_scikit_learns(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_neighbour, "BLOCK", block)
    draws = np.random.default_rng(0)
    queries, references = (draws.integers(0, 256, (n, 12), dtype=np.uint8) for n in (50, 90))
    judge = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(references.astype(np.float64))
    expected = judge.kneighbors(queries.astype(np.float64), return_distance=False)
    np.testing.assert_array_equal(nearest(queries, references), expected)

    few = draws.integers(0, 2, (60, 3), dtype=np.uint8)
    distances = np.square(few[:, None].astype(int) - few[None].astype(int)).sum(axis=2)
    expected = distances.argsort(axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(nearest(few, few), expected)


def test_images_after_the_first_do_not_count() -> None:
    many = Task("many", np.concatenate([near(40, MOST_IMAGES, 0), near(220, 9, 1)]), near(40, 2, 2))
    other = Task("other", near(200, 20, 3), near(200, 2, 4))
    # As near to the late images of "many" as can be.
    assert Recogniser([many, other]).shares({"many": many.train[-9:]}) == {"many": 0.0}


@pytest.mark.parametrize("tasks", [[], TASKS[:1]])
def test_one_task_alone_cannot_be_told_from_others(tasks: list[Task]) -> None:
    recogniser = Recogniser(tasks)
    assert recogniser.shares({"dark": random_images(4, 6, 6, 1)}) == {}
    assert recogniser.accuracy(["dark"]) is None


def test_every_evaluation_says_whose_the_samples_are(finished_run: RunFolder) -> None:
    log = MetricsLog(finished_run.metrics)
    for evaluation in log.evaluations():
        shares = evaluation["recognised_by_client"]
        assert list(shares) == [task.client for task in log.tasks()]
        assert evaluation["recognised"] == pytest.approx(np.mean(list(shares.values())))
        assert evaluation["recognised_real"] > 0.9

"""The memorisation audit: against scikit-learn and simulation, on copies, on real digits, on
trained models.
"""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom
from sklearn.neighbors import NearestNeighbors

from srfed.config import DataConfig, parse_config
from srfed.data import Task, load_tasks
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features.load import FeatureNetwork
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics import memorisation
from srfed.evaluation.metrics.memorisation import (
    Audit,
    Memorisation,
    audit,
    chance_tolerance,
    draw_nearest_pairs,
    merge_audits,
    nearest_distances,
    nearest_on_device,
)
from srfed.model import build_model, build_objective, build_partition
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state, load_tensors

torch.set_num_threads(1)

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks(DataConfig(), 10)


def shuffled(task: Task, seed: int, *counts: int) -> list[Images]:
    """All images of a task in random order, in parts: held-out and training images are then
    exchangeable.
    """
    images = np.concatenate([task.train, task.test])
    order = np.random.default_rng(seed).permutation(len(images))
    return np.split(images[order], np.cumsum(counts))


def noisy(images: Images, deviation: float, seed: int = 0) -> Images:
    noise = np.random.default_rng(seed).normal(0, deviation, images.shape)
    return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


# --- nearest neighbours -------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [32 * 2**20, 3 * 8 * 48])
def test_nearest_images_are_scikit_learns(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    queries, references = (
        rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8) for count in (20, 31)
    )
    distances, indices = nearest_distances(queries, references)
    flat = [images.reshape(len(images), -1) / 255 for images in (queries, references)]
    expected, neighbours = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(flat[1]).kneighbors(flat[0])
    )
    np.testing.assert_array_equal(indices, neighbours[:, 0])
    np.testing.assert_allclose(distances, expected[:, 0] / np.sqrt(48), rtol=1e-12)
    assert (distances.dtype, indices.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block_bytes", [32 * 2**20, 7 * 8 * 5])
def test_nearest_features_are_scikit_learns(
    dtype: Any, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(1)
    queries, references = (
        rng.normal(size=(40, 5)).astype(dtype),
        rng.normal(size=(33, 5)).astype(dtype),
    )
    judge = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(references.astype(np.float64))
    expected, neighbours = judge.kneighbors(queries.astype(np.float64))
    distances, indices = nearest_distances(queries, references)
    np.testing.assert_array_equal(indices, neighbours[:, 0])
    np.testing.assert_allclose(distances, expected[:, 0], rtol=1e-9)

    expected, neighbours = judge.kneighbors(references.astype(np.float64))
    distances, indices = nearest_distances(references, references, skip_self=True)
    np.testing.assert_array_equal(indices, neighbours[:, 1])
    np.testing.assert_allclose(distances, expected[:, 1], rtol=1e-9)


@pytest.mark.parametrize("block_bytes", [32 * 2**20, 7 * 8 * 5])
def test_a_device_finds_the_neighbours_that_numpy_finds(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equally near images the first, in blocks or not, with or without the image itself."""
    monkeypatch.setattr(memorisation, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(2)
    images = rng.integers(0, 3, (60, 2, 2, 1), dtype=np.uint8)
    features = rng.normal(size=(50, 5))
    sets = [(images[:20], images[20:]), (images, images), (features[:9], features[9:])]

    def everywhere(*arguments: Any) -> Any:
        return nearest_on_device(*arguments, torch.device("cpu"))

    for queries, references in sets:
        for skip_self in (False, True) if queries is references else (False,):
            expected = nearest_distances(queries, references, skip_self=skip_self)
            with monkeypatch.context() as there:
                there.setattr(memorisation, "_nearest", everywhere)
                found = nearest_distances(queries, references, skip_self=skip_self)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_equal_images_are_at_distance_zero(network: FeatureNetwork, tasks: list[Task]) -> None:
    images = tasks[0].train
    distances, indices = nearest_distances(images[::-1], images)
    assert not distances.any()
    np.testing.assert_array_equal(images[indices], images[::-1])
    # Far from the origin |x|² - 2 xᵀy + |y|² has no digits left of a distance of zero.
    features = network(images) + 1e4
    assert not nearest_distances(features, features)[0].any()


def test_a_difference_of_one_grey_level_is_one_255th() -> None:
    image = np.full((1, 16, 16, 3), 100, np.uint8)
    assert nearest_distances(image, image + 1)[0] == pytest.approx(1 / 255)
    assert nearest_distances(image, np.concatenate([image + 2, image - 1]))[1] == 1


def test_blocks_of_large_images_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = memorisation._nearest

    def watch(block: Array, references: Array, rows: int, own: int | None) -> Array:
        sizes.append(block.nbytes)
        return real(block, references, rows, own)

    monkeypatch.setattr(memorisation, "_nearest", watch)
    images = np.random.default_rng(2).integers(0, 256, (40, 256, 256, 3), dtype=np.uint8)
    np.testing.assert_array_equal(nearest_distances(images, images)[1], np.arange(40))
    assert max(sizes) <= 32 * 2**20


@pytest.mark.parametrize(
    ("queries", "references", "skip_self"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), False),
        (np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4, 1)), False),
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), False),
        (np.zeros((2, 3)), np.zeros((2, 4)), False),
        (np.zeros((2, 3)), np.zeros((3, 3)), True),
        (np.zeros((2, 3)), np.zeros((0, 3)), False),
        (np.zeros((1, 3)), np.zeros((1, 3)), True),
    ],
)
def test_impossible_neighbours_are_refused(
    queries: Array, references: Array, skip_self: bool
) -> None:
    with pytest.raises(ValueError, match=r"need uint8|differ|are not the|no reference"):
        nearest_distances(queries, references, skip_self=skip_self)


# --- tolerance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "held_out", "rank"), [(100, 36, 1), (50, 199, 10), (1000, 60, 3)]
)
def test_fresh_images_exceed_the_tolerance_once_in_a_thousand(
    generated: int, held_out: int, rank: int
) -> None:
    rng = np.random.default_rng(3)
    draws, part = 200_000, 10_000
    # Uniform distances will do, as only their order matters; the fresh ones below a threshold are
    # then binomial.
    thresholds = np.concatenate(
        [
            np.partition(rng.random((part, held_out)), rank - 1)[:, rank - 1]
            for _ in range(draws // part)
        ]
    )
    shares = rng.binomial(generated, thresholds) / generated
    tolerance = chance_tolerance(generated, held_out, rank)
    noise = 5 * np.sqrt(1e-3 / draws)
    assert (shares > tolerance).mean() <= 1e-3 + noise
    assert (shares > tolerance - 1 / generated).mean() >= 1e-3 - noise


@given(st.integers(1, 400), st.integers(1, 400), st.data())
@settings(max_examples=200, deadline=None)
def test_the_tolerance_is_of_the_beta_binomial_distribution(
    generated: int, held_out: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, held_out))
    expected = betabinom.isf(1e-3, generated, rank, held_out - rank + 1)
    assert chance_tolerance(generated, held_out, rank) * generated == pytest.approx(expected)


def test_too_few_images_can_show_nothing() -> None:
    assert chance_tolerance(2, 3, 1) == 1
    assert chance_tolerance(100, 1, 1) > 0.99
    assert chance_tolerance(1000, 1000, 50) == pytest.approx(0.05, abs=0.04)


# --- what is measured ---------------------------------------------------------------------------


def grey(*levels: int) -> Images:
    """Even images, so that distances are differences of levels over 255."""
    return np.stack([np.full((8, 8, 1), level, np.uint8) for level in levels])


def test_every_number_is_what_it_is_called(network: FeatureNetwork) -> None:
    generated, training, held_out = (
        grey(1, 10, 104, 205),
        grey(0, 100, 200),
        grey(2, 41, 110, 150, 250),
    )
    found = audit(generated, training, held_out, network, quantile=0.35).pixels
    # Held-out images are 2, 41, 10, 50 and 50 levels from training ones; floor(0.35 * 6) = 2 takes
    # the second: 10, and an image just as far away is not closer.
    assert found.threshold == pytest.approx(10 / 255)
    assert found.share == 0.75
    assert found.generated_to_training == pytest.approx((4 + 5) / 2 / 255)
    assert found.generated_to_held_out == pytest.approx((6 + 8) / 2 / 255)
    assert found.held_out_to_training == pytest.approx(41 / 255)
    assert found.tolerance == chance_tolerance(4, 5, 2)
    assert (found.quantile, found.generated, found.held_out, found.training) == (0.35, 4, 5, 3)


@pytest.mark.parametrize(
    ("held_out", "quantile", "rank"),
    [(36, 0.05, 1), (39, 0.05, 2), (99, 0.29, 29), (9, 0.0, 1), (9, 0.5, 5)],
)
def test_the_rank_of_the_threshold(
    held_out: int, quantile: float, rank: int, network: FeatureNetwork
) -> None:
    others = grey(*range(101, 101 + held_out))
    found = audit(grey(0), grey(100), others, network, quantile=quantile)
    assert found.pixels.threshold == pytest.approx(rank / 255)
    assert found.pixels.tolerance == chance_tolerance(1, held_out, rank)


def test_features_are_the_networks(network: FeatureNetwork, tasks: list[Task]) -> None:
    generated, held_out, training = shuffled(tasks[2], 0, 50, 40)
    found = audit(generated, training, held_out, network).features
    judge = NearestNeighbors(n_neighbors=1).fit(network(training))
    usual, ours = (
        np.sort(judge.kneighbors(network(images))[0][:, 0]) for images in (held_out, generated)
    )
    assert found.threshold == pytest.approx(usual[1])
    assert found.share == (ours < usual[1]).mean()
    assert found.generated_to_training == pytest.approx(np.median(ours))
    assert found.held_out_to_training == pytest.approx(np.median(usual))


def test_held_out_images_that_are_training_images_do_not_blind_the_audit(
    network: FeatureNetwork, tasks: list[Task]
) -> None:
    fresh, held_out, training = shuffled(tasks[1], 1, 50, 40)
    leaky = np.concatenate([training[:4], held_out])
    assert audit(training, training, leaky, network).pixels.fires
    # The same leak among fresh images is no copying.
    assert not audit(np.concatenate([training[:4], fresh]), training, leaky, network).fires
    with pytest.raises(UserError, match="all 5 held-out images are training images too"):
        audit(fresh, training, training[:5], network)


def test_impossible_audits_are_refused(network: FeatureNetwork, tasks: list[Task]) -> None:
    images = tasks[0].train
    for sets in (
        [images[:0], images, images],
        [images, images[:0], images],
        [images, images, images[:0]],
    ):
        with pytest.raises(UserError, match="at least 1 image of each kind"):
            audit(*sets, network)
    with pytest.raises(UserError, match=r"0\.6; allowed: 0 to 0\.5"):
        audit(images, images, images, network, quantile=0.6)
    with pytest.raises(ValueError, match="held-out"):
        audit(images, images, images[:, :7], network)
    with pytest.raises(ValueError, match="generated"):
        audit(images / 255, images, images, network)  # type: ignore[arg-type]


# --- copies, real digits, trained models --------------------------------------------------------


@pytest.mark.parametrize("deviation", [0, 5])
def test_the_audit_fires_on_copies(
    deviation: float, network: FeatureNetwork, tasks: list[Task]
) -> None:
    for task in tasks:
        found = audit(noisy(task.train[:100], deviation), task.train, task.test, network)
        assert found.pixels.fires
        assert found.features.fires
        assert found.pixels.share > 0.95


def test_the_audit_fires_where_half_are_copies(network: FeatureNetwork, tasks: list[Task]) -> None:
    for task in tasks:
        fresh, held_out, training = shuffled(task, 2, 40, 36)
        mixed = np.concatenate([fresh, noisy(training[:40], 5)])
        found = audit(mixed, training, held_out, network)
        assert found.pixels.fires
        copied = sum(index >= 40 and index - 40 == neighbour for index, neighbour in found.nearest)
        assert copied == len(found.nearest) == 12


def test_the_audit_is_silent_on_real_digits(network: FeatureNetwork, tasks: list[Task]) -> None:
    fired, shares, chances = 0, [], []
    for task in tasks:
        for seed in range(6):
            fresh, held_out, training = shuffled(task, seed, 60, 36)
            found = audit(fresh, training, held_out, network)
            fired += found.fires
            shares += [found.pixels.share, found.features.share]
            chances.append(1 / 37)
    # 60 audits of two spaces fire with a probability of at most 0.12 once, and of 0.007 twice.
    assert fired <= 1
    assert np.mean(shares) == pytest.approx(np.mean(chances), abs=0.015)


def generated_by_a_model(train: Images) -> Images:
    """What a small UNet makes after 250 steps on a task's images."""
    config = parse_config(
        {
            "diffusion": {"timesteps": 100},
            "model": {
                "channels": [32, 16, 16, 16],
                "groups": 4,
                "attention_stages": [],
                "exclusive_stages": "all",
            },
            "training": {
                "batch_size": 20,
                "local_steps": 250,
                "learning_rate": 5e-3,
                "learning_rate_schedule": "constant",
                "minibatches": "continued",
            },
        }
    )
    model, objective = build_model(config, 1), build_objective(config, torch.device("cpu"))
    partition = build_partition(config, model)
    trainer = LocalTrainer(config, model, partition, objective, "digit", train)
    state = trainer.train(1, {}, initial_state(model, partition)).state
    load_tensors(model, state.exclusive.average)
    model.eval()
    return generate(
        objective.denoiser(model),
        objective.process,
        config.sampling,
        count=100,
        shape=(8, 8, 1),
        seed=0,
        task="digit",
    ).images


@pytest.mark.slow
def test_the_audit_fires_on_an_overfitted_model_only(
    network: FeatureNetwork, tasks: list[Task]
) -> None:
    few, many, test = tasks[3].train[:20], tasks[3].train, tasks[3].test
    overfitted = audit(generated_by_a_model(few), few, test, network)
    fitted = audit(generated_by_a_model(many), many, test, network)
    assert overfitted.fires
    assert overfitted.pixels.share > 0.4
    assert not fitted.fires
    assert fitted.pixels.share < 0.3 * overfitted.pixels.share
    assert overfitted.pixels.generated_to_training < 0.8 * overfitted.pixels.generated_to_held_out


# --- what leaves --------------------------------------------------------------------------------


def test_only_numbers_leave(network: FeatureNetwork, tasks: list[Task]) -> None:
    found = audit(tasks[4].train[:30], tasks[4].train, tasks[4].test, network, quantile=0.1)
    numbers = found.to_numbers()
    assert {type(value) for value in numbers.values()} == {float}
    assert set(numbers) == {
        f"{space}_{one.name}" for space in ("pixels", "features") for one in fields(Memorisation)
    }
    assert numbers["pixels_share"] == found.pixels.share
    assert numbers["features_threshold"] == found.features.threshold
    returned = Audit.from_numbers(json.loads(json.dumps(numbers)))
    assert returned == found
    assert returned.fires == found.fires
    assert returned.nearest == ()
    assert type(returned.pixels.training) is int


def test_other_numbers_are_refused(network: FeatureNetwork, tasks: list[Task]) -> None:
    numbers = audit(tasks[4].train[:3], tasks[4].train, tasks[4].test, network).to_numbers()
    for other in ({**numbers, "more": 1.0}, {name: numbers[name] for name in list(numbers)[1:]}):
        with pytest.raises(ValueError, match="no audit's numbers"):
            Audit.from_numbers(other)
    with pytest.raises(ValueError, match="finite"):
        Audit.from_numbers({**numbers, "pixels_share": float("nan")})


def test_nearest_pairs_put_copies_before_images_that_are_near_to_everything(
    network: FeatureNetwork,
) -> None:
    rng = np.random.default_rng(5)
    training, held_out = (
        np.clip(rng.normal(128, 50, (count, 8, 8, 1)), 0, 255).astype(np.uint8)
        for count in (30, 20)
    )
    # Even grey is closer to every training image than these are to each other, and than the second
    # copy.
    generated = np.concatenate([grey(128), noisy(training[[7]], 60), training[[3]]])
    found = audit(generated, training, held_out, network)
    assert [pair for pair in found.nearest if pair[0]] == [(2, 3), (1, 7)]
    assert found.nearest[-1][0] == 0
    rows = draw_nearest_pairs(found, generated, training)
    assert list(rows) == ["generated", "training"]
    np.testing.assert_array_equal(rows["generated"], generated[[2, 1, 0]])
    np.testing.assert_array_equal(rows["training"][:2], training[[3, 7]])


def test_audits_merge_by_generated_images(network: FeatureNetwork, tasks: list[Task]) -> None:
    train, test = tasks[5].train, tasks[5].test
    silent = audit(test[:10] // 2, train, test, network)
    copied = audit(train[:90], train, test, network)
    assert not silent.fires
    assert copied.fires
    merged = merge_audits([silent, copied])
    for space in ("pixels", "features"):
        shares = [getattr(one, space).share for one in (silent, copied)]
        assert merged.pop(f"{space}_share") == pytest.approx(
            (10 * shares[0] + 90 * shares[1]) / 100
        )
    assert merged == {"generated": 100, "quantile": 0.05, "fires": True}
    assert not merge_audits([silent])["fires"]
    for impossible in ([], [silent, replace(copied, pixels=replace(copied.pixels, quantile=0.1))]):
        with pytest.raises(ValueError, match="one quantile"):
            merge_audits(impossible)


def test_either_space_is_enough_to_fire(network: FeatureNetwork, tasks: list[Task]) -> None:
    silent = audit(tasks[5].test[:10] // 2, tasks[5].train, tasks[5].test, network)
    assert replace(silent, features=replace(silent.features, share=1.0)).fires
    assert replace(silent, pixels=replace(silent.pixels, share=1.0)).fires
    assert not replace(silent, pixels=replace(silent.pixels, share=silent.pixels.tolerance)).fires

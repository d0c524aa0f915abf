"""Owners whose images differ in size and in channels, in one federation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import srfed
from srfed.data import load_tasks
from srfed.data.images import Images
from srfed.data.stored import store_tasks
from srfed.errors import UserError
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.features.statistics import FeatureStatistics, merge_statistics
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.evaluation.metrics.nearest_neighbour import class_agreement
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.reporting.pictures import draw_grid
from srfed.runs.adapting import fitting_task
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state
from support.errors import message_of
from support.stores import edit_manifest
from support.tiny_run import tiny_config

SHAPES = {"grey": (8, 8, 1), "wide": (9, 12, 3), "large": (16, 16, 3)}
SETTINGS: dict[str, Any] = {
    "training.local_steps": 2,
    "training.batch_size": 8,
    "federation.rounds": 2,
    "federation.server_optimizer": "average",
    "evaluation.every": 1,
}


def images(count: int, shape: tuple[int, ...], seed: int) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def task(name: str, shape: tuple[int, int, int], seed: int = 0) -> srfed.Task:
    return srfed.Task(name, images(20, shape, seed), images(6, shape, seed + 100))


TASKS = [task(name, shape, place) for place, (name, shape) in enumerate(SHAPES.items())]


def evaluations(run: srfed.Run) -> list[Mapping[str, Any]]:
    return [line for line in run.metrics() if line["kind"] == "evaluation"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> srfed.Run:
    path = tmp_path_factory.mktemp("mixed") / "run"
    return srfed.train(tiny_config(SETTINGS), TASKS, run_dir=path)


def test_a_round_is_the_mean_of_what_each_owner_learns_from_images_of_its_own_shape(
    mixed: srfed.Run, tmp_path: Path
) -> None:
    config = tiny_config(SETTINGS)
    found = []
    for place, own in enumerate(TASKS):
        model = build_model(config, own.shape[-1])
        partition = build_partition(config, model)
        state = initial_state(model, partition)
        trainer = LocalTrainer(
            config,
            model,
            partition,
            build_objective(config, torch.device("cpu")),
            own.name,
            own.train,
            place,
        )
        shared = partition.take_shared(build_model(config, own.shape[-1]).state_dict())
        found.append(trainer.train(1, Shared(shared), state).shared)
    once = srfed.train(
        tiny_config({**SETTINGS, "federation.rounds": 1}), TASKS, run_dir=tmp_path / "run"
    )
    folder = RunFolder.open(once.path)
    trained = ServerCheckpoints(folder.server, 1).load_last().shared.weights
    begun, moved = build_model(config, 1).state_dict(), 0.0
    for name in found[0]:
        mean = sum(one[name].double() for one in found) / len(found)
        torch.testing.assert_close(trained[name], mean.float(), rtol=0, atol=1e-7)
        moved = max(moved, float((trained[name] - begun[name]).abs().max()))
    assert moved > 1e-3


def test_each_owner_samples_and_is_shown_in_its_own_shape(mixed: srfed.Run) -> None:
    for name, shape in SHAPES.items():
        assert mixed.sample(name, 3).shape == (3, *shape)
    pictures = sorted((mixed.path / "samples").glob("round-*.png"))
    with Image.open(pictures[-1]) as file:
        assert file.size[1] == 3 * (64 + 2), "a row as high as the largest tile, 16 px times 4"
    scored = evaluations(mixed)
    assert scored[-1]["final"]
    assert {*scored[-1]["ssim_by_client"]} == {*SHAPES}
    assert scored[-1]["ssim_window"] == 7, "of the smallest images"
    record = mixed.evaluate(30)
    assert record["scores"][0]["images"] == 30
    assert {*record["by_task"]} == {*SHAPES}


def test_statistics_and_samples_give_one_score(mixed: srfed.Run, tmp_path: Path) -> None:
    other = srfed.train(
        tiny_config({**SETTINGS, "evaluation.mode": "statistics"}),
        TASKS,
        run_dir=tmp_path / "run",
    )
    for theirs, ours in zip(evaluations(other), evaluations(mixed), strict=True):
        assert theirs["score"] == pytest.approx(ours["score"], rel=1e-9)
        assert theirs["floor"] == pytest.approx(ours["floor"], rel=1e-9)


def test_a_run_goes_on_with_each_owners_shape_and_the_same_bits(
    mixed: srfed.Run, tmp_path: Path
) -> None:
    first = tiny_config({**SETTINGS, "federation.rounds": 1})
    run = srfed.train(first, TASKS, run_dir=tmp_path / "run")
    again = srfed.train(tiny_config(SETTINGS), TASKS, run_dir=run.path, resume=True)
    ours, theirs = again._trained.shared, mixed._trained.shared
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in SHAPES:
        np.testing.assert_array_equal(again.sample(name, 2), mixed.sample(name, 2))
    other = [TASKS[0], task("wide", (9, 13, 3), 1), TASKS[2]]
    assert "the tasks are others than those" in message_of(
        lambda: srfed.train(tiny_config(SETTINGS), other, run_dir=run.path, resume=True)
    )


@pytest.mark.slow
def test_ray_gives_the_same_bits(mixed: srfed.Run, tmp_path: Path) -> None:
    config = tiny_config({**SETTINGS, "resources.backend": "ray"})
    run = srfed.train(config, TASKS, run_dir=tmp_path / "run")
    ours, theirs = run._trained.shared, mixed._trained.shared
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    np.testing.assert_array_equal(run.sample("wide", 2), mixed.sample("wide", 2))


def test_sizes_may_differ_where_everything_is_shared_and_channels_may_not(tmp_path: Path) -> None:
    config = tiny_config({**SETTINGS, "model.exclusive_stages": "none", "evaluation.every": 0})
    text = message_of(lambda: srfed.train(config, TASKS, run_dir=tmp_path / "refused"))
    assert "images of 1 and of 3 channels cannot share 'stem.weight'; allowed: one number" in text
    assert not (tmp_path / "refused").exists()
    run = srfed.train(config, TASKS[1:], run_dir=tmp_path / "run")
    assert run.sample("large", 1).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("method", ["pooled", "one_task", "balanced"])
def test_one_party_trains_images_of_one_shape(tmp_path: Path, method: str) -> None:
    stages = "none" if method == "pooled" else 1
    config = tiny_config(
        {
            **SETTINGS,
            "training.method": method,
            "training.centralised_batch_size": 8,
            "federation.clients": 2,
            "model.exclusive_stages": stages,
        }
    )
    text = message_of(lambda: srfed.train(config, TASKS[1:], run_dir=tmp_path / "run"))
    assert (
        f"training.method = {method} needs images of one height x width x channels: task wide has "
        "9 x 12 x 3, task large 16 x 16 x 3; set data.image_size and data.channels"
    ) in text
    assert not (tmp_path / "run").exists()


def test_a_new_task_has_one_of_the_runs_shapes(mixed: srfed.Run, tmp_path: Path) -> None:
    new = task("new", (9, 12, 3), 9)
    assert mixed.adapt(new, out=tmp_path / "new", steps=2, samples=4).sample(0, 1).shape == (
        1,
        9,
        12,
        3,
    )
    text = message_of(fitting_task, mixed._trained.shapes, task("new", (9, 9, 1)))
    assert "the run has 8 x 8 x 1 and 9 x 12 x 3 and 16 x 16 x 3" in text


def test_a_checkpoint_of_before_has_one_shape_for_all(tmp_path: Path) -> None:
    tasks = [task("a", (8, 8, 1)), task("b", (8, 8, 1), 1)]
    config = tiny_config({**SETTINGS, "evaluation.every": 0})
    run = srfed.train(config, tasks, run_dir=tmp_path / "run")
    expected = run.sample("b", 2)
    for folder in RunFolder.open(run.path).server.glob("round-*"):
        edit_manifest(folder, lambda manifest: manifest.update(shape=manifest.pop("shapes")["a"]))
    np.testing.assert_array_equal(srfed.open_run(run.path).sample("b", 2), expected)
    edit_manifest(folder, lambda manifest: manifest.update(shapes={"a": [8, 8]}))
    with pytest.raises(UserError, match="is damaged: 'shape' is"):
        srfed.open_run(run.path)


def test_tasks_of_several_shapes_are_kept_and_read_again(tmp_path: Path) -> None:
    store_tasks(tmp_path / "tasks.npz", TASKS)
    config = tiny_config({"data.dataset": "npz", "data.dir": str(tmp_path / "tasks.npz")}).data
    for read, own in zip(load_tasks(config, 3), TASKS, strict=True):
        assert read.name == own.name
        np.testing.assert_array_equal(read.train, own.train)
        np.testing.assert_array_equal(read.test, own.test)
    arrays = dict(np.load(tmp_path / "tasks.npz"))
    for change, words in (
        ({"label_names": None}, "has train_images_0 and no label_names"),
        ({"train_images_1": None}, "has no array train_images_1"),
        ({"train_images_2": np.zeros((3, 8))}, "train_images_2 is float64 (3, 8); allowed"),
        ({"test_images_2": images(3, (5, 5, 3), 0)}, "are of different size"),
    ):
        np.savez(
            tmp_path / "odd.npz", **{k: v for k, v in {**arrays, **change}.items() if v is not None}
        )
        odd = config.model_copy(update={"dir": str(tmp_path / "odd.npz")})
        assert words in message_of(load_tasks, odd, 3)
    resized = config.model_copy(update={"image_size": 8, "channels": 1})
    assert {one.shape for one in load_tasks(resized, 3)} == {(8, 8, 1)}


def test_statistics_of_grey_images_count_as_those_of_the_same_images_in_colour() -> None:
    network = EmbeddedFeatures()
    grey, colour = images(30, (8, 8, 1), 1), images(25, (10, 10, 3), 2)
    in_colour = np.repeat(grey, 3, axis=-1)
    merged = merge_statistics(
        [FeatureStatistics.of(network(grey)), FeatureStatistics.of(network(colour))]
    )
    whole = FeatureStatistics.of(np.concatenate([network(in_colour), network(colour)]))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-6, atol=1e-6)
    other = FeatureStatistics.of(network(images(40, (8, 8, 3), 3)))
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(whole, other))


def test_the_judge_does_not_know_tasks_by_the_shape_of_their_images() -> None:
    """Zeros at 8 px and ones at 16 px in colour; samples of each look like the other's."""
    zeros, ones = load_tasks(tiny_config().data, 2)

    def enlarged(pictures: Images) -> Images:
        return pictures.repeat(2, axis=1).repeat(2, axis=2).repeat(3, axis=3)

    tasks = [zeros, srfed.Task(ones.name, enlarged(ones.train), enlarged(ones.test))]
    right = {zeros.name: zeros.test, ones.name: enlarged(ones.test)}
    wrong = {zeros.name: ones.test, ones.name: enlarged(zeros.test)}
    assert min(class_agreement(tasks, right).values()) > 0.9
    assert max(class_agreement(tasks, wrong).values()) < 0.1


def test_rows_of_a_grid_may_differ_in_shape_and_one_may_be_empty() -> None:
    rows = {
        "a": np.full((2, 8, 8, 1), 255, np.uint8),
        "b": np.full((3, 70, 20, 3), 128, np.uint8),
        "c": np.empty((0, 8, 8, 1), np.uint8),
    }
    picture = draw_grid(rows)
    assert picture.shape[0] == 3 * 72
    assert picture.shape[1] > 3 * (56 + 2)

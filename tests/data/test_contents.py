"""What is said of images that hold next to nothing, are laid out otherwise, or are few."""

from pathlib import Path

import numpy as np
import pytest

import srfed
from srfed.config import DataConfig
from srfed.data import Task, describe_contents, load_task, load_tasks
from srfed.data.given import given_tasks
from srfed.data.own_images import load_own_task
from srfed.data.stored import check_tasks
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.references import References
from srfed.runs.checks import check_held_out, check_simulation
from srfed.storage.metrics_log import MetricsLog
from support.errors import message_of
from support.images import folder, random_images, save
from support.tiny_run import CHEAP, tiny_config


def grey(*levels: int, varied: int = 0) -> np.ndarray:
    """Images of these levels, each with one pixel that is so much brighter."""
    images = np.repeat(np.array(levels, np.uint8), 64).reshape(-1, 8, 8, 1)
    images[:, 3, 3] += np.uint8(varied)
    return images


def test_images_that_hold_nothing_are_told_by_task_with_share_and_range() -> None:
    tasks = [
        Task("sound", random_images(6, 8, 8, 1), random_images(2, 8, 8, 1, seed=1)),
        Task("flat", np.concatenate([grey(9, 70), random_images(5, 8, 8, 1)]), grey(200)),
        Task("dark", grey(1, 2, 3, varied=12), grey(4, varied=12)),
        Task("light", grey(240, 245, varied=9), random_images(2, 8, 8, 1)),
        Task("same", grey(100, 100, 100, varied=80), grey(100, varied=80)),
        Task("drawings", grey(0, 0, 0), grey(0), 0, grey(0)),
    ]
    flat, dark, light, same, drawings, advice = describe_contents(DataConfig(), tasks)
    assert flat.startswith("images of flat: 3 of 8 (38%) are of one value; values from 0 to 25")
    assert dark == (
        "images of dark: 4 of 4 (100%) are nearly black; values from 1 to 16 of 0 to 255"
    )
    assert "light: 2 of 4 (50%) are nearly white" in light
    assert same.startswith("images of same: all 4 are identical; values from 100 to 180")
    assert "drawings: 5 of 5 (100%) are of one value, all 5 are identical" in drawings
    assert "data.background = 0" in advice
    assert describe_contents(DataConfig(), tasks[:1]) == []
    many = [Task(f"t{k}", grey(0), grey(0)) for k in range(30)]
    assert "20 tasks more" in describe_contents(DataConfig(), many)[-2]


def test_black_drawings_on_a_transparent_ground_are_told_before_training_and_seen_on_white(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        drawing = np.zeros((8, 8, 4), np.uint8)
        drawing[number, :, 3] = 255
        for side in ("train", "test"):
            save(tmp_path / "pens" / side / f"{number}.png", drawing)
    config = tiny_config(
        {"data.dataset": "folder", "data.dir": str(tmp_path), "federation.clients": 1, **CHEAP}
    )
    check_simulation(config)
    assert "pens: 12 of 12 (100%) are of one value, all 12 are identical" in capsys.readouterr().err
    white = load_task(folder(tmp_path, background=255), 0)
    for number, image in enumerate(white.train):
        expected = np.full((8, 8, 3), 255)
        expected[number] = 0
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("shape", [(10, 8, 32, 32), (10, 3, 16, 16), (10, 1, 28, 28)])
def test_channels_before_the_sides_are_recognised_and_how_to_turn_them_is_said(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    images = random_images(*shape)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.zeros(10, int))
    np.savez(tmp_path / "own.npz", train_images=images)
    texts = [
        message_of(load_tasks, DataConfig(dataset="npz", dir=str(tmp_path / "x.npz")), 1),
        message_of(load_own_task, DataConfig(), tmp_path / "own.npz", "a"),
        message_of(check_tasks, [Task("a", images, images)]),
    ]
    for text in texts:
        assert str(shape) in text
        assert "looks like N x C x H x W: turn it with images.transpose(0, 2, 3, 1)" in text
    if shape[1] == 3:
        text = message_of(given_tasks, DataConfig(), {"a": list(images)})
        assert "looks like C x H x W: turn it with image.transpose(1, 2, 0)" in text
        turned = images.transpose(0, 2, 3, 1)
        (task,) = given_tasks(DataConfig(), {"a": list(turned)})
        assert task.shape == (16, 16, 3)


def test_large_pictures_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "one" / "0.png", np.zeros((15, 600), np.uint8))
    text = message_of(load_task, folder(tmp_path), 0)
    assert "600 x 15 px" in text
    assert "data.image_size is null; allowed: sides of up to 512 px" in text
    wide = np.zeros((2, 15, 600, 1), np.uint8)
    assert "600 x 15 px" in message_of(check_tasks, [Task("a", wide, wide)])


def test_too_few_images_for_a_score_name_the_setting_and_the_way_out() -> None:
    lone = Task("a", random_images(4, 8, 8, 1), random_images(1, 8, 8, 1))
    check_held_out(tiny_config(), [lone, lone])
    text = message_of(check_held_out, tiny_config(), [lone])
    assert "data.test_fraction = 0.2 gives 1 held-out image of task a" in text
    statistics = tiny_config({"evaluation.mode": "statistics"})
    text = message_of(check_held_out, statistics, [lone, lone])
    assert "evaluation.mode = statistics needs 2 of each task" in text
    assert "evaluation.mode=samples" in text


def test_owners_of_two_pictures_run_together_and_one_image_has_no_score_of_its_own(
    tmp_path: Path,
) -> None:
    tasks = [
        Task(f"owner-{k}", random_images(1, 8, 8, 1, seed=k), random_images(1, 8, 8, 1, seed=9 + k))
        for k in range(2)
    ] + [Task("more", random_images(4, 8, 8, 1, seed=5), random_images(3, 8, 8, 1, seed=6))]
    config = tiny_config({**CHEAP, "federation.rounds": 1, "training.batch_size": 1})
    run = srfed.train(config, tasks, run_dir=tmp_path / "run")
    (evaluation,) = MetricsLog(tmp_path / "run" / "metrics.jsonl").evaluations()
    assert set(evaluation["score_by_client"]) == {"more"}
    assert evaluation["references"] == 5
    together = References(EmbeddedFeatures(), {task.name: task.test for task in tasks})
    generated = {name: random_images(2, 8, 8, 1, seed=20) for name in ("owner-0", "more")}
    assert set(together.score(generated).per_task) == {"more"}
    assert run.tasks

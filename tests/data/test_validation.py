"""Images set aside to choose a round by: which, that nobody trains on them, that they are kept."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import srfed
from srfed.config import DataConfig, RunConfig, load_config
from srfed.data import ImageRecord, Task, accept_images, load_own_task, load_task, load_tasks
from srfed.data.record import fingerprints, read_records, write_records
from srfed.data.tasks import load_recorded_tasks, record_tasks
from srfed.data.validation import set_aside
from srfed.errors import UserError
from srfed.storage.run_folder import RunFolder
from support.errors import message_of
from support.images import random_images, save
from support.tiny_run import begin, run_in_process, tiny_config

NAME = "clinic-7"
MANY = random_images(60, 5, 5, 1)


def contents(images: np.ndarray) -> set[bytes]:
    return {bytes(image) for image in images}


def apart(
    count: int, images: np.ndarray, known: ImageRecord | None = None
) -> tuple[np.ndarray, np.ndarray]:
    return set_aside(DataConfig(validation_images=count), NAME, images, known)


def test_without_the_setting_nothing_changes() -> None:
    task = load_task(DataConfig(), 3)
    assert task.validation.shape == (0, 8, 8, 1)
    assert len(Task(NAME, task.train, task.test).validation) == 0
    record = ImageRecord.of(task)
    assert record.fingerprint == ImageRecord(record.train, record.test).fingerprint


@pytest.mark.parametrize(("count", "allowed"), [(-1, "0"), (1, "0, or 2 and more"), (2.5, "")])
def test_an_impossible_number_is_refused(count: float, allowed: str) -> None:
    text = message_of(load_config, None, [f"data.validation_images={count}"])
    assert "data.validation_images" in text
    assert allowed in text


def test_images_per_task_counts_them_and_the_test_images_stay() -> None:
    whole = load_task(DataConfig(images_per_task=20), 3)
    task = load_task(DataConfig(images_per_task=20, validation_images=6), 3)
    assert (len(task.train), len(task.validation)) == (14, 6)
    np.testing.assert_array_equal(task.test, whole.test)
    lowest = sorted(fingerprints(whole.train))[:6]
    assert sorted(fingerprints(task.validation)) == lowest
    chosen = np.isin(fingerprints(whole.train), lowest)
    np.testing.assert_array_equal(task.train, whole.train[~chosen])
    np.testing.assert_array_equal(task.validation, whole.train[chosen])
    (again,) = load_tasks(DataConfig(images_per_task=20, validation_images=6), 4)[3:]
    np.testing.assert_array_equal(again.validation, task.validation)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.lists(st.integers(0, 29), min_size=1, max_size=60))
def test_no_image_is_on_both_sides_and_none_is_lost(count: int, chosen: list[int]) -> None:
    images = MANY[chosen]
    different = len(contents(images))
    if len(images) <= count or different == 1:
        text = message_of(apart, count, images)
        assert f"data.validation_images = {count}" in text
        assert f"the {len(images)} training images of task {NAME}" in text
        return
    if different < len(images):
        with suppress(UserError):  # the last equal images can take all that would be left
            check_sides(count, images)
        return
    check_sides(count, images)


def check_sides(count: int, images: np.ndarray) -> None:
    train, validation = apart(count, images)
    assert len(train) >= 1
    assert len(validation) >= count
    assert not contents(train) & contents(validation)
    assert sorted(map(bytes, [*train, *validation])) == sorted(map(bytes, images))
    if len(contents(images)) == len(images):
        assert len(validation) == count


def test_their_order_does_not_matter() -> None:
    one, other = apart(5, MANY), apart(5, MANY[::-1])
    assert contents(one[1]) == contents(other[1])


def test_a_known_image_stays_where_it_was() -> None:
    train, validation = apart(5, MANY[:20])
    known = ImageRecord.of(Task(NAME, train, MANY[:0], 0, validation))
    more_train, more_validation = apart(5, MANY, known)
    assert contents(more_validation) == contents(validation)
    assert contents(more_train) == contents(MANY) - contents(validation)
    # One is gone: an image that is new comes before one that was trained on.
    gone = np.concatenate([train, validation[1:], MANY[20:22]])
    _, filled = apart(5, gone, known)
    assert contents(validation[1:]) < contents(filled)
    assert contents(filled) - contents(validation) < contents(MANY[20:22])


def test_records_tell_them_apart_and_survive_their_file(tmp_path: Path) -> None:
    train, validation = apart(4, MANY[:20])
    with_some = ImageRecord.of(Task(NAME, train, MANY[30:33], 0, validation))
    without = ImageRecord.of(Task(NAME, train, MANY[30:33]))
    write_records(tmp_path / "images.json", {"a": with_some, "b": without})
    assert read_records(tmp_path / "images.json") == {"a": with_some, "b": without}
    assert with_some.fingerprint != without.fingerprint
    assert without.differences(with_some) == "4 new for validation"
    assert with_some.differences(without) == "4 gone from validation"
    moved = Task(NAME, np.concatenate([train, validation[:1]]), MANY[30:33], 0, validation[1:])
    assert with_some.differences(ImageRecord.of(moved)) == "1 moved from validation to training"
    assert not any(with_some.held_out[name] for name in with_some.validation)


def test_a_change_of_them_is_noticed(tmp_path: Path) -> None:
    images = random_images(24, 6, 6, 1)
    arrays = {"train_images": images, "train_labels": np.repeat([0, 1], 12)}
    arrays |= {"test_images": random_images(4, 6, 6, 1, seed=9), "test_labels": [0, 0, 1, 1]}
    np.savez(tmp_path / "data.npz", **arrays)
    config = DataConfig(dataset="npz", dir=str(tmp_path / "data.npz"), validation_images=3)
    tasks = load_tasks(config, 2)
    record_tasks(tmp_path / "images.json", tasks)
    again = load_recorded_tasks(config, 2, tmp_path / "images.json")
    np.testing.assert_array_equal(again[1].validation, tasks[1].validation)
    images[np.flatnonzero(np.isin(fingerprints(images), fingerprints(tasks[1].validation)))[0]] += 1
    np.savez(tmp_path / "data.npz", **arrays)
    text = message_of(load_recorded_tasks, config, 2, tmp_path / "images.json")
    assert "class-1" in text
    assert "gone from validation" in text


def test_own_images_are_divided_alike_and_kept_on_record(tmp_path: Path) -> None:
    for number, pixels in enumerate(random_images(16, 8, 8)):
        save(tmp_path / "own" / f"{number:02d}.png", pixels)
    config, store = DataConfig(validation_images=3), tmp_path / "store"
    first = load_own_task(config, tmp_path / "own", NAME, store)
    assert len(first.validation) == 3
    for task in (
        load_own_task(config, tmp_path / "own", NAME, store),  # from the decoded copy
        load_own_task(config, tmp_path / "own", NAME),
    ):
        np.testing.assert_array_equal(task.train, first.train)
        np.testing.assert_array_equal(task.validation, first.validation)
    # Under another number the images are other ones, with a record of their own.
    whole = load_own_task(DataConfig(), tmp_path / "own", NAME, store)
    assert contents(whole.train) == contents(first.train) | contents(first.validation)
    assert len(read_records(store / "images.json")) == 2
    for number, pixels in enumerate(random_images(6, 8, 8, seed=1)):
        save(tmp_path / "own" / f"new-{number}.png", pixels)
    assert "new for training" in message_of(load_own_task, config, tmp_path / "own", NAME, store)
    assert "new for training" in accept_images(config, tmp_path / "own", NAME, store)
    later = load_own_task(config, tmp_path / "own", NAME, store)
    assert contents(later.validation) == contents(first.validation)


def test_a_rehearsed_site_sets_the_same_images_aside_as_a_simulated_client(tmp_path: Path) -> None:
    """A rehearsal gives each site the simulated client's training and validation images in one."""
    config = DataConfig(images_per_task=30, validation_images=6)
    task = load_task(config, 4)
    whole = np.concatenate([task.train, task.validation])
    np.savez(tmp_path / "own.npz", train_images=whole, test_images=task.test)
    site = load_own_task(config, tmp_path / "own.npz", NAME, tmp_path / "store")
    assert ImageRecord.of(site) == ImageRecord.of(task)


def test_a_run_trains_without_them_and_another_number_is_another_run(tmp_path: Path) -> None:
    settings = {
        "data.images_per_task": 20,
        "data.validation_images": 4,
        "federation.rounds": 1,
        "evaluation.every": 0,
    }
    run = run_in_process(begin(tmp_path / "run", settings))
    assert [line["images"] for line in srfed.open_run(run.path).metrics()[:1]] == [96]
    assert [task.images for task in tasks_of(run)] == [16, 16, 16]
    assert all(len(record.validation) == 4 for record in read_records(run.images).values())
    other = tiny_config(settings | {"data.validation_images": 5})
    assert "data.validation_images" in message_of(run.reconfigure, other)
    # The full training set, which scores are against too, is whole.
    assert srfed.open_run(run.path).evaluate(12, ssim_images=2)["images_per_task"] == 16


def tasks_of(run: RunFolder) -> list[srfed.records.TaskInfo]:
    from srfed.storage.metrics_log import MetricsLog

    return MetricsLog(run.metrics).tasks()


def test_tasks_given_as_arrays_are_divided_by_the_setting_alone(tmp_path: Path) -> None:
    loaded = load_tasks(DataConfig(images_per_task=20), 2)
    tasks = [srfed.Task(task.name, task.train, task.test) for task in loaded]
    config = with_validation(tiny_config({"federation.clients": 2, "federation.rounds": 1}))
    run = srfed.train(config, tasks, run_dir=tmp_path / "run")
    (kept, _) = load_tasks(run.config.data, 2)
    assert (len(kept.train), len(kept.validation)) == (17, 3)
    assert srfed.train(config, tasks, run_dir=tmp_path / "run", resume=True).round == 1
    own = [srfed.Task("a", tasks[0].train, tasks[0].test, 0, tasks[0].train[:2])]
    with pytest.raises(UserError, match="2 validation images of its own"):
        srfed.train(config, own, run_dir=tmp_path / "other")


def with_validation(config: RunConfig) -> RunConfig:
    return config.model_copy(
        update={"data": config.data.model_copy(update={"validation_images": 3})}
    )

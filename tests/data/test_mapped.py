"""Images that memory need not hold: the same images, the same training, from a file."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import srfed
from srfed.data import load_task, load_tasks, mapped
from srfed.data.given import given_tasks
from srfed.data.mapped import ImageCollector, chosen_images, is_mapped, map_member
from srfed.data.source import split_by_content
from srfed.storage.run_folder import RunFolder
from support.errors import message_of
from support.tiny_run import CHEAP, all_bits, tiny_config

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
DATA = tiny_config().data


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of ten images."""
    monkeypatch.setattr(mapped, "LARGEST_IN_MEMORY", 10 * 64)
    monkeypatch.setattr(mapped, "_AT_ONCE", 3 * 64)


def one_by_one() -> Iterator[np.ndarray]:
    """No length, no index, and only once."""
    yield from IMAGES


@pytest.mark.usefixtures("small_memory")
def test_images_that_come_one_by_one_are_kept_in_a_file() -> None:
    (task,) = given_tasks(DATA, {"clinic": one_by_one()})
    train, test = split_by_content(DATA, "clinic", IMAGES)
    assert is_mapped(task.train)
    assert not is_mapped(task.test)  # few enough
    assert np.array_equal(task.train, train)
    assert np.array_equal(task.test, test)


def test_a_few_are_kept_in_memory() -> None:
    (task,) = given_tasks(DATA, {"clinic": one_by_one()})
    assert not is_mapped(task.train)
    assert np.array_equal(task.train, split_by_content(DATA, "clinic", IMAGES)[0])


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("count", [0, 5, 35])
def test_choosing_among_mapped_images_is_choosing_among_images(count: int) -> None:
    collector = ImageCollector()
    for image in IMAGES:
        collector.add(image[None])
    chosen = np.random.default_rng(count).permutation(40) < count
    found = chosen_images(collector.images(), chosen)
    assert np.array_equal(found, IMAGES[chosen])
    assert is_mapped(found) == (count == 35)


@pytest.mark.usefixtures("small_memory")
def test_a_folder_of_many_pictures_is_decoded_into_a_file(tmp_path: Path) -> None:
    for split, images in (("train", IMAGES[:30]), ("test", IMAGES[30:])):
        for number, image in enumerate(images):
            file = tmp_path / "clinic" / split / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(file)
    task = load_task(DATA.model_copy(update={"dataset": "folder", "dir": str(tmp_path)}), 0)
    assert is_mapped(task.train)
    assert np.array_equal(task.train, IMAGES[:30])
    assert np.array_equal(task.test, IMAGES[30:])


@pytest.mark.usefixtures("small_memory")
def test_an_array_of_an_archive_is_mapped_where_it_lies_plain(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    arrays = {"first": np.arange(7), "images": IMAGES, "turned": np.asfortranarray(IMAGES[..., 0])}
    np.savez(file, **arrays)
    found = map_member(file, "images")
    assert found is not None
    assert is_mapped(found)
    assert np.array_equal(found, IMAGES)
    assert map_member(file, "first") is None
    assert map_member(file, "turned") is None
    np.savez_compressed(file, **arrays)
    assert map_member(file, "images") is None


@pytest.mark.usefixtures("small_memory")
def test_an_array_that_is_shorter_than_it_says_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, train_images=IMAGES, train_labels=np.zeros(40, int))
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:-64] if "images" in name else content)
    config = DATA.model_copy(update={"dataset": "npz", "dir": str(file)})
    assert "train_images is shorter than its header says" in message_of(
        lambda: load_task(config, 0)
    )


@pytest.mark.usefixtures("small_memory")
def test_no_room_for_the_images_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped.tempfile, "tempdir", str(tmp_path / "gone"))
    text = message_of(lambda: given_tasks(DATA, {"clinic": one_by_one()}))
    assert "cannot keep an owner's images in" in text
    assert "TMPDIR" in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resources.channels_last": True},
        {"training.method": "pooled", "model.exclusive_stages": "none"},
    ],
    ids=["NCHW", "NHWC", "pooled"],
)
def test_a_run_on_mapped_images_has_the_bits_of_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    settings = {
        **CHEAP,
        "federation.rounds": 1,
        "federation.clients": 2,
        "data.validation_images": 2,
        **settings,
    }
    config = tiny_config(settings)
    tasks = load_tasks(config.data.model_copy(update={"validation_images": 0}), 2)
    plain = srfed.train(config, tasks, run_dir=tmp_path / "plain")
    monkeypatch.setattr(mapped, "LARGEST_IN_MEMORY", 640)
    given = {task.name: {"train": iter(task.train), "test": iter(task.test)} for task in tasks}
    other = srfed.train(config, given, run_dir=tmp_path / "mapped")
    stored = load_tasks(other.config.data, 2)
    assert all(is_mapped(task.train) for task in stored)
    assert all_bits(RunFolder.open(plain.path)) == all_bits(RunFolder.open(other.path))

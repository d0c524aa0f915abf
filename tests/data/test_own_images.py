"""A site's own images: a folder or an .npz file, split as the data sets are, decoded once and then
copied.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Context, RecordDict
from PIL import Image

from srfed.config import DataConfig
from srfed.data import (
    RECORD_FILE,
    Task,
    accept_images,
    describe_images,
    describe_own_images,
    load_own_task,
    load_task,
    task_names,
)
from srfed.errors import UserError
from srfed.federation.site import Site, deployed_site, own_task, site_of
from support.errors import message_of
from support.images import held_out, random_images, save
from support.tiny_run import files_of_at_most, tiny_config

NAME = "clinic-7"
SMALL = DataConfig(image_size=6, channels=1)


def flat(value: int, *shape: int) -> np.ndarray:
    """A picture that its value tells from the others."""
    return np.full(shape or (8, 8), value, np.uint8)


def values(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def assert_same_images(first: Task, second: Task) -> None:
    for name in ("train", "test"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype == np.uint8
        np.testing.assert_array_equal(one, other, err_msg=name)


def assert_split_by_content(task: Task, images: np.ndarray, fraction: float) -> None:
    """The task is these images (N x H x W x C), in their order, divided as the rule in docs/data.md
    says.
    """
    out = held_out(images, fraction)
    assert min(out.sum(), (~out).sum()) >= 2, "otherwise the least number would decide"
    np.testing.assert_array_equal(task.train, images[~out])
    np.testing.assert_array_equal(task.test, images[out])


def mixed_pictures(folder: Path) -> Path:
    """Twelve pictures of different sizes, modes and formats, in folders three deep."""
    save(folder / "a.png", random_images(12, 10, seed=1))
    save(folder / "b.jpg", random_images(15, 20, 3, seed=2))
    save(folder / "C.BMP", random_images(9, 9, 3, seed=3))
    save(folder / "sub" / "alpha.png", random_images(11, 14, 4, seed=4))
    save(
        folder / "sub" / "deep" / "grey16.tif",
        random_images(10, 10, seed=5).astype(np.uint16) * 200,
    )
    save(folder / "sub" / "deep" / "lossy.webp", random_images(16, 9, 3, seed=6))
    for number in range(6):
        save(folder / "more" / f"{number}.jpeg", random_images(10 + number, 8, seed=10 + number))
    return folder


# --- Folders ---


def test_a_folder_is_read_to_its_depths_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for value, name in enumerate(["a.png", "b/1.png", "b/2/x.png", "b.png", "c.tif", "d/z.bmp"]):
        save(tmp_path / name, flat(value))
    for hidden in (".x.png", ".cache/y.png", "b/.thumbs/z.png"):
        save(tmp_path / hidden, flat(99))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    task = load_own_task(DataConfig(test_fraction=0.5), tmp_path, NAME)
    assert_split_by_content(task, np.array([flat(value, 8, 8, 1) for value in range(6)]), 0.5)
    assert (task.index, task.name) == (-1, NAME)


def test_pixels_arrive_as_they_were_saved(tmp_path: Path) -> None:
    pixels = random_images(5, 7, 9, 3)
    for number, picture in enumerate(pixels):
        save(tmp_path / f"{number}.png", picture)
    task = load_own_task(DataConfig(), tmp_path, NAME)
    assert sorted(map(bytes, [*task.train, *task.test])) == sorted(map(bytes, pixels))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_size": 8, "channels": 1},
        {"image_size": 6, "channels": 3},
        {"image_size": 8, "channels": 3, "images_per_task": 4},
        {"image_size": 5, "channels": 1, "test_fraction": 0.5},
        {"image_size": 9, "channels": 1, "test_fraction": 0.01, "images_per_task": 11},
    ],
    ids=str,
)
@pytest.mark.parametrize("splits", [False, True], ids=["one-folder", "train-and-test"])
def test_a_folder_becomes_what_the_folder_data_set_makes_of_it(
    tmp_path: Path, settings: dict[str, Any], splits: bool
) -> None:
    """The data set has a folder for each task; below it, or below ``train`` and ``test``, are the
    same pictures.
    """
    parts = ["train", "test"] if splits else ["."]
    for number, part in enumerate(parts):
        mixed_pictures(tmp_path / "own" / part)
        mixed_pictures(tmp_path / "parent" / part / "task")
        for folder in (tmp_path / "own" / part, tmp_path / "parent" / part / "task"):
            save(folder / "mark.png", flat(number, 12, 12))
    own = load_own_task(DataConfig(**settings), tmp_path / "own", NAME)
    size, channels = settings["image_size"], settings["channels"]
    assert own.train.shape[1:] == own.test.shape[1:] == (size, size, channels)
    reference = load_task(DataConfig(dataset="folder", dir=str(tmp_path / "parent"), **settings), 0)
    assert_same_images(own, reference)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_the_images_content_says_which_are_held_out(tmp_path: Path, fraction: float) -> None:
    for value in range(30):
        save(tmp_path / f"{value:02d}.png", flat(value))
    task = load_own_task(DataConfig(test_fraction=fraction), tmp_path, NAME)
    assert_split_by_content(task, np.array([flat(value, 8, 8, 1) for value in range(30)]), fraction)
    few = load_own_task(DataConfig(test_fraction=fraction, images_per_task=2), tmp_path, NAME)
    assert values(few.train) == values(task.train)[:2]
    assert values(few.test) == values(task.test)


def test_exactly_the_folders_train_and_test_are_the_splits(tmp_path: Path) -> None:
    for value, name in enumerate(
        ["train/b.png", "train/a/x.png", "test/c.png", "test/d/y.png", "train/e.png"]
    ):
        save(tmp_path / name, flat(value))
    save(tmp_path / ".thumbs" / "z.png", flat(99))
    task = load_own_task(DataConfig(test_fraction=0.9), tmp_path, NAME)
    assert (values(task.train), values(task.test)) == ([1, 0, 4], [2, 3])
    shutil.rmtree(tmp_path / "test")
    task = load_own_task(DataConfig(test_fraction=0.34), tmp_path, NAME)
    assert sorted(values(task.train) + values(task.test)) == [0, 1, 4]


# --- .npz files ---


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3)], ids=str)
@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"image_size": 6, "channels": 1, "images_per_task": 5}], ids=str
)
def test_an_npz_becomes_what_the_npz_data_set_makes_of_it(
    tmp_path: Path, shape: tuple[int, ...], with_test: bool, settings: dict[str, Any]
) -> None:
    train, test = random_images(10, *shape), random_images(4, *shape, seed=1)
    own: dict[str, np.ndarray] = {"train_images": train}
    labelled = {"train_images": train, "train_labels": np.zeros(10, int)}
    if with_test:
        own["test_images"] = labelled["test_images"] = test
        labelled["test_labels"] = np.zeros(4, int)
    np.savez(tmp_path / "own.npz", **own)
    np.savez_compressed(tmp_path / "labelled.npz", **labelled)
    task = load_own_task(DataConfig(**settings), tmp_path / "own.npz", NAME)
    reference = load_task(
        DataConfig(dataset="npz", dir=str(tmp_path / "labelled.npz"), **settings), 0
    )
    assert_same_images(task, reference)
    if not settings:
        whole = train.reshape(10, 8, 9, -1)
        if not with_test:
            assert len(task.train) + len(task.test) == 10
            assert {bytes(image) for image in (*task.train, *task.test)} == {
                bytes(image) for image in whole
            }
        else:
            np.testing.assert_array_equal(task.train, whole)
            np.testing.assert_array_equal(task.test, test.reshape(4, 8, 9, -1))


def test_labels_in_an_npz_are_not_looked_at(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", train_images=random_images(10, 8, 8), train_labels=np.arange(10))
    task = load_own_task(DataConfig(), tmp_path / "own.npz", NAME)
    assert len(task.train) + len(task.test) == 10


# --- Errors ---

Prepare = Callable[[Path], Path]


def prepared(name: str = "own.npz", **arrays: Any) -> Prepare:
    def prepare(folder: Path) -> Path:
        np.savez(folder / name, **arrays)
        return folder / name

    return prepare


def pictures(*named: tuple[str, np.ndarray], damage: str = "") -> Prepare:
    def prepare(folder: Path) -> Path:
        for name, pixels in named:
            save(folder / "own" / name, pixels)
        if damage:
            file = folder / "own" / damage
            file.write_bytes(file.read_bytes()[:20])
        return folder / "own"

    return prepare


def empty_test_folder(folder: Path) -> Path:
    (folder / "own" / "test").mkdir(parents=True)
    return pictures(("train/a.png", flat(1)))(folder)


def half_an_archive(folder: Path) -> Path:
    path = prepared(train_images=random_images(9, 8, 8))(folder)
    path.write_bytes(path.read_bytes()[:200])
    return path


OBJECTS = np.array([[1, 2], None], dtype=object)
ERRORS: dict[str, tuple[Prepare, dict[str, Any], list[str]]] = {
    "missing": (
        lambda folder: folder / "nowhere",
        {},
        ["nowhere does not exist", "a folder of images or an .npz"],
    ),
    "an empty folder": (pictures(), {}, ["does not exist"]),
    "a folder without pictures": (pictures((".hidden.png", flat(1))), {}, ["own holds no images"]),
    "an empty test folder": (empty_test_folder, {}, ["own/test holds no images"]),
    "a damaged picture": (
        pictures(("a.png", flat(1)), ("b.png", flat(2)), damage="b.png"),
        {},
        ["cannot read image", "b.png"],
    ),
    "different sizes": (
        pictures(("a.png", flat(1)), ("b.png", flat(2, 9, 8))),
        {},
        ["differ in size", "a.png is 8 x 8", "b.png is 8 x 9", "set data.image_size"],
    ),
    "grey and colour": (
        pictures(("a.png", flat(1)), ("b.png", flat(2, 8, 8, 3))),
        {},
        ["grey and colour", "set data.channels"],
    ),
    "tiny pictures": (
        pictures(("a.png", flat(1, 4, 4)), ("b.png", flat(1, 4, 4))),
        {},
        ["4 x 4 px are too small"],
    ),
    "one picture": (
        pictures(("a.png", flat(1))),
        {},
        ["leaves nothing to train on", "1 images of task clinic-7"],
    ),
    "too few pictures": (
        pictures(*((f"{number}.png", flat(number)) for number in range(5))),
        {"images_per_task": 5},
        ["data.images_per_task = 5 is more than the 3 training images of task clinic-7", "1 to 3"],
    ),
    "no archive": (
        lambda folder: save(folder / "a.png", flat(1)),
        {},
        ["is not a sound .npz file of plain arrays"],
    ),
    "half an archive": (half_an_archive, {}, ["own.npz is not a sound .npz file"]),
    "labels only": (
        prepared(train_labels=np.zeros(9, int)),
        {},
        ["no array train_images", "it has train_labels"],
    ),
    "pickled": (
        prepared(train_images=OBJECTS),
        {},
        ["own.npz is not a sound .npz file of plain arrays"],
    ),
    "a pickled test split": (
        prepared(train_images=random_images(9, 8, 8), test_images=OBJECTS),
        {},
        ["plain arrays"],
    ),
    "floats": (
        prepared(train_images=np.zeros((9, 8, 8))),
        {},
        ["train_images is float64 (9, 8, 8)", "uint8"],
    ),
    "signed": (
        prepared(train_images=np.zeros((9, 8, 8), np.int8)),
        {},
        ["train_images is int8", "uint8"],
    ),
    "flat rows": (
        prepared(train_images=random_images(9, 64)),
        {},
        ["uint8 (9, 64)", "N x H x W x C or N x H x W"],
    ),
    "no training images": (
        prepared(train_images=random_images(0, 8, 8)),
        {},
        ["train_images is uint8 (0, 8, 8)"],
    ),
    "no test images": (
        prepared(train_images=random_images(9, 8, 8), test_images=random_images(0, 8, 8)),
        {},
        ["test_images is uint8 (0, 8, 8)"],
    ),
    "splits of different size": (
        prepared(train_images=random_images(9, 8, 8), test_images=random_images(2, 9, 8)),
        {},
        ["differ in size", "set data.image_size"],
    ),
    "two channels as RGB": (
        prepared(train_images=random_images(9, 8, 8, 2)),
        {"channels": 3},
        ["data.channels = 3 is impossible", "allowed: null"],
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_images_that_will_not_do_are_one_line_that_says_what_would(
    tmp_path: Path, what: str
) -> None:
    prepare, settings, expected = ERRORS[what]
    path, cache = prepare(tmp_path), tmp_path / "cache"
    text = message_of(load_own_task, DataConfig(**settings), path, NAME)
    assert all(part in text for part in expected), text
    assert "data.dir" not in text, "a site has no such setting"
    assert message_of(load_own_task, DataConfig(**settings), path, NAME, cache) == text
    assert not cache.exists(), "nothing is kept of images that will not do"


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read everything; "nobody" may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder of images that only somebody else may enter, below one that everybody may."""
    with TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        own = pictures(*((f"{number}.png", flat(number)) for number in range(9)))(Path(root))
        own.chmod(0)
        yield own
        own.chmod(0o755)


@pytest.mark.parametrize("inside", [False, True], ids=["the-folder", "below-the-folder"])
def test_a_folder_that_may_not_be_read_is_the_owners_to_mend(locked: Path, inside: bool) -> None:
    path = locked / "pictures" if inside else locked
    with as_another_user():
        text = message_of(load_own_task, DataConfig(), path, NAME)
    assert str(locked) in text
    assert "ermission denied" in text


# --- The copy of the decoded images ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Nine pictures in a format whose size does not depend on the pixels."""
    for value in range(9):
        save(tmp_path / "own" / f"{value}.bmp", random_images(8, 8, seed=value))
    return tmp_path / "own"


def copies(cache: Path) -> list[Path]:
    return [
        path for path in cache.iterdir() if path.name not in (RECORD_FILE, "client.log", "lock")
    ]


def replace(file: Path, pixels: np.ndarray) -> None:
    """Other pixels behind the same name, size and time of change."""
    before = file.stat()
    save(file, pixels)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def test_the_second_load_is_of_the_copy_until_a_file_changes(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "store"
    first = load_own_task(SMALL, own, NAME, cache)
    assert_same_images(first, load_own_task(SMALL, own, NAME))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("a picture is decoded again"))
        second = load_own_task(SMALL, own, NAME, cache)
    assert_same_images(second, first)
    assert (second.index, second.name) == (-1, NAME)

    # As `cp -p` does it: neither name nor size nor time of change tells.
    replace(own / "3.bmp", random_images(8, 8, seed=99))
    changed = load_own_task(SMALL, own, NAME)
    assert not np.array_equal(changed.train, first.train)
    assert "gone from training" in message_of(load_own_task, SMALL, own, NAME, cache)
    accept_images(SMALL, own, NAME, cache)
    assert_same_images(load_own_task(SMALL, own, NAME, cache), changed)
    assert len(copies(cache)) == 1


@pytest.mark.parametrize(
    "change", ["another picture", "one less", "another name", "another size", "another folder"]
)
def test_a_change_of_the_folder_is_noticed(own: Path, tmp_path: Path, change: str) -> None:
    cache = tmp_path / "store"
    load_own_task(SMALL, own, NAME, cache)
    (old,) = copies(cache)
    match change:
        case "another picture":
            save(own / "sub" / "new.png", flat(1))
        case "one less":
            (own / "8.bmp").unlink()
        case "another name":
            (own / "0.bmp").rename(own / "zero.bmp")
        case "another size":
            save(own / "2.bmp", random_images(9, 9))
        case "another folder":
            own = own.rename(tmp_path / "moved")
            replace(own / "0.bmp", random_images(8, 8, seed=99))
    accept_images(SMALL, own, NAME, cache)
    assert_same_images(load_own_task(SMALL, own, NAME, cache), load_own_task(SMALL, own, NAME))
    assert old not in copies(cache)
    assert len(copies(cache)) == 1


@pytest.mark.parametrize(
    "other",
    [{"images_per_task": 2}, {"image_size": 7}, {"channels": 3}, {"test_fraction": 0.5}],
    ids=str,
)
def test_other_settings_do_not_get_the_old_copy(
    own: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    cache = tmp_path / "store"
    load_own_task(SMALL, own, NAME, cache)
    settings = SMALL.model_copy(update=other)
    assert_same_images(
        load_own_task(settings, own, NAME, cache), load_own_task(settings, own, NAME)
    )
    assert len(copies(cache)) == 1


def test_settings_that_do_not_concern_the_images_get_the_old_copy(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_own_task(SMALL, own, NAME, tmp_path / "store")
    settings = SMALL.model_copy(
        update={"dataset": "sites", "dir": "/elsewhere", "horizontal_flip": True}
    )
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a picture is decoded again"))
    assert_same_images(load_own_task(settings, own, NAME, tmp_path / "store"), first)


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "empty", "other arrays", "a folder of that name"]
)
def test_a_damaged_copy_is_made_again(own: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "store"
    first = load_own_task(SMALL, own, NAME, cache)
    (copy,) = copies(cache)
    sound = copy.read_bytes()
    match damage:
        case "truncated":
            copy.write_bytes(sound[:-1])
        case "garbage":
            copy.write_bytes(b"\xff" * len(sound))
        case "empty":
            copy.write_bytes(b"")
        case "other arrays":
            copy.write_bytes(safetensors.numpy.save({"train": first.train}))
        case "a folder of that name":
            copy.unlink()
            copy.mkdir()
            message_of(load_own_task, SMALL, own, NAME, cache)
            return
    assert_same_images(load_own_task(SMALL, own, NAME, cache), first)
    assert copies(cache) == [copy]
    assert copy.read_bytes() == sound


def test_an_npz_is_copied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_images(20, 8, 8)
    np.savez(tmp_path / "own.npz", train_images=pixels)
    first = load_own_task(DataConfig(), tmp_path / "own.npz", NAME, tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", lambda *_, **__: pytest.fail("the file is read again"))
        assert_same_images(
            load_own_task(DataConfig(), tmp_path / "own.npz", NAME, tmp_path / "store"), first
        )
    before = (tmp_path / "own.npz").stat()
    np.savez(tmp_path / "own.npz", train_images=255 - pixels)
    os.utime(tmp_path / "own.npz", ns=(before.st_atime_ns, before.st_mtime_ns))
    accept_images(DataConfig(), tmp_path / "own.npz", NAME, tmp_path / "store")
    again = load_own_task(DataConfig(), tmp_path / "own.npz", NAME, tmp_path / "store")
    assert {bytes(image) for image in (*again.train, *again.test)} == {
        bytes(255 - image) for image in pixels
    }


def test_a_full_disk_or_a_file_in_the_way_is_one_line_and_leaves_no_copy(
    own: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "store"
    with files_of_at_most(100):
        text = message_of(load_own_task, SMALL, own, NAME, cache)
    assert f"cannot write {cache}" in text
    assert copies(cache) == []
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in message_of(load_own_task, SMALL, own, NAME, tmp_path / "file")


# --- The site that a SuperNode's --node-config describes ---

NODE_CONFIG: dict[str, Any] = {
    "client-id": NAME,
    "data": "/data/own",
    "state-dir": "/var/lib/srfed",
}


def context_of(**node_config: Any) -> Context:
    return Context(run_id=0, node_id=1, node_config=node_config, state=RecordDict(), run_config={})


def test_a_site_is_what_its_node_config_says() -> None:
    site = deployed_site(NODE_CONFIG)
    assert site == Site(NAME, Path("/var/lib/srfed"), Path("/data/own"))
    assert site.folder == Path("/var/lib/srfed/clinic-7")
    at_home = deployed_site({**NODE_CONFIG, "data": "~/own.npz"})
    assert at_home.data == Path.home() / "own.npz"
    assert site_of(context_of(**NODE_CONFIG), tiny_config()) == site


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stat-dir": "/x"}, ["stat-dir is unknown", "client-id, data, state-dir"]),
        ({"partition-id": 1}, ["partition-id is unknown"]),
        *[
            ({key: None}, [f"{key} = None is impossible", "a text in quotation marks"])
            for key in NODE_CONFIG
        ],
        ({"client-id": 7}, ["client-id = 7 is impossible", "quotation marks"]),
        ({"data": True}, ["data = True is impossible"]),
        ({"state-dir": 1.5}, ["state-dir = 1.5 is impossible"]),
        ({"client-id": ""}, ["client-id = '' is impossible"]),
        ({"data": "own"}, ["data = own is impossible", "an absolute path"]),
        ({"state-dir": "./state"}, ["state-dir = state is impossible", "an absolute path"]),
        *[
            ({"client-id": name}, ["is no name for a store"])
            for name in ("../up", "a/b", "a b", ".x", "..", "ü", "a\n")
        ],
    ],
    ids=str,
)
def test_a_node_config_that_will_not_do_is_one_line(
    change: dict[str, Any], expected: list[str]
) -> None:
    config = {key: value for key, value in {**NODE_CONFIG, **change}.items() if value is not None}
    text = message_of(deployed_site, config)
    assert all(part in text for part in expected), text
    with pytest.raises(UserError):
        site_of(context_of(**config), tiny_config())


def test_a_node_without_any_configuration_is_no_site() -> None:
    assert "client-id = None" in message_of(site_of, context_of(), tiny_config())


def test_a_sites_task_is_its_own_images_and_the_copy_lies_in_its_store(
    own: Path, tmp_path: Path
) -> None:
    site = deployed_site(
        {"client-id": NAME, "data": str(own), "state-dir": str(tmp_path / "state")}
    )
    settings = DataConfig(dataset="sites", image_size=6, channels=1)
    task = own_task(settings, site)
    assert task.name == NAME
    assert_same_images(task, load_own_task(SMALL, own, NAME))
    assert [file.suffix for file in copies(tmp_path / "state" / NAME)] == [".safetensors"]
    assert (site.folder / RECORD_FILE).exists()
    assert own_task(settings, site) is task, "read once a process"


# --- What is taken of a folder, and what is not ---


def assert_as_split(task: Task, train: list[int], test: list[int]) -> None:
    assert (values(task.train), values(task.test)) == (train, test)


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("TRAIN", "test"), ("train", "tEsT")]
)
@pytest.mark.parametrize("beside", ["__MACOSX", ".cache", "@eaDir", "#recycle"])
def test_the_owners_split_is_seen_in_any_spelling_and_beside_what_systems_leave(
    tmp_path: Path, train: str, test: str, beside: str
) -> None:
    for value, name in enumerate(
        [f"{train}/a.png", f"{train}/b.png", f"{test}/c.png", f"{beside}/d.png", "e.png"]
    ):
        save(tmp_path / name, flat(value))
    assert_as_split(load_own_task(DataConfig(), tmp_path, NAME), [0, 1], [2])
    parent = tmp_path.parent / f"{tmp_path.name}-parent"
    shutil.copytree(tmp_path, parent / "lamp")
    assert_as_split(load_task(DataConfig(dataset="folder", dir=str(parent)), 0), [0, 1], [2])
    words = "\n".join(describe_own_images(DataConfig(), tmp_path))
    assert "taken:      3 pictures (3 .png)" in words
    assert f"(e.g. {beside})" in words
    assert "1 beside the folders that are read (e.g. e.png)" in words


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["train", "test", "val"], "holds test, train, val"),
        (["train", "test", "masks"], "holds test, train, masks"),
        (["train", "val"], "holds train, val"),
        (["Training", "Testing"], "holds Testing, Training"),
        (["train", "Train", "test"], "holds Train, test, train"),
        (["test", "pictures"], "holds test, pictures"),
        (["VALIDATION"], "holds VALIDATION"),
    ],
)
def test_a_split_that_is_not_clear_is_an_error_and_never_dropped(
    tmp_path: Path, names: list[str], shown: str
) -> None:
    for value, name in enumerate(names * 3):
        save(tmp_path / "own" / name / "deep" / f"{value}.png", flat(value))
    shutil.copytree(tmp_path / "own", tmp_path / "tasks" / "lamp")
    for text in (
        message_of(load_own_task, DataConfig(), tmp_path / "own", NAME),
        message_of(task_names, DataConfig(dataset="folder", dir=str(tmp_path / "own"))),
        message_of(load_task, DataConfig(dataset="folder", dir=str(tmp_path / "tasks")), 0),
    ):
        assert shown in text
        assert "allowed: exactly the folders train and test, or no folder called" in text


def test_a_split_further_down_is_an_error_too(tmp_path: Path) -> None:
    for value, name in enumerate(
        ["2024/train/a.png", "2024/test/b.png", "2025/train/c.png", "2025/test/d.png"]
    ):
        save(tmp_path / name, flat(value))
    text = message_of(load_own_task, DataConfig(), tmp_path, NAME)
    assert (
        "2024 holds the folders test and train, below the top of" in text
        or "2025 holds the folders" in text
    )
    assert "allowed: a split at the top, or none" in text


@pytest.mark.parametrize("name", ["train", "Training"])
def test_a_lone_folder_of_trains_is_a_folder_like_others(tmp_path: Path, name: str) -> None:
    for value, folder in enumerate([name, "bus", "car"] * 4):
        save(tmp_path / folder / f"{value}.png", flat(value))
    assert sorted(task_names(DataConfig(dataset="folder", dir=str(tmp_path)))) == [
        "bus",
        "car",
        name.lower(),
    ]
    task = load_own_task(DataConfig(), tmp_path, NAME)
    assert sorted(values(task.train) + values(task.test)) == list(range(12))


def test_what_is_passed_over_is_told_with_its_reason(tmp_path: Path) -> None:
    own, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    for value in range(6):
        save(own / f"{value}.png", flat(value))
    for name in (".x.png", ".cache/y.png", "@eaDir/0.png", "sub/@eaDir/1.png", "__MACOSX/z.png"):
        save(own / name, flat(99))
    for name in ("scan.dcm", "notes.txt", "noname", "Thumbs.db"):
        (own / name).write_bytes(b"")
    save(elsewhere / "far.png", flat(6))
    (own / "linked").symlink_to(elsewhere)
    (own / "round").symlink_to(own)
    (own / "linked.png").symlink_to(elsewhere / "far.png")
    (own / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (own / "self.png").symlink_to(own / "self.png")
    os.mkfifo(own / "pipe.png")
    task = load_own_task(DataConfig(), own, NAME)
    assert sorted(values(task.train) + values(task.test)) == [0, 1, 2, 3, 4, 5, 6], (
        "a link to a file is the file"
    )
    taken, skipped = describe_own_images(DataConfig(), own)
    assert taken == "taken:      7 pictures (7 .png)"
    for words in (
        "2 hidden (e.g. .cache)",
        "3 left by a system (e.g. @eaDir)",
        "4 no picture by its name (e.g. Thumbs.db)",
        "2 a link to a folder, not followed (e.g. linked)",
        "2 a link to nothing (e.g. gone.png)",
        "1 no regular file (e.g. pipe.png)",
    ):
        assert words in skipped
    parent = DataConfig(dataset="folder", dir=str(tmp_path))
    (tmp_path / "through").symlink_to(own)
    assert task_names(parent) == ["elsewhere", "own", "through"]
    told = describe_images(parent, 3)
    assert "through 1 linked folder(s) (e.g. through)" in told[0]
    assert "2 a link to a folder, not followed" in describe_images(parent, 2)[1], (
        "of the tasks that are used"
    )


def test_a_folder_that_holds_nothing_but_what_is_passed_over_says_so(tmp_path: Path) -> None:
    (tmp_path / "scan.dcm").write_bytes(b"")
    text = message_of(load_own_task, DataConfig(), tmp_path, NAME)
    assert "holds no images; skipped: 1 no picture by its name (e.g. scan.dcm)" in text


def test_a_sub_folder_that_may_not_be_read_is_an_error(locked: Path) -> None:
    locked.chmod(0o755)
    inside = locked / "sub"
    save(inside / "more.png", flat(77))
    inside.chmod(0)
    with as_another_user():
        text = message_of(load_own_task, DataConfig(), locked, NAME)
    inside.chmod(0o755)
    assert f"cannot list {inside}" in text
    assert "ermission denied" in text

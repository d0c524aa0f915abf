"""Data sets and images, against scikit-learn, torchvision and Pillow reading the same files."""

import gzip
import hashlib
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets, transforms

from srfed.config import DataConfig
from srfed.data import describe_images, load_task, load_tasks, task_names, to_model_range, to_uint8
from srfed.data.folder import list_images
from srfed.data.images import fit_image, fit_images
from srfed.data.tasks import check_one_shape
from support.errors import message_of
from support.images import folder, held_out, random_images, save

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return SHARED / name


# --- the range that models see ---


def test_all_256_levels_survive_the_round_trip_and_fill_the_range() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 4, 4)
    scaled = to_model_range(levels)
    assert scaled.dtype == torch.float32
    assert scaled.shape == (2, 4, 8, 4)
    assert scaled.is_contiguous()
    torch.testing.assert_close(
        scaled, torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-6
    )
    assert (scaled.min(), scaled.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(scaled), levels)


def test_to_uint8_rounds_to_nearest_and_clamps() -> None:
    grey = torch.tensor([-3.0, -1.0, 99.6 / 127.5 - 1, 100.4 / 127.5 - 1, 1.0, 7.0, torch.inf])
    assert to_uint8(grey.reshape(7, 1, 1, 1)).ravel().tolist() == [0, 0, 100, 100, 255, 255, 255]
    assert to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).shape == (1, 2, 2, 3)


def test_images_at_the_door_are_checked() -> None:
    mirrored = random_images(2, 6, 5, 3)[:, :, ::-1]
    np.testing.assert_array_equal(to_uint8(to_model_range(mirrored)), mirrored)
    with pytest.raises(ValueError, match="uint8"):
        to_model_range(np.zeros((1, 8, 8, 1), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="N x C x H x W"):
        to_uint8(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 1, 8, 8), torch.nan))


# --- the rule for modes, sizes and channels ---


@pytest.mark.parametrize(
    ("height", "width"), [(40, 61), (61, 40), (17, 90), (40, 40), (12, 21), (32, 35), (35, 32)]
)
@pytest.mark.parametrize("depth", [1, 3])
def test_resize_and_crop_are_torchvisions(height: int, width: int, depth: int) -> None:
    pixels = random_images(height, width, depth)
    image = Image.fromarray(pixels.squeeze())
    resize = transforms.Resize(32, transforms.InterpolationMode.BICUBIC)
    expected = np.asarray(transforms.CenterCrop(32)(resize(image))).reshape(32, 32, depth)
    np.testing.assert_array_equal(fit_image(image, 32, None), expected)
    np.testing.assert_array_equal(fit_images(pixels[None], 32, None)[0], expected)


def test_modes_and_channels() -> None:
    colour = random_images(9, 7, 3)
    image = Image.fromarray(colour)
    np.testing.assert_array_equal(fit_image(image, None, None), colour)
    luma = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(fit_image(image, None, 1)[..., 0], luma)
    np.testing.assert_array_equal(fit_images(colour[None], None, 1)[0, ..., 0], luma)
    grey = Image.fromarray(luma)
    assert fit_image(grey, None, None).shape == (9, 7, 1)
    np.testing.assert_array_equal(fit_image(grey, None, 3), np.repeat(luma[..., None], 3, axis=2))
    assert fit_image(image.convert("P"), None, None).shape == (9, 7, 3)
    assert set(np.unique(fit_image(grey.convert("1"), None, None))) == {0, 255}


def test_transparency_is_composited_on_black() -> None:
    colour, alpha = random_images(9, 7, 3), random_images(9, 7, seed=1)
    image = Image.fromarray(np.dstack([colour, alpha]))
    expected = colour * (alpha[..., None] / 255.0)
    assert np.abs(fit_image(image, None, None) - expected).max() <= 1
    grey = fit_image(image.convert("LA"), None, None)
    assert grey.shape == (9, 7, 1)
    assert (grey[alpha == 0] == 0).all()
    keyed = Image.fromarray(np.full((8, 8), 200, np.uint8))
    keyed.info["transparency"] = 200
    assert not fit_image(keyed, None, None).any()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_is_scaled_by_its_own_range(dtype: type[np.generic]) -> None:
    values = np.linspace(100, 4195, 64).reshape(8, 8).astype(dtype)
    result = fit_image(Image.fromarray(values), None, None)[..., 0]
    exact = (values.astype(np.float64) - 100) / 4095 * 255
    assert np.abs(result - exact).max() <= 0.5 + 1e-9
    assert (result.min(), result.max()) == (0, 255)
    assert not fit_image(Image.fromarray(np.full((8, 8), 7, dtype)), None, None).any()


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_or_an_end_of_the_range(nothing: float) -> None:
    values = np.linspace(-50, 150, 64, dtype=np.float32).reshape(8, 8)
    values[2, 3] = nothing
    text = message_of(fit_image, Image.fromarray(values), None, None)
    assert "not finite" in text
    assert "set data.intensity" in text
    result = fit_image(Image.fromarray(values), None, None, (-50.0, 150.0))[..., 0]
    expected = np.rint((values.astype(np.float64) + 50) / 200 * 255)
    expected[2, 3] = 255 if nothing == np.inf else 0
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("intensity", [(0.0, 4095.0), (-1000.0, 500.5), (200.0, 201.0)])
def test_a_fixed_range_makes_equal_values_equally_grey_in_all_pictures(
    dtype: type[np.generic], intensity: tuple[float, float]
) -> None:
    low, high = intensity
    for first, last in ((0, 60000), (190, 260), (300, 300)):
        values = np.linspace(first, last, 64).reshape(8, 8).astype(dtype)
        result = fit_image(Image.fromarray(values), None, None, intensity)[..., 0]
        exact = (np.clip(values.astype(np.float64), low, high) - low) / (high - low) * 255
        assert np.abs(result - exact).max() <= 0.5 + 1e-9


def test_pictures_of_8_bits_have_no_intensity_to_set() -> None:
    for pixels in (random_images(9, 7), random_images(9, 7, 3), random_images(9, 7, 4)):
        image = Image.fromarray(pixels)
        np.testing.assert_array_equal(
            fit_image(image, 6, None, (0.0, 10.0)), fit_image(image, 6, None)
        )


@pytest.mark.parametrize(
    ("values", "nodata"),
    [(range(64), -9999), (range(64), 65535), (range(100, 164), -3.4e38), (range(3), 40)],
)
def test_one_value_far_from_all_others_is_named_instead_of_whitening_the_picture(
    values: range, nodata: float
) -> None:
    pixels = np.resize(np.array(values, np.float32), (8, 8))
    fit_image(Image.fromarray(pixels), None, None)
    pixels[0] = nodata
    text = message_of(fit_image, Image.fromarray(pixels), None, None)
    assert f"the value {np.float32(nodata):g} far from all others" in text
    assert "set data.intensity" in text
    fitted = fit_image(
        Image.fromarray(pixels), None, None, (float(min(values)), float(max(values)))
    )
    assert len(np.unique(fitted)) > 2, "the others keep their contrast"


def test_two_levels_and_a_wide_range_are_no_missing_values() -> None:
    for pixels in (
        np.array([0, 4000]),
        np.array([0, 1000, 1100, 1200, 1300]),
        np.geomspace(1, 60000, 64),
    ):
        fit_image(Image.fromarray(np.resize(pixels, (8, 8)).astype(np.uint16)), None, None)


def test_intensity_reaches_the_files_of_a_task_and_is_said(tmp_path: Path) -> None:
    deep = np.linspace(100, 900, 64).reshape(8, 8).astype(np.uint16)
    for number in range(6):
        save(tmp_path / "lamp" / f"{number}.png", deep + np.uint16(number))
    save(tmp_path / "lamp" / "flat.png", random_images(8, 8))
    config = folder(tmp_path, intensity=(0.0, 1000.0))
    task = load_task(config, 0)
    levels = {round((100 + number) / 1000 * 255) for number in range(6)}
    assert levels <= {int(image[0, 0, 0]) for image in (*task.train, *task.test)}
    said = " ".join(" ".join(describe_images(config, 1)).split())
    assert (
        "6 of 7 pictures have more than 8 bits, values 100 to 905; 0 becomes black, 1000 white"
        in said
    )
    assert "0.00% of the values are outside" in said
    assert "100.00% of the values" in " ".join(
        describe_images(folder(tmp_path, intensity=(2000.0, 3000.0)), 1)
    )
    said = " ".join(" ".join(describe_images(folder(tmp_path), 1)).split())
    assert "each is stretched by its own least and greatest value" in said


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = random_images(8, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    with Image.open(save(tmp_path / "turned.png", pixels, exif=exif)) as image:
        np.testing.assert_array_equal(fit_image(image, None, None), np.rot90(pixels, -1))


def test_arrays_of_other_depths_are_resized_channel_by_channel() -> None:
    pixels = random_images(2, 20, 20, 5)
    fitted = fit_images(pixels, 10, None)
    assert fitted.shape == (2, 10, 10, 5)
    expected = Image.fromarray(pixels[1, ..., 4]).resize((10, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fitted[1, ..., 4], expected)
    assert "data.channels = 3" in message_of(fit_images, pixels, None, 3)


def test_tiny_images_are_refused() -> None:
    assert "4 x 9 px" in message_of(fit_image, Image.new("L", (4, 9)), 32, None)
    assert "4 x 9 px" in message_of(fit_images, np.zeros((1, 9, 4, 1), np.uint8), None, None)


# --- digits ---


def test_digits_are_scikit_learns_with_the_end_of_each_class_held_out() -> None:
    digits = load_digits()
    tasks = load_tasks(DataConfig(), 10)
    assert (
        [task.name for task in tasks]
        == task_names(DataConfig())
        == [f"digit-{k}" for k in range(10)]
    )
    for label, task in enumerate(tasks):
        own = digits.images[digits.target == label]
        assert task.index == label
        assert len(task.test) == round(0.2 * len(own))
        both = np.concatenate([task.train, task.test])
        assert both.dtype == np.uint8
        np.testing.assert_array_equal(both[..., 0], np.floor(own * 255 / 16 + 0.5))


def test_images_per_task_takes_the_first_and_leaves_the_test_images() -> None:
    whole, part = load_task(DataConfig(), 3), load_task(DataConfig(images_per_task=20), 3)
    np.testing.assert_array_equal(part.train, whole.train[:20])
    np.testing.assert_array_equal(part.test, whole.test)
    text = message_of(load_task, DataConfig(images_per_task=1000), 3)
    assert "data.images_per_task = 1000" in text
    assert f"the {len(whole.train)} training images of task digit-3" in text


def test_size_channels_and_fraction_apply() -> None:
    task = load_task(DataConfig(image_size=16, channels=3, test_fraction=0.5), 0)
    assert task.train.shape == (89, 16, 16, 3)
    assert task.test.shape == (89, 16, 16, 3)
    original = load_digits().images[0] * 255 / 16
    expected = Image.fromarray(np.rint(original).astype(np.uint8)).resize(
        (16, 16), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(task.train[0, ..., 1], expected)


def test_a_task_that_does_not_exist_is_refused() -> None:
    assert "federation.clients = 11" in message_of(load_tasks, DataConfig(), 11)
    assert "tasks 0 to 9" in message_of(load_task, DataConfig(), 10)
    assert "tasks 0 to 9" in message_of(load_task, DataConfig(), -1)


def test_importing_the_room_leaves_slow_libraries_alone() -> None:
    program = (
        "import sys, srfed.data; sys.exit(any(m in sys.modules for m in ('sklearn', "
        "'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# --- MNIST and Fashion-MNIST ---


@pytest.fixture(
    scope="module", params=[("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)]
)
def idx_copy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    """(our name, torchvision's class, a root where torchvision can read: unpacked files only)."""
    name, published = request.param
    root = tmp_path_factory.mktemp(name)
    raw = root / published.__name__ / "raw"
    raw.mkdir(parents=True)
    for packed in shared(f"{published.__name__}/raw").glob("*.gz"):
        with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    return name, published, root


def test_idx_files_are_read_as_torchvision_reads_them(idx_copy: tuple[str, Any, Path]) -> None:
    name, published, root = idx_copy
    packed = DataConfig(dataset=name, dir=str(SHARED), images_per_task=500)  # type: ignore[arg-type]
    train, test = published(root, train=True), published(root, train=False)
    for task in load_tasks(packed, 10):
        np.testing.assert_array_equal(
            task.train[..., 0], train.data[train.targets == task.index][:500]
        )
        np.testing.assert_array_equal(task.test[..., 0], test.data[test.targets == task.index])
    unpacked = load_task(packed.model_copy(update={"dir": str(root), "images_per_task": None}), 7)
    np.testing.assert_array_equal(unpacked.train[..., 0], train.data[train.targets == 7])


def test_names_of_idx_tasks(idx_copy: tuple[str, Any, Path]) -> None:
    name, _, root = idx_copy
    names = task_names(DataConfig(dataset=name, dir=str(root)))  # type: ignore[arg-type]
    expected = {"mnist": (3, "digit-3"), "fashion_mnist": (0, "t-shirt-top")}[name]
    assert (len(names), names[expected[0]]) == (10, expected[1])


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """Twenty unpacked images in MNIST's layout."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(random_images(20, 28, 28)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            idx_bytes(np.arange(20, dtype=np.uint8) % 10)
        )
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01....", idx_bytes(np.arange(9, dtype=np.uint8))[:-1]],
)
def test_damaged_idx_files_are_refused(small_mnist: Path, damage: bytes) -> None:
    config = DataConfig(dataset="mnist", dir=str(small_mnist))
    assert load_task(config, 4).train.shape == (2, 28, 28, 1)
    (small_mnist / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(damage)
    assert "train-labels-idx1-ubyte" in message_of(load_task, config, 4)


def test_a_packed_idx_file_must_be_the_published_one(small_mnist: Path) -> None:
    (small_mnist / "MNIST/raw/train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    text = message_of(load_task, DataConfig(dataset="mnist", dir=str(small_mnist)), 4)
    assert "data.dir" in text
    assert "expected d53e105ee54ea40749a09fcbcd1e9432" in text


def test_missing_files_are_named_with_the_way_to_get_them(small_mnist: Path) -> None:
    (small_mnist / "MNIST/raw/t10k-images-idx3-ubyte").unlink()
    text = message_of(task_names, DataConfig(dataset="mnist", dir=str(small_mnist)))
    assert str(small_mnist / "MNIST" / "raw") in text
    assert f"MNIST('{small_mnist}', download=True)" in text


@pytest.mark.parametrize(
    "dataset", ["mnist", "fashion_mnist", "cifar10", "cifar100", "npz", "folder"]
)
def test_an_absent_folder_is_refused(dataset: Any, tmp_path: Path) -> None:
    assert "data.dir is not set" in message_of(task_names, DataConfig(dataset=dataset))
    text = message_of(task_names, DataConfig(dataset=dataset, dir=str(tmp_path / "nowhere")))
    assert f"data.dir = {tmp_path / 'nowhere'} does not exist" in text


# --- CIFAR ---


@pytest.mark.parametrize(
    ("dataset", "tasks", "labels", "name"),
    [("cifar10", 10, "labels", "airplane"), ("cifar100", 20, "coarse", "aquatic-mammals")],
)
def test_compact_cifar(dataset: Any, tasks: int, labels: str, name: str) -> None:
    path = shared(f"{dataset}_500.npz")
    config = DataConfig(dataset=dataset, dir=str(SHARED), images_per_task=100)
    assert len(task_names(config)) == tasks
    loaded = load_tasks(config, tasks)
    assert loaded[0].name == name
    assert {task.train.shape for task in loaded} == {(100, 32, 32, 3)}
    assert {task.test.shape for task in loaded} == {(10_000 // tasks, 32, 32, 3)}
    with np.load(path) as arrays:
        np.testing.assert_array_equal(
            loaded[5].test, arrays["test_images"][arrays[f"test_{labels}"] == 5]
        )
        np.testing.assert_array_equal(
            loaded[5].train,
            arrays["train_images"][np.flatnonzero(arrays[f"train_{labels}"] == 5)[:100]],
        )
    text = message_of(load_task, config.model_copy(update={"images_per_task": 501}), 0)
    assert f"the 500 training images of task {name}" in text


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar_archive(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Path]:
    """A small archive in the original layout whose checksums stand in torchvision's tables."""
    published: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.param]
    folder = tmp_path / published.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(seed: int) -> dict[str, Any]:
        fine = [(7 * k + seed) % (10 if request.param == "cifar10" else 100) for k in range(100)]
        labels = (
            {"labels": fine}
            if request.param == "cifar10"
            else {"fine_labels": fine, "coarse_labels": [f // 5 for f in fine]}
        )
        return {"data": random_images(100, 3072, seed=seed), **labels}

    for table in ("train_list", "test_list"):
        names = [name for name, _ in getattr(published, table)]
        entries = [[name, write(name, batch(len(table) + k))] for k, name in enumerate(names)]
        monkeypatch.setattr(published, table, entries)
    names = {
        published.meta["key"]: [f"fine_{k}" for k in range(100)],
        "coarse_label_names": [f"Coarse_{k}" for k in range(20)],
    }
    if request.param == "cifar10":
        names = {"label_names": [f"class_{k}" for k in range(10)]}
    monkeypatch.setattr(
        published, "meta", {**published.meta, "md5": write(published.meta["filename"], names)}
    )
    return published, tmp_path


def test_cifar_archives_are_read_as_torchvision_reads_them(cifar_archive: tuple[Any, Path]) -> None:
    published, root = cifar_archive
    dataset: Any = published.__name__.lower()
    # The archive wins over the compact file, which is not even opened.
    (root / f"{dataset}_500.npz").write_bytes(b"not an archive")
    train, test = published(root, train=True), published(root, train=False)
    per_task = 1 if dataset == "cifar10" else 5
    config = DataConfig(dataset=dataset, dir=str(root))
    tasks = load_tasks(config, len(task_names(config)))
    assert len(tasks) == {"cifar10": 10, "cifar100": 20}[dataset]
    assert tasks[4].name == {"cifar10": "class-4", "cifar100": "coarse-4"}[dataset]
    for task in tasks:
        np.testing.assert_array_equal(
            task.train, train.data[np.array(train.targets) // per_task == task.index]
        )
        np.testing.assert_array_equal(
            task.test, test.data[np.array(test.targets) // per_task == task.index]
        )


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_a_strange_pickle_is_refused_before_it_is_opened(
    cifar_archive: tuple[Any, Path], which: str
) -> None:
    published, root = cifar_archive
    name = (
        published.meta["filename"]
        if which == "meta"
        else getattr(published, f"{which}_list")[-1][0]
    )
    file, trace = root / published.base_folder / name, root / "trace"
    file.write_bytes(pickle.dumps(Bomb(trace)))
    pickle.loads(file.read_bytes())
    assert trace.exists(), "the bomb must work for its absence to mean something"
    trace.unlink()
    text = message_of(load_task, DataConfig(dataset=published.__name__.lower(), dir=str(root)), 0)
    assert str(file) in text
    assert "md5" in text
    assert not trace.exists()


def test_an_incomplete_cifar_archive_is_refused(cifar_archive: tuple[Any, Path]) -> None:
    published, root = cifar_archive
    config = DataConfig(dataset=published.__name__.lower(), dir=str(root))
    file = root / published.base_folder / published.test_list[0][0]
    file.unlink()
    assert f"cannot read {file}" in message_of(load_task, config, 0)


def test_cifar_that_is_nowhere_says_how_to_get_it(tmp_path: Path) -> None:
    text = message_of(task_names, DataConfig(dataset="cifar100", dir=str(tmp_path)))
    assert str(tmp_path / "cifar-100-python") in text
    assert "cifar100_500.npz" in text
    assert f"CIFAR100('{tmp_path}', download=True)" in text


# --- one .npz file ---


def npz(tmp_path: Path, *, test_fraction: float = 0.2, **arrays: Any) -> DataConfig:
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return DataConfig(dataset="npz", dir=str(path), test_fraction=test_fraction)


def test_npz_with_names_and_test_part(tmp_path: Path) -> None:
    train, test = random_images(30, 9, 6, 2), random_images(12, 9, 6, 2, seed=1)
    train_labels, test_labels = np.arange(30) % 3 + 1, np.arange(12) % 3 + 1
    config = npz(
        tmp_path,
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
        label_names=np.array(["unused", "Screw, M4", "Äpfel", "x_y"]),
    )
    tasks = load_tasks(config, 3)
    assert [task.name for task in tasks] == task_names(config) == ["screw-m4", "apfel", "x-y"]
    for label, task in enumerate(tasks, start=1):
        np.testing.assert_array_equal(task.train, train[train_labels == label])
        np.testing.assert_array_equal(task.test, test[test_labels == label])


def test_npz_without_test_part_is_split_by_the_images_content(tmp_path: Path) -> None:
    images, labels = random_images(40, 8, 8, 1), np.array([-4, 9] * 20)
    config = npz(tmp_path, train_images=images, train_labels=labels, test_fraction=0.4)
    assert task_names(config) == ["class--4", "class-9"]
    task = load_task(config, 1)
    out = held_out(images[1::2], 0.4)
    assert 2 < out.sum() < 18
    np.testing.assert_array_equal(task.train, images[1::2][~out])
    np.testing.assert_array_equal(task.test, images[1::2][out])


GOOD = {"train_images": random_images(6, 8, 8, 1), "train_labels": np.arange(6) % 2}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_images": np.zeros((6, 8, 8, 1))}, "train_images is float64"),
        ({"train_images": np.zeros((6, 64), np.uint8)}, "allowed: uint8"),
        ({"train_images": random_images(5, 8, 8, 1)}, "5 train_images but 6 train_labels"),
        ({"train_images": random_images(6, 8, 4, 1)}, "(6, 8, 4, 1); allowed: N x H x W x C"),
        ({"train_labels": np.arange(6) / 2}, "train_labels is float64"),
        (
            {"train_labels": np.array(["a", None] * 3, object)},
            "not a sound .npz file of plain arrays",
        ),
        ({"label_names": np.array(["one"])}, "none for label 1"),
        ({"label_names": np.array(["a b", "A/B"])}, "'a b' and 'A/B' would both be task a-b"),
        ({"label_names": np.array(["a", "!?"])}, "named after '!?'"),
        ({"test_images": random_images(6, 8, 8, 1)}, "one of test_images and test_labels"),
        ({"test_images": random_images(2, 8, 9, 1), "test_labels": np.arange(2)}, "different size"),
        (
            {"test_images": random_images(2, 8, 8, 1), "test_labels": np.ones(2, int)},
            "class-0 has no test",
        ),
        ({"train_labels": np.array([0] + [1] * 5)}, "data.test_fraction = 0.2"),
    ],
)
def test_npz_of_the_wrong_kind_is_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    load_task(npz(tmp_path, **GOOD), 0)
    assert expected in message_of(load_task, npz(tmp_path, **{**GOOD, **change}), 0)


def test_npz_that_is_none_is_refused(tmp_path: Path) -> None:
    config = npz(tmp_path, **GOOD)
    content = Path(config.dir).read_bytes()
    for damaged in (b"", content[:-40], content[:300], b"text"):
        Path(config.dir).write_bytes(damaged)
        assert "not a sound .npz file" in message_of(load_task, config, 0)
    with open(config.dir, "wb") as file:
        np.save(file, np.zeros(3))
    assert "not a sound .npz file" in message_of(load_task, config, 0)
    assert "no array train_labels" in message_of(
        load_task, npz(tmp_path, train_images=GOOD["train_images"]), 0
    )
    assert "not a sound .npz file" in message_of(
        load_task, config.model_copy(update={"dir": str(tmp_path)}), 0
    )


# --- folders ---


def test_folder_tasks_in_order_and_split_by_content(tmp_path: Path) -> None:
    names = ["a/1.png", "a/2.PNG", "b.png", "c.bmp", "d.tif"]
    pixels = {name: random_images(8, 10, 3, seed=k) for k, name in enumerate(names)}
    for name, image in pixels.items():
        save(tmp_path / "Site B" / name, image)
    save(tmp_path / "Site A" / "x.png", random_images(8, 10, 3))
    save(tmp_path / "Site A" / "y.png", random_images(8, 10, 3, seed=9))
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "Site B" / "Thumbs.db").write_text("no image")
    (tmp_path / "Site B" / "._b.png").write_text("left by a Macintosh")
    config = folder(tmp_path, test_fraction=0.4)
    assert task_names(config) == ["site-a", "site-b"]
    task = load_task(config, 1)
    images = np.array([pixels[name] for name in names])
    out = held_out(images, 0.4)
    assert 2 <= out.sum() <= 3, "otherwise the least number would decide, which is tested below"
    np.testing.assert_array_equal(task.train, images[~out])
    np.testing.assert_array_equal(task.test, images[out])
    assert [
        path.relative_to(tmp_path / "Site B").as_posix()
        for path in list_images(tmp_path / "Site B").files
    ] == names
    assert [len(part) for part in (load_task(config, 0).train, load_task(config, 0).test)] == [1, 1]


def test_folder_with_a_split_of_its_own(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("test", 2)):
        for k in range(count):
            save(
                tmp_path / part / "lamp" / f"{k}.png",
                np.full((8, 8), 10 * k + (part == "test"), np.uint8),
            )
    task = load_task(folder(tmp_path, images_per_task=4), 0)
    assert task.train[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert task.test[:, 0, 0, 0].tolist() == [1, 11]
    assert "5 training images of task lamp" in message_of(
        load_task, folder(tmp_path, images_per_task=6), 0
    )
    (tmp_path / "train" / "chair").mkdir()
    assert "task chair is not in both" in message_of(task_names, folder(tmp_path))


def test_folder_images_beyond_images_per_task_are_opened_only_where_their_content_decides(
    tmp_path: Path,
) -> None:
    for k in range(5):
        save(tmp_path / "a" / "lamp" / f"{k}.png", random_images(8, 8, seed=k))
    shutil.copytree(tmp_path / "a" / "lamp", tmp_path / "b" / "train" / "lamp")
    shutil.copytree(tmp_path / "a" / "lamp", tmp_path / "b" / "test" / "lamp")
    for damaged in (tmp_path / "a" / "lamp" / "2.png", tmp_path / "b" / "train" / "lamp" / "2.png"):
        damaged.write_bytes(b"damaged")
    assert len(load_task(folder(tmp_path / "b", images_per_task=2), 0).train) == 2
    for root in ("a", "b"):
        assert "cannot read image" in message_of(load_task, folder(tmp_path / root), 0)
    assert "2.png" in message_of(load_task, folder(tmp_path / "a", images_per_task=2), 0)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "lamp" / "1.png", random_images(40, 40, 3))
    file = save(tmp_path / "lamp" / "2.jpg", random_images(40, 40, 3))
    file.write_bytes(file.read_bytes()[:-400])
    assert f"cannot read image {file}" in message_of(load_task, folder(tmp_path), 0)


def test_sizes_and_channels_that_differ(tmp_path: Path) -> None:
    first = save(tmp_path / "lamp" / "1.png", random_images(8, 9, 3))
    second = save(tmp_path / "lamp" / "2.png", random_images(20, 10))
    text = message_of(load_task, folder(tmp_path), 0)
    assert f"{first} is 9 x 8 px" in text
    assert f"{second} is 10 x 20 px" in text
    assert "data.image_size" in text
    text = message_of(load_task, folder(tmp_path, image_size=8), 0)
    assert f"{second} has 1; set data.channels" in text
    task = load_task(folder(tmp_path, image_size=8, channels=3), 0)
    assert task.train.shape == task.test.shape == (1, 8, 8, 3)
    with Image.open(second) as image:
        expected = (
            image.convert("RGB").resize((8, 16), Image.Resampling.BICUBIC).crop((0, 4, 8, 12))
        )
    np.testing.assert_array_equal(task.test[0], expected)


def test_tasks_may_differ_in_shape_where_nobody_needs_one(tmp_path: Path) -> None:
    for name, width in (("a", 8), ("b", 9)):
        for k in range(2):
            save(tmp_path / name / f"{k}.png", random_images(8, width, seed=k))
    tasks = load_tasks(folder(tmp_path), 2)
    assert [task.shape for task in tasks] == [(8, 8, 1), (8, 9, 1)]
    assert "pooled needs images of one" in message_of(check_one_shape, tasks, "pooled")
    assert "task b 8 x 9 x 1; set data.image_size" in message_of(check_one_shape, tasks, "pooled")
    check_one_shape(tasks[1:], "pooled")


def test_folders_with_nothing_in_them(tmp_path: Path) -> None:
    assert "has no task folders" in message_of(task_names, folder(tmp_path))
    (tmp_path / "lamp").mkdir()
    assert f"{tmp_path / 'lamp'} holds no images" in message_of(load_task, folder(tmp_path), 0)
    save(tmp_path / "lamp" / "1.png", random_images(8, 8))
    assert "data.test_fraction" in message_of(load_task, folder(tmp_path), 0)
    file = tmp_path / "lamp" / "1.png"
    assert "cannot list" in message_of(task_names, folder(file))
    (tmp_path / "LAMP").mkdir()
    assert "'LAMP' and 'lamp' would both be task lamp" in message_of(task_names, folder(tmp_path))

"""Data sets as objects: the same images as somebody would have converted by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import srfed
from srfed.data import load_tasks
from srfed.data.given import given_tasks
from srfed.data.source import split_by_content
from srfed.storage.run_folder import RunFolder
from support.errors import message_of
from support.tiny_run import CHEAP, all_bits, tiny_config

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
DATA = tiny_config().data


class Pictures(Dataset[Any]):
    """As torchvision's are: (picture, label), and the labels' names."""

    classes = ("T-shirt/top", "Bag", "Coat")

    def __init__(self, images: np.ndarray, transform: Any = None) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(self.images[index])
        return (self.transform(picture) if self.transform else picture), 2 * (index % 2)


class Table:
    """A data set of Hugging Face's, as far as it is used."""

    def __init__(self, columns: dict[str, Sequence[Any]]) -> None:
        self._columns, self.column_names = columns, list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: str) -> Sequence[Any]:
        return self._columns[key]


class Partitioner:
    """One of flwr-datasets, as far as it is used."""

    num_partitions = 3

    def load_partition(self, partition_id: int) -> Table:
        own = COLOUR[partition_id * 4 : partition_id * 4 + 4]
        return Table({"img": [Image.fromarray(one) for one in own], "label": [0] * 4})


class FederatedDataset:
    """It gives its partitioner the data when it is first asked for a partition."""

    def __init__(self) -> None:
        self.partitioners: dict[str, Any] = {"train": Partitioner()}

    def load_partition(self, partition_id: int, split: str) -> Table:
        table: Table = self.partitioners[split].load_partition(partition_id)
        return table


def whole(task: srfed.Task) -> set[bytes]:
    return {image.tobytes() for image in (*task.train, *task.test)}


@pytest.mark.parametrize(
    "data",
    [
        COLOUR,
        torch.from_numpy(COLOUR).permute(0, 3, 1, 2),
        COLOUR.astype(np.float32) / 255,
        Pictures(COLOUR),
        Pictures(COLOUR, F.to_tensor),
        Pictures(COLOUR, F.pil_to_tensor),
        TensorDataset(torch.from_numpy(COLOUR).permute(0, 3, 1, 2)),
        Subset(Pictures(COLOUR), range(12)),
        [{"image": Image.fromarray(one), "label": 3} for one in COLOUR],
        Table({"label": [1] * 12, "image": [Image.fromarray(one) for one in COLOUR]}),
        {"image": COLOUR},
    ],
    ids=lambda data: type(data).__name__,
)
def test_an_owners_images_are_the_same_in_whatever_they_come(data: Any) -> None:
    (task,) = given_tasks(DATA, {"clinic": data})
    train, test = split_by_content(DATA, "clinic", COLOUR)
    assert task.name == "clinic"
    assert np.array_equal(task.train, train)
    assert np.array_equal(task.test, test)


def test_grey_images_have_one_channel_and_a_test_split_stays_one() -> None:
    given = {"a": {"train": GREY[:9], "test": torch.from_numpy(GREY[9:])}}
    (task,) = given_tasks(DATA, given)
    assert np.array_equal(task.train, GREY[:9, ..., None])
    assert np.array_equal(task.test, GREY[9:, ..., None])


def test_size_and_channels_are_those_that_the_run_asks_for() -> None:
    asked = DATA.model_copy(update={"image_size": 6, "channels": 1})
    sizes = [Image.fromarray(COLOUR[0]).resize((8 + n, 9)) for n in range(6)]
    (task,) = given_tasks(asked, {"a": sizes})
    assert task.shape == (6, 6, 1)
    assert len(whole(task)) == 6


def test_one_data_set_has_an_owner_for_each_label_under_its_name() -> None:
    tasks = given_tasks(DATA, Pictures(COLOUR))
    assert [task.name for task in tasks] == ["t-shirt-top", "coat"]
    assert [whole(task) for task in tasks] == [
        {one.tobytes() for one in COLOUR[label::2]} for label in (0, 1)
    ]
    split = given_tasks(DATA, {"train": Pictures(COLOUR[:8]), "test": Pictures(COLOUR[8:])})
    assert np.array_equal(split[1].test, COLOUR[9::2])


@pytest.mark.parametrize("given", [Partitioner(), FederatedDataset()])
def test_a_partitioner_of_flwr_datasets_has_an_owner_for_each_partition(given: Any) -> None:
    tasks = given_tasks(DATA, given)
    assert [task.name for task in tasks] == ["partition-0", "partition-1", "partition-2"]
    assert whole(tasks[2]) == {one.tobytes() for one in COLOUR[8:]}
    listed = given_tasks(DATA, [Partitioner().load_partition(n) for n in range(3)])
    assert [task.name for task in listed] == ["owner-0", "owner-1", "owner-2"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            7,
            "tasks is of type int, which cannot be gone through; allowed: a list",
        ),
        ({}, "tasks is empty"),
        ({"a": iter([])}, "tasks['a'] has no images"),
        ({"a": []}, "tasks['a'] has no images"),
        ({"a": COLOUR[:, :2]}, "of 8 x 2 px are too small"),
        (
            {"a": COLOUR[..., :2]},
            "image 0: it is of type ndarray and shape (8, 8, 2)",
        ),
        ({"a": COLOUR / 127.5 - 1}, "allowed: floats from 0 to 1, or uint8"),
        ({"a": COLOUR * np.nan}, "its values go from nan to nan; allowed: floats from 0 to 1"),
        ({"a": COLOUR.astype(int)}, "its values are int64; allowed: uint8, or floats"),
        ({"a": [COLOUR[0], COLOUR[1, 1:]]}, "image 1 is 7 x 8 x 3, and the first 8 x 8 x 3; set"),
        ({"a": Table({"x": [1], "y": [2]})}, "tasks['a'] has the columns x, y; allowed: one of"),
        (TensorDataset(torch.zeros(3, 1, 8, 8)), "without a label for each image"),
        ({"a": np.zeros((9, 8, 8), np.uint8)}, "leaves nothing to train on, or to test on"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(given: Any, words: str) -> None:
    text = message_of(lambda: given_tasks(DATA, given))
    assert words in text
    assert "\n" not in text


def test_a_run_on_data_sets_has_the_bits_of_one_on_their_arrays(tmp_path: Path) -> None:
    config = tiny_config({**CHEAP, "federation.rounds": 1, "federation.clients": 2})
    tasks = load_tasks(config.data, 2)
    given = {
        task.name: {
            "train": TensorDataset(torch.from_numpy(task.train).permute(0, 3, 1, 2)),
            "test": [Image.fromarray(one[..., 0]) for one in task.test],
        }
        for task in tasks
    }
    run = srfed.train(config, given, run_dir=tmp_path / "given")
    other = srfed.train(config, run_dir=tmp_path / "other")
    assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(other.path))
    assert srfed.train(config, given, run_dir=run.path, resume=True).round == 1

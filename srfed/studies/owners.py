"""The sets of owners that a study of joining trains on: what the data settings are for each."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srfed.config import RunConfig
from srfed.data import Task, load_tasks
from srfed.data.images import Images
from srfed.data.npz import Arrays, read_arrays
from srfed.data.record import fingerprints
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.studies.cases import change

OMNIGLOT = "omniglot_8_alphabets.npz"
KINDS, LABS = 3, 4
"""Of blood cells, and owners of each kind."""
LAB = "-lab"
LAB_TEST_IMAGES = 100
"""Of each kind, for all its owners."""
_ARRAYS = [
    *(f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")),
    "train_characters",
    "test_characters",
    "label_names",
]


class OwnerSet(NamedTuple):
    """Owners that can be had.

    Attributes:
        owners: how many there are.
        usual: how many take part unless somebody says otherwise.
        images: training images of each, and validation images besides, likewise.
        validation: see there.
        settings: from the folder of data, the pool and the number of owners to settings of
            ``data``; writes what it needs into the pool.
    """

    owners: int
    usual: int
    images: int
    validation: int
    settings: Callable[[Path | None, Path, int], dict[str, Any]]


def _characters(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
    """Each of the first characters, in the order of alphabets and characters, is an owner."""
    path = _needed(data, OMNIGLOT)
    arrays = read_arrays(path, _ARRAYS)
    names = {
        (int(label), int(character)): f"{arrays['label_names'][label]}-{character:02d}"
        for label, character in sorted(
            {*zip(arrays["train_labels"], arrays["train_characters"], strict=True)}
        )
    }
    chosen = list(names)[:owners]
    made: Arrays = {"label_names": np.array([names[pair] for pair in chosen])}
    for split in ("train", "test"):
        of_pair = [
            (arrays[f"{split}_labels"] == label) & (arrays[f"{split}_characters"] == character)
            for label, character in chosen
        ]
        made[f"{split}_images"] = np.concatenate(
            [arrays[f"{split}_images"][mask] for mask in of_pair]
        )
        made[f"{split}_labels"] = np.repeat(np.arange(owners), [mask.sum() for mask in of_pair])
    return _prepared(pool / "sets" / f"characters-{owners}.npz", made)


def _alphabets(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
    """Each of the first alphabets is an owner. The file has character after character, so its
    first images would be of a few alone; they are put in the order of their fingerprints.
    """
    arrays = read_arrays(_needed(data, OMNIGLOT), _ARRAYS)
    made: Arrays = {"label_names": arrays["label_names"]}
    for split in ("train", "test"):
        order = np.argsort(fingerprints(arrays[f"{split}_images"]), kind="stable")
        order = order[arrays[f"{split}_labels"][order] < owners]
        made |= {
            f"{split}_{what}": arrays[f"{split}_{what}"][order] for what in ("images", "labels")
        }
    return _prepared(pool / "sets" / f"alphabets-{owners}.npz", made)


def _blood_cells(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
    folder = _needed(data, "blood_cells")
    return {"data__dataset": "folder", "data__dir": str(folder), "data__channels": 3}


def _blood_labs(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
    """Each kind of blood cells is cut for LABS owners, none with an image of another's; one owner
    of each kind comes after the other.
    """
    whole = change(RunConfig(), **_blood_cells(data, pool, owners))
    kinds = load_tasks(whole.data, KINDS)
    made: Arrays = {
        "label_names": np.array(
            [f"{kind.name}{LAB}{lab}" for lab in range(LABS) for kind in kinds][:owners]
        )
    }
    parts: dict[str, list[Images]] = {"train": [], "test": []}
    for number in range(owners):
        lab, kind = divmod(number, KINDS)
        images = np.concatenate([kinds[kind].train, kinds[kind].test])
        images = images[np.argsort(fingerprints(images), kind="stable")]
        parts["train"].append(images[:-LAB_TEST_IMAGES][lab::LABS])
        parts["test"].append(images[-LAB_TEST_IMAGES:][lab::LABS])
    for split, of_owners in parts.items():
        made[f"{split}_images"] = np.concatenate(of_owners)
        made[f"{split}_labels"] = np.repeat(np.arange(owners), [len(some) for some in of_owners])
    return _prepared(pool / "sets" / f"blood-labs-{owners}.npz", made) | {"data__channels": 3}


def kind_of(owner: str) -> str:
    """What an owner's images are of: images do not tell which of several owners of a kind."""
    return owner.partition(LAB)[0]


def kinds_of(tasks: Sequence[Task]) -> list[Task]:
    """The images of all owners of each kind together, in the order of the first owners."""
    members: dict[str, list[Task]] = {}
    for task in tasks:
        members.setdefault(kind_of(task.name), []).append(task)
    return [
        Task(
            kind,
            train=np.concatenate([task.train for task in some]),
            test=np.concatenate([task.test for task in some]),
            index=some[0].index,
            validation=np.concatenate([task.validation for task in some]),
        )
        for kind, some in members.items()
    ]


def _torchvision(dataset: str, folder: str) -> Callable[[Path | None, Path, int], dict[str, Any]]:
    def settings(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
        return {"data__dataset": dataset, "data__dir": str(_needed(data, folder).parent)}

    return settings


def _digits(data: Path | None, pool: Path, owners: int) -> dict[str, Any]:
    if data is not None:
        raise UserError("--data-dir means nothing to --set digits, which ships with scikit-learn")
    return {"data__dataset": "digits"}


def _needed(data: Path | None, name: str) -> Path:
    if data is None:
        raise UserError(f"--data-dir is needed: the folder that holds {name}")
    if not (data / name).exists():
        raise UserError(f"--data-dir {data} has no {name}; name the folder that holds it")
    return data / name


def _prepared(path: Path, arrays: Arrays) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())
    return {"data__dataset": "npz", "data__dir": str(path.absolute())}


SETS: Mapping[str, OwnerSet] = {
    "characters": OwnerSet(242, 12, 13, 3, _characters),
    "alphabets": OwnerSet(8, 8, 20, 32, _alphabets),
    "mnist": OwnerSet(10, 10, 20, 32, _torchvision("mnist", "MNIST")),
    "fashion_mnist": OwnerSet(10, 10, 20, 32, _torchvision("fashion_mnist", "FashionMNIST")),
    "blood_cells": OwnerSet(3, 3, 20, 32, _blood_cells),
    "blood_labs": OwnerSet(KINDS * LABS, KINDS * LABS, 20, 12, _blood_labs),
    "digits": OwnerSet(10, 10, 20, 32, _digits),
}

"""Tasks from data sets as others have them: torch's, a table of Hugging Face's, partitions of
flwr-datasets. All are known by what they can do; none of these libraries is needed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from srfed.config import DataConfig
from srfed.data.images import Images, fit_image, fit_images
from srfed.data.mapped import ImageCollector
from srfed.data.source import slugs, split_by_content
from srfed.data.tasks import Task, extents
from srfed.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SPLITS = {"train", "test"}
ALLOWED = (
    "a list of srfed.Task, a mapping of owners' names to data sets, one data set with labels, a "
    "list of data sets, or a partitioner of flwr-datasets"
)


def given_tasks(config: DataConfig, given: Any) -> list[Task]:
    """The tasks that somebody has as objects, converted once.

    Each data set is read once, in order, an owner after the other, so what it draws at random is
    drawn once. An owner's images may be more than memory holds: see :mod:`srfed.data.mapped`. Where
    there is no test split, ``data.test_fraction`` of an owner's images are held out, as their
    content says; ``data.image_size`` and ``data.channels`` are applied.

    Args:
        config: the run's data settings.
        given: :class:`Task` objects; or a mapping of owners' names to data sets; or a list of data
            sets, whose owners are "owner-0", ...; or one data set with labels, an owner for each
            label; or a partitioner of flwr-datasets, or a ``FederatedDataset`` with one, whose
            owners are "partition-0", .... A data set is anything with a length and an index, or
            that can be gone through once: its
            items are images, (image, label), or rows with a column "image" (or "img"); or a mapping
            of "train" and "test" to two of them. An image is a picture of Pillow's; an array H x W
            or H x W x C; or a tensor H x W or C x H x W; of uint8, or of floats from 0 to 1.

    >>> rng = np.random.default_rng(0)
    >>> images = rng.random((10, 8, 8))
    >>> [task] = given_tasks(DataConfig(), {"clinic": images})
    >>> task.name, task.train.dtype, task.shape, len(task.train) + len(task.test)
    ('clinic', dtype('uint8'), (8, 8, 1), 10)

    Raises:
        UserError: it is none of these; an image is none, or of another shape than the owner's
            first; too few images differ.
    """
    if isinstance(given, Sequence) and all(isinstance(one, Task) for one in given):
        return list(given)
    return [
        _task(config, owner, index, data)
        for index, (owner, data) in enumerate(_owners(config, given))
    ]


def _owners(config: DataConfig, given: Any) -> Iterator[tuple[str, Any]]:
    """The owners, and each one's data set."""
    partitioners = getattr(given, "partitioners", None)
    if isinstance(partitioners, Mapping):
        if len(partitioners) != 1:
            raise UserError(
                f"tasks has partitioners of {len(partitioners)} splits; allowed: one, or a mapping "
                "of owners' names to data sets"
            )
        # A FederatedDataset gives its partitioner the data when it is first asked for a partition.
        (split,) = partitioners
        given.load_partition(0, split)
        given = partitioners[split]
    if hasattr(given, "load_partition") and hasattr(given, "num_partitions"):
        for number in range(int(given.num_partitions)):
            yield f"partition-{number}", given.load_partition(number)
    elif isinstance(given, Mapping) and set(given) != SPLITS:
        if not given:
            raise UserError(f"tasks is empty; allowed: {ALLOWED}")
        for owner, data in given.items():
            yield str(owner), data
    elif isinstance(given, Sequence) and not isinstance(given, str) and _are_data_sets(given):
        for number, data in enumerate(given):
            yield f"owner-{number}", data
    else:
        yield from _by_label(config, given)


def _are_data_sets(given: Sequence[Any]) -> bool:
    """Whether a list is one of data sets, and not itself one of (image, label)."""
    return bool(given) and not isinstance(given[0], tuple | Mapping | Image.Image | Task)


def _by_label(config: DataConfig, given: Any) -> Iterator[tuple[str, Any]]:
    """An owner for each label of one data set, in the labels' order."""
    splits = given if isinstance(given, Mapping) else {"train": given}
    own: dict[int, dict[str, ImageCollector]] = {}
    for number, (image, label) in enumerate(_items(splits["train"], "tasks")):
        if label is None:
            own = {}
            break
        collectors = {split: ImageCollector() for split in splits}
        _take(config, own.setdefault(int(label), collectors)["train"], image, "tasks", number)
    if not own:
        raise UserError(
            f"tasks is of type {type(given).__name__} without a label for each image, so nobody "
            f"can say whose each is; allowed: {ALLOWED}"
        )
    for number, (image, label) in enumerate(_items(splits.get("test", []), "tasks['test']")):
        if label is not None and int(label) in own:
            _take(config, own[int(label)]["test"], image, "tasks['test']", number)
    known = sorted(own)
    for label, name in zip(known, _label_names(splits["train"], known), strict=True):
        yield name, own[label] if "test" in splits else own[label]["train"]


def _label_names(data: Any, labels: Sequence[int]) -> list[str]:
    """As torchvision and Hugging Face say them, else "class-3"."""
    names = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    for column in LABEL_COLUMNS:
        if names is None and isinstance(features, Mapping) and column in features:
            names = getattr(features[column], "names", None)
    if names is None or not all(0 <= label < len(names) for label in labels):
        return [f"class-{label}" for label in labels]
    return slugs([str(names[label]) for label in labels])


def _task(config: DataConfig, owner: str, index: int, data: Any) -> Task:
    splits = data if isinstance(data, Mapping) and set(data) == SPLITS else {"train": data}
    train = _images(config, splits["train"], f"tasks[{owner!r}]")
    if "test" in splits:
        test = _images(config, splits["test"], f"tasks[{owner!r}]['test']")
    else:
        # images_per_task is applied when the stored tasks are read.
        everything = config.model_copy(update={"images_per_task": None})
        train, test = split_by_content(everything, owner, train)
    return Task(owner, train, test, index)


def _images(config: DataConfig, data: Any, where: str) -> Images:
    """uint8 N x H x W x C of a data set."""
    collector = data if isinstance(data, ImageCollector) else ImageCollector()
    if collector is not data:
        for number, (image, _) in enumerate(_items(data, where)):
            _take(config, collector, image, where, number)
    if collector.shape is None:
        raise UserError(f"{where} has no images; allowed: 2 and more")
    return collector.images()


def _take(
    config: DataConfig, collector: ImageCollector, image: Any, where: str, number: int
) -> None:
    try:
        fitted = _image(config, image)
    except UserError as error:
        raise UserError(f"{where}: image {number}: {error}") from error
    if collector.shape not in (None, fitted.shape):
        raise UserError(
            f"{where}: image {number} is {extents(fitted.shape)}, and the first "
            f"{extents(collector.shape)}; set data.image_size and data.channels"
        )
    collector.add(fitted[None])


def _items(data: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """Each image with its label, None where there is none."""
    columns = getattr(data, "column_names", None)
    if columns is None:
        columns = getattr(data, "columns", list(data) if isinstance(data, Mapping) else None)
    if columns is not None:
        yield from _rows(data, list(columns), where)
        return
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        # As torch's samplers do: going through a data set need not end.
        items: Iterable[Any] = (data[number] for number in range(len(data)))
    elif hasattr(data, "__iter__"):
        items = data
    else:
        raise UserError(
            f"{where} is of type {type(data).__name__}, which cannot be gone through; allowed: "
            f"{ALLOWED}"
        )
    for item in items:
        if isinstance(item, Mapping):
            name = _column(list(item), IMAGE_COLUMNS)
            if name is None:
                raise _no_images(list(item), where)
            label = _column(list(item), LABEL_COLUMNS)
            yield item[name], None if label is None else item[label]
        elif isinstance(item, tuple | list) and item:
            yield item[0], item[1] if len(item) > 1 else None
        else:
            yield item, None


def _rows(data: Any, columns: list[str], where: str) -> Iterator[tuple[Any, Any]]:
    """Of a table, without its other columns."""
    name, label = _column(columns, IMAGE_COLUMNS), _column(columns, LABEL_COLUMNS)
    if name is None:
        raise _no_images(columns, where)
    labels = [None] * len(data[name]) if label is None else data[label]
    yield from zip(data[name], labels, strict=True)


def _column(columns: list[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in columns), None)


def _no_images(columns: list[str], where: str) -> UserError:
    return UserError(
        f"{where} has the columns {', '.join(map(str, columns))}; allowed: one of them called "
        f"{' or '.join(IMAGE_COLUMNS)}"
    )


def _image(config: DataConfig, image: Any) -> Images:
    """uint8 H x W x C of one image."""
    if isinstance(image, Image.Image):
        return fit_image(
            image, config.image_size, config.channels, config.intensity, config.background
        )
    tensor = hasattr(image, "detach")
    values = image.detach().cpu().numpy() if tensor else np.asarray(image)
    if tensor and values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3):
        form = "a tensor H x W or C x H x W" if tensor else "an array H x W or H x W x C"
        turned = (
            "; this looks like C x H x W: turn it with image.transpose(1, 2, 0)"
            if not tensor and values.ndim == 3 and values.shape[0] in (1, 3)
            else ""
        )
        raise UserError(
            f"it is of type {type(image).__name__} and shape {tuple(np.shape(image))}; allowed: "
            f"{form} with 1 or 3 channels, or a picture of Pillow's{turned}"
        )
    fitted: Images = fit_images(_levels(values)[None], config.image_size, config.channels)[0]
    return fitted


def _levels(values: NDArray[Any]) -> Images:
    levels: Images = values
    if values.dtype == np.uint8:
        return levels
    if values.dtype.kind != "f":
        raise UserError(f"its values are {values.dtype}; allowed: uint8, or floats from 0 to 1")
    least, greatest = float(values.min()), float(values.max())
    if not (least >= 0 and greatest <= 1):
        raise UserError(
            f"its values go from {least:g} to {greatest:g}; allowed: floats from 0 to 1, or uint8"
        )
    levels = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return levels

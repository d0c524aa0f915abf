"""Tasks: the image distributions that the clients own, one each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from srfed.config import DataConfig
from srfed.data.cifar import open_cifar
from srfed.data.digits import open_digits
from srfed.data.folder import FolderSource, describe_listings, describe_pictures, open_folder
from srfed.data.idx import open_idx
from srfed.data.images import Images
from srfed.data.npz import open_npz
from srfed.data.record import ImageRecord, read_records, write_records
from srfed.data.source import Source
from srfed.data.validation import set_aside
from srfed.errors import UserError
from srfed.files import Stamp, stamp
from srfed.paths import user_path
from srfed.records import Shape

ALLOW = "allow the change with --allow-changed-images"
"""What a command that has the option advises."""


@dataclass(frozen=True, eq=False)
class Task:
    """One client's images; how they were chosen is said in :mod:`srfed.data.source`."""

    name: str
    """Unique and safe as a file name, for example "digit-3"; the client's id in a simulation."""
    train: Images
    """uint8, N x H x W x C."""
    test: Images
    """Held out: uint8, M x H x W x C."""
    index: int = 0
    """Position among the data set's tasks, from 0."""
    validation: Images = field(default_factory=lambda: np.empty((0, 0, 0, 0), np.uint8))
    """Set aside to choose a round by: uint8, V x H x W x C; see
    :mod:`srfed.data.validation`."""

    @property
    def shape(self) -> Shape:
        """H, W, C of its images."""
        height, width, channels = self.train.shape[1:]
        return height, width, channels


def task_names(config: DataConfig) -> list[str]:
    """Name all tasks of the data set, in order, without decoding its images.

    Raises:
        UserError: the data set is not where ``data.dir`` says, or is not what it should be.
    """
    return _open(config).names


def load_task(
    config: DataConfig, index: int, known: Mapping[str, ImageRecord] | None = None
) -> Task:
    """Load one client's own task; of other tasks no more is read than the file format forces.

    Args:
        config: the run's data settings.
        index: position among the tasks.
        known: by task, images that stay on their side where their content decides it.

    Raises:
        UserError: as :func:`task_names`, or no task has this index, an image cannot be read, sizes
            differ, or there are too few images.
    """
    source = _open(config)
    return _load(config, source, _checked(config, source, index), known or {})


def load_tasks(
    config: DataConfig, count: int, known: Mapping[str, ImageRecord] | None = None
) -> list[Task]:
    """Load the first ``count`` tasks; ``known`` as in :func:`load_task`.

    Raises:
        UserError: as :func:`load_task`, or the data set has fewer tasks.
    """
    source, known = _open(config), known or {}
    if not 1 <= count <= len(source.names):
        raise UserError(
            f"federation.clients = {count} is impossible with data.dataset = {config.dataset}, "
            f"which has {len(source.names)} tasks; allowed: 1 to {len(source.names)}"
        )
    return [_load(config, source, index, known) for index in range(count)]


def check_one_shape(tasks: Sequence[Task], needed_by: str) -> None:
    """Raise UserError, saying what needs it, unless all tasks' images are of one shape."""
    first = tasks[0]
    for task in tasks:
        if task.shape != first.shape:
            raise UserError(
                f"{needed_by} needs images of one height x width x channels: task {first.name} has "
                f"{extents(first.shape)}, task {task.name} {extents(task.shape)}; set "
                "data.image_size and data.channels"
            )


def extents(shape: Sequence[int]) -> str:
    """In words.

    >>> extents((28, 28, 1))
    '28 x 28 x 1'
    """
    return " x ".join(map(str, shape))


def load_recorded_tasks(
    config: DataConfig,
    count: int,
    record: Path,
    on_change: Callable[[str], object] | None = None,
    *,
    remedy: str = ALLOW,
) -> list[Task]:
    """Load a run's tasks, and compare them with the record of the images that it began with.

    Args:
        config: the run's data settings.
        count: the first so many tasks.
        record: the run's file; where there is none yet, nothing is compared.
        on_change: told in one sentence how the images differ, which is then allowed; None refuses
            it.
        remedy: what the refusal advises, besides putting the images back.

    Raises:
        UserError: as :func:`load_tasks`; the record is damaged; the images have changed.
    """
    known = read_records(record)
    tasks = load_tasks(config, count, known)
    if changes := _changes(tasks, known):
        if on_change is None:
            raise UserError(f"{changes}; put them back, or {remedy}")
        on_change(changes)
    return tasks


def load_recorded_task(config: DataConfig, index: int, record: Path) -> Task:
    """Load one client's own task as :func:`load_recorded_tasks` does, which refuses other
    images.

    The data set is opened, and a file of all tasks read, once a process for each state of the
    record: where the images have changed, and that was allowed, the record has too.
    """
    if (state := stamp(record)) is None:
        return load_task(config, index)
    source, known = _opened(config, record, state)
    task = _load(config, source, _checked(config, source, index), known)
    if changes := _changes([task], known):
        raise UserError(f"{changes}; put them back")
    return task


def _changes(tasks: Sequence[Task], known: Mapping[str, ImageRecord]) -> str:
    """How the tasks' images differ from those on record, in one sentence; empty where they do
    not.
    """
    told = [
        f"{task.name}: {words}"
        for task in tasks
        if task.name in known and (words := known[task.name].differences(ImageRecord.of(task)))
    ]
    return (
        f"the images are not those that the run has on record ({'; '.join(told)})" if told else ""
    )


def record_tasks(record: Path, tasks: Sequence[Task]) -> None:
    """Keep which images the tasks have, where that is not on record already; raises UserError where
    it cannot be.
    """
    now = {task.name: ImageRecord.of(task) for task in tasks}
    if read_records(record) != now:
        write_records(record, now)


def describe_images(config: DataConfig, count: int) -> list[str]:
    """What is taken of the first ``count`` task folders, what is passed over and why: a few lines.

    No line for data sets that are one file. Raises UserError as :func:`load_tasks`.
    """
    source = _open(config)
    if not isinstance(source, FolderSource):
        return []
    listings = source.listings[:count]
    files = [file for listing in listings for file in listing.files]
    return [*describe_listings(listings, source.skipped), *describe_pictures(files, config)]


@lru_cache(maxsize=1)
def _opened(
    config: DataConfig, record: Path, state: Stamp
) -> tuple[Source, Mapping[str, ImageRecord]]:
    """A run's data set and record; ``state`` is that of the record's file."""
    return _open(config), read_records(record)


def _checked(config: DataConfig, source: Source, index: int) -> int:
    if not 0 <= index < len(source.names):
        raise UserError(
            f"there is no task {index}; {config.dataset} has tasks 0 to {len(source.names) - 1}"
        )
    return index


def _load(
    config: DataConfig, source: Source, index: int, records: Mapping[str, ImageRecord]
) -> Task:
    name = source.names[index]
    known = records.get(name)
    train, test = source.load(index, known)
    train, validation = set_aside(config, name, train, known)
    return Task(name, train, test, index, validation)


@lru_cache(maxsize=1)
def _open_npz(config: DataConfig, state: Stamp | None) -> Source:
    """A file of all tasks, read once a process as long as it stays as it is."""
    return open_npz(config)


def _open(config: DataConfig) -> Source:
    match config.dataset:
        case "digits":
            return open_digits(config)
        case "mnist" | "fashion_mnist":
            return open_idx(config)
        case "cifar10" | "cifar100":
            return open_cifar(config)
        case "npz":
            return _open_npz(config, stamp(user_path(config.dir)))
        case "folder":
            return open_folder(config)
        case "sites":
            raise UserError(
                "data.dataset = sites has no images here: each deployed site has its own"
            )

"""Tasks: the image distributions that the clients own, one each."""

from dataclasses import dataclass

from srfed.config import DataConfig
from srfed.data.cifar import open_cifar
from srfed.data.digits import open_digits
from srfed.data.folder import open_folder
from srfed.data.idx import open_idx
from srfed.data.images import Images
from srfed.data.npz import open_npz
from srfed.data.source import Source
from srfed.errors import UserError


@dataclass(frozen=True, eq=False)
class Task:
    """One client's images; how they were chosen is said in :func:`srfed.data.source.split`."""

    index: int
    """Position among the data set's tasks, from 0."""
    name: str
    """Unique and safe as a file name, for example "digit-3"; the client's id in a simulation."""
    train: Images
    """uint8, N x H x W x C."""
    test: Images
    """Held out: uint8, M x H x W x C."""


def task_names(config: DataConfig) -> list[str]:
    """Name all tasks of the data set, in order, without decoding its images.

    Raises:
        UserError: the data set is not where ``data.dir`` says, or is not what it should be.
    """
    return _open(config).names


def load_task(config: DataConfig, index: int) -> Task:
    """Load one client's own task; of other tasks no more is read than the file format forces.

    Raises:
        UserError: as :func:`task_names`, or no task has this index, an image cannot be read, sizes differ,
            or there are too few images.
    """
    source = _open(config)
    if not 0 <= index < len(source.names):
        raise UserError(f"there is no task {index}; {config.dataset} has tasks 0 to {len(source.names) - 1}")
    return Task(index, source.names[index], *source.load(index))


def load_tasks(config: DataConfig, count: int) -> list[Task]:
    """Load the first ``count`` tasks, all with images of one shape.

    Raises:
        UserError: as :func:`load_task`, or the data set has fewer tasks, or their images differ in shape.
    """
    source = _open(config)
    if not 1 <= count <= len(source.names):
        raise UserError(
            f"federation.clients = {count} is impossible with data.dataset = {config.dataset}, which has "
            f"{len(source.names)} tasks; allowed: 1 to {len(source.names)}"
        )
    tasks = [Task(index, source.names[index], *source.load(index)) for index in range(count)]
    first = tasks[0]
    for task in tasks:
        if task.train.shape[1:] != first.train.shape[1:]:
            raise UserError(
                f"images differ in height x width x channels: task {first.name} has {_shape(first)}, "
                f"task {task.name} {_shape(task)}; set data.image_size and data.channels"
            )
    return tasks


def _open(config: DataConfig) -> Source:
    match config.dataset:
        case "digits":
            return open_digits(config)
        case "mnist" | "fashion_mnist":
            return open_idx(config)
        case "cifar10" | "cifar100":
            return open_cifar(config)
        case "npz":
            return open_npz(config)
        case "folder":
            return open_folder(config)
        case "sites":
            raise UserError("data.dataset = sites has no images here: each deployed site has its own")


def _shape(task: Task) -> str:
    return " x ".join(str(extent) for extent in task.train.shape[1:])

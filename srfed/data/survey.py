"""What an owner's images are like, before any of them is decoded for training."""

from dataclasses import dataclass

from srfed.config import DataConfig
from srfed.data.folder import Listing, open_folder, pages
from srfed.data.pictures import is_grey, opened
from srfed.data.tasks import load_tasks, task_names
from srfed.errors import UserError

LOOKED_AT = 100
"""At most so many pictures of a task are opened, evenly over their paths."""


@dataclass(frozen=True)
class Survey:
    """Tasks and their images, in figures.

    Attributes:
        names: the tasks, in order.
        training: training images of each task; where content decides the split, about so many.
        sizes: (width, height) of the pictures that were looked at.
        grey: which of these are grey.
    """

    names: list[str]
    training: list[int]
    sizes: list[tuple[int, int]]
    grey: list[bool]

    @property
    def usual(self) -> int:
        """Training images of the owner in the middle."""
        return sorted(self.training)[len(self.training) // 2]

    @property
    def short_side(self) -> int:
        """All but a twentieth of the pictures are at least so wide and so high."""
        sides = sorted(min(size) for size in self.sizes)
        return sides[len(sides) // 20]


def survey(config: DataConfig, count: int | None = None) -> Survey:
    """Look at the images of the first ``count`` tasks of an owner's data; None looks at all.

    Raises:
        UserError: as :func:`~srfed.data.tasks.load_tasks`; a picture cannot be read.
    """
    if config.dataset != "folder":
        tasks = load_tasks(config, count or len(task_names(config)))
        shapes = [task.shape for task in tasks]
        return Survey(
            [task.name for task in tasks],
            [len(task.train) for task in tasks],
            [(width, height) for height, width, _ in shapes],
            [channels == 1 for _, _, channels in shapes],
        )
    source = open_folder(config)
    listings = source.listings[:count]
    sizes, grey = [], []
    for listing in listings:
        for file in listing.files[:: -(-len(listing.files) // LOOKED_AT) or 1]:
            # Opening reads the header alone.
            with opened(file) as image:
                sizes.append(image.size)
                grey.append(is_grey(image))
    if not sizes:
        raise UserError(
            f"data.dir = {config.dir} holds no pictures in its {len(source.names)} task folders"
        )
    return Survey(
        source.names[:count], [_training(config, listing) for listing in listings], sizes, grey
    )


def _training(config: DataConfig, listing: Listing) -> int:
    count = len(pages(listing.train, config))
    held_out = 0 if listing.test is not None else round(count * config.test_fraction)
    return min(count - held_out, config.images_per_task or count)

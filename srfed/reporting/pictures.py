"""Pictures of images: a labelled grid, one row a task, and its PNG."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from srfed.errors import UserError
from srfed.files import write_bytes, written_tree

Images = NDArray[np.uint8]
SMALLEST_CELL = 56
GAP = 2
LABEL_SIZE = 13
LONGEST_FOLDER = 100
RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
"""What no file may be called in Windows, whatever its ending."""


def draw_grid(rows: Mapping[str, Images], titles: Sequence[str] = ()) -> Images:
    """Draw rows of images with their labels on the left.

    Args:
        rows: uint8 N x H x W x C by label, C = 1 or 3 (of other numbers of channels the first is
            drawn); rows may differ in length, and in H, W and C.
        titles: what stands over the columns, from the left; nothing takes no room.

    Returns:
        uint8 H' x W' x 3; small images are enlarged by a whole factor, nearest neighbour. Cells are
        as large as the largest image needs.
    """
    font = ImageFont.load_default(LABEL_SIZE)
    tiles = {
        label: [_tile(image) for image in images] for label, images in rows.items() if len(images)
    }
    height = max((tile.height for row in tiles.values() for tile in row), default=SMALLEST_CELL)
    width = max((tile.width for row in tiles.values() for tile in row), default=SMALLEST_CELL)
    label_width = 8 + max(int(font.getlength(label)) for label in rows)
    step_y, step_x = height + GAP, width + GAP
    columns = max(len(images) for images in rows.values())
    top = LABEL_SIZE + 2 * GAP if titles else 0
    sheet = Image.new("RGB", (label_width + columns * step_x, top + len(rows) * step_y), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((label_width + column * step_x, 0), title, fill="black", font=font)
    for row, label in enumerate(rows):
        pen.text(
            (4, top + row * step_y + (height - LABEL_SIZE) // 2),
            label,
            fill="black",
            font=font,
        )
        for column, tile in enumerate(tiles.get(label, [])):
            sheet.paste(tile, (label_width + column * step_x, top + row * step_y))
    return np.asarray(sheet)


def _tile(image: Images) -> Image.Image:
    """H x W x C as it is drawn."""
    height, width, channels = image.shape
    factor = max(1, -(-SMALLEST_CELL // max(height, width)))
    pixels = image if channels == 3 else np.repeat(image[..., :1], 3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (width * factor, height * factor), Image.Resampling.NEAREST
    )


def write_png(path: Path, picture: Images, *, private: bool = True) -> None:
    """Write a picture atomically, as :func:`~srfed.files.write_bytes` does; raises UserError where
    it cannot.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue(), private=private)


def read_png(path: Path) -> Images:
    """A picture that :func:`write_png` wrote, H x W x C; raises OSError where there is none."""
    with path.open("rb") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def write_image_folder(path: Path, images: Mapping[str, Images]) -> None:
    """Write images as a folder of PNG files with one folder for each task, all of it or nothing;
    torchvision's ``ImageFolder`` reads it, and so does ``data.dataset: folder``.

    Args:
        path: the folder; new or empty.
        images: uint8 N x H x W x C by task.

    Raises:
        UserError: it holds something already, cannot be written, or the images have a number of
            channels that PNG has not.
    """
    for task, group in images.items():
        if group.shape[-1] not in (1, 2, 3, 4):
            raise UserError(
                f"images of task {task!r} have {group.shape[-1]} channels; allowed in a PNG: 1 to "
                "4; take --npz"
            )
    with written_tree(path, private=False) as folder:
        for name, group in zip(folder_names(list(images)), images.values(), strict=True):
            (folder / name).mkdir()
            # As wide as the last number, so that their order by name is their order.
            digits = max(5, len(str(len(group) - 1)))
            for number, image in enumerate(group):
                pixels = image[..., 0] if image.shape[-1] == 1 else image
                Image.fromarray(pixels).save(folder / name / f"{number:0{digits}d}.png")


def folder_names(titles: Sequence[str]) -> list[str]:
    """Names of folders for different titles, in their order, that every file system can tell apart:
    letters, digits and . _ - alone, none twice in whatever case, none that Windows keeps for
    itself. A title that is such a name already keeps it.
    """
    found: dict[str, str] = {}
    for title in sorted(titles, key=lambda title: _plain(title) != title):
        name, number = _plain(title), 1
        while name.casefold() in {other.casefold() for other in found.values()}:
            number += 1
            name = f"{_plain(title)}-{number}"
        found[title] = name
    return [found[title] for title in titles]


def _plain(title: str) -> str:
    name = re.sub(r"[^\w.-]+", "_", title, flags=re.ASCII)[:LONGEST_FOLDER].strip(".") or "_"
    return f"_{name}" if RESERVED.fullmatch(name.partition(".")[0]) else name

"""Pictures of images: a labelled grid, one row a task, and its PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from srfed.files import write_bytes

Images = NDArray[np.uint8]
SMALLEST_CELL = 56
GAP = 2
LABEL_SIZE = 13


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

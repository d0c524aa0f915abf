"""Images that memory need not hold: they lie in a file, and the system reads what is used.

They are arrays of numpy's ``memmap``, or slices and views of one; nothing else about them differs.
"""

import math
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from srfed.data.images import Images
from srfed.errors import UserError

LARGEST_IN_MEMORY = 256 * 2**20
"""Bytes of one owner's images that are held in memory; more are kept in a file."""
_AT_ONCE = 16 * 2**20
_LOCAL_HEADER, _LENGTHS = 30, slice(26, 30)
"""Bytes of what stands before a member of a zip archive, besides its name and extra field, and
where the lengths of these two stand (PKWARE's APPNOTE, 4.3.7).
"""


class ImageCollector:
    """Takes images one after the other, in a file without a name as soon as they are many.

    The file lies where temporary files do (``TMPDIR``), and is gone when nobody uses the images.
    """

    def __init__(self) -> None:
        self._held: list[Images] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """H, W, C of the images; None before there is one."""
        return self._shape

    def add(self, images: Images) -> None:
        """Take N more, uint8 N x H x W x C of the shape of the first.

        Raises:
            UserError: there is no room for the file.
        """
        self._shape = images.shape[1:]
        self._held.append(images)
        self._bytes += images.nbytes
        if self._bytes > LARGEST_IN_MEMORY or self._file is not None:
            self._write()

    def images(self) -> Images:
        """All of them, N x H x W x C; raises ValueError where there is none."""
        if self._shape is None:
            raise ValueError("no image was added")
        if self._file is None:
            return np.concatenate(self._held)
        self._file.flush()
        length = self._file.tell() // math.prod(self._shape)
        return np.memmap(self._file, np.uint8, "r", shape=(length, *self._shape))

    def _write(self) -> None:
        try:
            if self._file is None:
                # It lives as long as the images.
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
            for images in self._held:
                self._file.write(np.ascontiguousarray(images).data)
        except OSError as error:
            raise UserError(
                f"cannot keep an owner's images in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; the environment's TMPDIR names another place"
            ) from error
        self._held = []


def is_mapped(images: Images) -> bool:
    """Whether these lie in a file."""
    return isinstance(images, np.memmap)


def chosen_images(images: Images, chosen: NDArray[np.bool_]) -> Images:
    """Those that are chosen, in order: ``images[chosen]``, in a file where they are many."""
    if not is_mapped(images):
        return images[chosen]
    collector, rows = ImageCollector(), max(1, _AT_ONCE // max(1, images[0].nbytes))
    for first in range(0, len(images), rows):
        collector.add(images[first : first + rows][chosen[first : first + rows]])
    return collector.images()


def map_member(path: Path, name: str) -> NDArray[Any] | None:
    """An array of an .npz file as it lies there; None where that cannot be, or need not: it is
    compressed, small, or no plain array in C order.

    Raises:
        OSError, KeyError, ValueError, zipfile.BadZipFile: as numpy does, for what is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.file_size <= LARGEST_IN_MEMORY:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset)
        begin = member.header_offset + _LOCAL_HEADER
        begin += sum(struct.unpack("<HH", file.read(_LOCAL_HEADER)[_LENGTHS]))
        file.seek(begin)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if fortran or dtype.hasobject:
        return None
    if offset + dtype.itemsize * math.prod(shape) > begin + member.file_size:
        raise ValueError(f"{name} is shorter than its header says")
    return np.memmap(path, dtype, "r", offset, shape)

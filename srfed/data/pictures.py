"""One picture file, however it was written: opened as an object, turned upright, of any depth, page
by page.
"""

import re
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from srfed.errors import UserError

DEEP_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "LA", "La")
PAGED = ("TIFF", "PNG", "WEBP")
"""Formats whose further pages are pictures; those in a JPEG are previews and gain maps."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""
LARGEST_METADATA = 2**20
"""Bytes of one piece of a PNG's metadata, unpacked; what is larger is not looked at."""
_ORIENTATION = 0x0112
_SUBFILE, _BITS, _PHOTOMETRIC, _PLANES, _SAMPLE = 254, 258, 262, 284, 339
_NO_PICTURE = 0b101
"""Bits of TIFF's NewSubfileType: a smaller copy of another page, or a mask of one."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
"""Chunks of a PNG that may be missing and decide what is seen, besides those of capital names."""
_SAYS_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX|RGBa|LA|CMYK);16[BLN]")
_LOW_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Pillow takes the upper byte of 16; read in the other order, it is the lower one."""


class Deep(NamedTuple):
    """The pixels of a picture of more than 8 bits, upright.

    Attributes:
        values: H x W of grey, H x W x 3 of RGB; whole numbers or floats.
        alpha: H x W, uint8; None where nothing is transparent.
    """

    values: NDArray[Any]
    alpha: NDArray[np.uint8] | None

    @property
    def visible(self) -> NDArray[Any]:
        """The values that are not wholly transparent."""
        return self.values if self.alpha is None else self.values[self.alpha > 0]


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """A picture file, and one line that names it for whatever goes wrong with it.

    Given its name, Pillow maps an uncompressed TIFF into memory, with the sides of an orientation
    that it has not turned yet; so it is given the open file. Of a PNG it sees no metadata but what
    says how the picture stands.
    """
    try:
        with file.open("rb") as stream, Image.open(_without_metadata(stream)[0]) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError(
            f"cannot read image {file}: its content is damaged, or of a kind that is not read"
        ) from error
    except Exception as error:
        # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and others for
        # damaged files.
        raise UserError(f"cannot read image {file}: {' '.join(str(error).split())}") from error


def damaged_metadata(file: Path) -> str:
    """What of a picture's metadata cannot be read, in a few words; empty where all of it can.

    Raises:
        UserError: the file cannot be read at all.
    """
    with opened(file) as image:
        found = [] if _orientation(image) is not None else ["EXIF"]
    with file.open("rb") as stream:
        return ", ".join([*_without_metadata(stream)[1], *found])


def pages_of(image: Image.Image) -> list[int]:
    """The pages of an open file that are pictures of their own, the first at least."""
    if image.format not in PAGED or (count := getattr(image, "n_frames", 1)) == 1:
        return [0]
    pages = list(range(count))
    if image.format == "TIFF":
        kinds = []
        for page in pages:
            image.seek(page)
            kinds.append(image.tag_v2.get(_SUBFILE, 0))  # type: ignore[attr-defined]
        image.seek(0)
        pages = [page for page in pages if not kinds[page] & _NO_PICTURE] or [0]
    return pages


def is_grey(image: Image.Image) -> bool:
    """Whether a picture is grey, with or without transparency, of any depth."""
    return image.mode in (*GREY_MODES, *DEEP_GREY) or "LA;16B" in _rawmodes(image)


def is_deep(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits a channel; of one that has been decoded, what it has
    now.
    """
    return image.mode in DEEP_GREY or _is_deep_colour(image)


def as_object(image: Image.Image) -> Image.Image:
    """The same picture; opened as :func:`opened` does where it was opened by name and is not
    decoded yet.
    """
    if isinstance(image, ImageFile.ImageFile) and image.filename and image.tile:
        return _again(image)
    return image


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says; as it is where that cannot be read."""
    # A TIFF turns itself, and a PNG may say it behind its pixels.
    image.load()
    method = UPRIGHT.get(_orientation(image) or 1)
    return image if method is None else image.transpose(method)


def deep_pixels(image: Image.Image) -> Deep:
    """The pixels of a picture that :func:`is_deep`; of a file not decoded before.

    Raises:
        UserError: its mode has no reading that would keep the values.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode in DEEP_GREY:
        kind, white_first = image.mode, tags.get(_PHOTOMETRIC) == 0
        unsigned = tags.get(_BITS, (0,))[0] == 32 and tags.get(_SAMPLE, (1,))[0] == 1
        key = image.info.get("transparency")
        values = np.asarray(upright(image))
        if unsigned and kind == "I" and tags:
            values = values.astype(np.int32).view(np.uint32)
        if white_first:
            if kind == "F":
                raise _unread(image, "floats whose zero is white")
            values = np.iinfo(values.dtype).max - values
        alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        return Deep(values, alpha)
    (raw, *others) = {*_rawmodes(image)}
    name = raw.partition(";")[0]
    if others or not _DEEP_COLOUR.fullmatch(raw) or name in ("CMYK", "RGBa"):
        raise _unread(image, f"{raw} of {max(tags.get(_BITS, (16,)))} bits")
    if image.tell() and image.format == "PNG":
        raise _unread(image, "a later page of 16 bits")
    if name == "LA":
        # Four bytes a pixel in either reading, filtered alike.
        pairs = np.asarray(upright(_again(image, "RGBA"))).astype(np.uint16)
        deep = pairs[..., 0::2] * 256 + pairs[..., 1::2]
        return Deep(deep[..., 0], _to_byte(deep[..., 1]))
    low = np.asarray(upright(_again(image, raw[:-1] + _LOW_BYTE[raw[-1]]))).astype(np.uint16)
    key = image.info.get("transparency")
    values = np.asarray(upright(_again(image))).astype(np.uint16) * 256 + low
    colour = values[..., :3]
    if name == "RGBA":
        return Deep(colour, _to_byte(values[..., 3]))
    if key is None:
        return Deep(colour, None)
    return Deep(colour, np.where((colour == key).all(-1), 0, 255).astype(np.uint8))


def _to_byte(values: NDArray[Any]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.rint(values / 257).astype(np.uint8)
    return levels


def _unread(image: Image.Image, what: str) -> UserError:
    return UserError(
        f"pictures of mode {image.mode}, {what}, are not read; allowed: 8 bits a channel, or grey "
        "and RGB of 16 bits in one plane"
    )


def _orientation(image: Image.Image) -> int | None:
    """As EXIF or XMP says; None where that is damaged."""
    try:
        if isinstance(about := image.info.get("exif"), bytes):
            # Once it has failed at it, as at a JPEG's opening, getexif is silent.
            Image.Exif().load(about)
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # It raises SyntaxError, struct.error and others, and the pixels are sound.
        return None


def _rawmodes(image: Image.Image) -> list[str]:
    """How the pixels lie in a file that is not decoded yet."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    raw = [one[0] if isinstance(one, tuple) and one else one for one in arguments]
    return [one for one in raw if isinstance(one, str)]


def _is_deep_colour(image: Image.Image) -> bool:
    raw = _rawmodes(image)
    bits = getattr(image, "tag_v2", {}).get(_BITS, (8,)) if raw else (8,)
    return any(map(_DEEP_COLOUR.fullmatch, raw)) or (image.format == "TIFF" and max(bits) > 8)


def _again(image: Image.Image, rawmode: str | None = None) -> Image.Image:
    """The same page of the same file, not decoded yet; with ``rawmode`` its bytes are taken for
    this.
    """
    stream = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    stream.seek(0)
    copy = Image.open(_without_metadata(BytesIO(stream.read()))[0])
    stream.seek(place)
    copy.seek(image.tell())
    if rawmode is not None:
        copy.tile = [_with_rawmode(tile, rawmode) for tile in copy.tile]
    return copy


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    arguments = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
    if hasattr(tile, "_replace"):
        return tile._replace(args=arguments)
    return (*tile[:3], arguments)


def _without_metadata(stream: IO[bytes]) -> tuple[IO[bytes], list[str]]:
    """A PNG without the chunks that say nothing of what is seen, and those of them that are damaged
    or too large; any other file as it is.
    """
    if stream.read(len(_SIGNATURE)) != _SIGNATURE:
        stream.seek(0)
        return stream, []
    kept, damaged = BytesIO(), []
    kept.write(_SIGNATURE)
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if not name[0] & 0x20 or name in _PIXELS:
            kept.write(head + stream.read(length + 4))
            if name == b"IEND":
                break
            continue
        body = stream.read(min(length, LARGEST_METADATA))
        stream.seek(length - len(body), 1)
        check = stream.read(4)
        if len(body) < length or _unpacked(name, body) > LARGEST_METADATA:
            damaged.append(f"{_printable(name)} above {LARGEST_METADATA // 2**20} MB")
        elif check != struct.pack(">I", zlib.crc32(name + body)):
            damaged.append(f"{_printable(name)} with a wrong checksum")
        elif name == b"eXIf" or body.startswith(_SAYS_ORIENTATION):
            kept.write(head + body + check)
    kept.write(head if len(head) < 8 else b"")
    kept.seek(0)
    return kept, damaged


def _printable(name: bytes) -> str:
    return name.decode("ascii", "replace") if name.isalpha() else "a chunk"


def _unpacked(name: bytes, body: bytes) -> int:
    """The length of what a chunk holds, looked at up to just above the limit."""
    _, _, rest = body.partition(b"\0")
    if name == b"iTXt" and rest[:1] == b"\x01":
        packed = rest[2:].split(b"\0", 2)[-1]
    elif name in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    else:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, LARGEST_METADATA + 1))
    except zlib.error:
        return len(body)

"""Picture files against arrays made by hand: every mode, orientation, depth and format that is
written.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from srfed.config import DataConfig
from srfed.data import describe_images, load_task
from srfed.data.folder import Page, read_pages
from srfed.data.images import fit_image
from srfed.data.survey import survey
from support.errors import message_of
from support.images import folder, random_images, save

HEIGHT, WIDTH = 9, 14
ORIENTATIONS = range(1, 9)
Pixels = NDArray[np.uint8]


def turned(pixels: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """How a camera that is held so puts down what is ``pixels`` upright: TIFF 6.0's table, where
    the 0th row and column are (top, left), (top, right), (bottom, right), (bottom, left),
    (left, top), (right, top), (right, bottom), (left, bottom).
    """
    other = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[:, ::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[::-1].swapaxes(0, 1),
    }[orientation]
    return np.ascontiguousarray(other)


def read(file: Path, **settings: object) -> Pixels:
    config = DataConfig.model_validate({"dataset": "folder", **settings})
    return read_pages([Page(file, 0)], config)[0]


def png(pixels: NDArray[np.generic], *chunks: tuple[bytes, bytes], kind: int) -> bytes:
    """A PNG of 16 bits, with the filters Sub, Up and Paeth in turn."""
    height, width = pixels.shape[:2]
    lines = pixels.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    step = lines.shape[1] // width
    raw, above = b"", np.zeros(lines.shape[1], int)
    for row, line in enumerate(lines):
        left = np.concatenate([np.zeros(step, int), line[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        guess = left + above - corner
        near = np.stack([abs(guess - left), abs(guess - above), abs(guess - corner)]).argmin(0)
        paeth = np.choose(near, [left, above, corner])
        number, prediction = [(1, left), (2, above), (4, paeth)][row % 3]
        raw += bytes([number]) + ((line - prediction) % 256).astype(np.uint8).tobytes()
        above = line
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def chunk(name: bytes, body: bytes, wrong: int = 0) -> bytes:
    check = zlib.crc32(name + body) ^ wrong
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def with_chunk(file: Path, extra: bytes, *, behind: bool = False) -> Path:
    """Put a chunk into a PNG, behind its header or its pixels."""
    content = file.read_bytes()
    place = len(content) - 12 if behind else 33
    file.write_bytes(content[:place] + extra + content[place:])
    return file


def examples() -> dict[str, tuple[Image.Image, Pixels]]:
    """By mode, an upright picture and what it looks like: grey H x W, or RGB H x W x 3."""
    colour = random_images(HEIGHT, WIDTH, 4)
    grey, rgb, alpha = colour[..., 0], colour[..., :3], colour[..., 3]
    share = alpha / 255.0
    palette = Image.fromarray(grey % 7, "P")
    table = random_images(7, 3, seed=1)
    palette.putpalette(table.tobytes())
    ink, black = colour[..., :3] / 255.0, colour[..., 3:] / 255.0
    luma, blue, red = (rgb[..., k].astype(float) for k in range(3))
    seen = np.stack(
        [
            luma + 1.402 * (red - 128),
            luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luma + 1.772 * (blue - 128),
        ],
        -1,
    )
    deep = np.linspace(100, 4195, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    scaled = (deep.astype(int) - 100) / 4095 * 255
    return {
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255.0, 0.0)),
        "L": (Image.fromarray(grey), grey),
        "LA": (Image.fromarray(np.dstack([grey, alpha])), grey * share),
        "P": (palette, table[grey % 7]),
        "RGB": (Image.fromarray(rgb), rgb),
        "RGBA": (Image.fromarray(colour), rgb * share[..., None]),
        "RGBX": (Image.frombytes("RGBX", (WIDTH, HEIGHT), colour.tobytes()), rgb),
        "CMYK": (Image.fromarray(colour, "CMYK"), 255 * (1 - ink) * (1 - black)),
        "YCbCr": (Image.fromarray(rgb, "YCbCr"), np.clip(seen, 0, 255)),
        "I;16": (Image.fromarray(deep.astype(np.uint16)), scaled),
        "I;16B": (
            Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes()),
            scaled,
        ),
        "I": (Image.fromarray(deep.astype(np.int32)), scaled),
        "F": (Image.fromarray(deep.astype(np.float32)), (deep - 100) / 4095 * 255),
    }


WRITTEN = {
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"),
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "jpg": ("L", "RGB", "CMYK"),
}


@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_mode_and_orientation_is_read_as_it_was_made(tmp_path: Path, suffix: str) -> None:
    for mode in WRITTEN[suffix]:
        picture, seen = examples()[mode]
        for orientation in ORIENTATIONS if suffix != "bmp" else [1]:
            methods = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
            method = methods[orientation]
            stored = picture if method is None else picture.transpose(Image.Transpose(method))
            if mode != "RGBX":  # It is no array of numpy's.
                expected = turned(np.asarray(picture), orientation)
                np.testing.assert_array_equal(np.asarray(stored), expected)
            exif = Image.Exif()
            exif[0x0112] = orientation
            compressions = [None, "tiff_lzw"] if suffix == "tif" else [None]
            for compression in compressions:
                if compression and mode in ("I;16B", "YCbCr"):
                    continue  # Pillow writes no such files.
                file = tmp_path / f"{mode.replace(';', '')}{orientation}{compression}.{suffix}"
                options = {
                    "tif": {"tiffinfo": {0x0112: orientation}, "compression": compression},
                    "png": {"exif": exif},
                    "webp": {"exif": exif, "lossless": True, "exact": True},
                    "jpg": {"exif": exif, "quality": 100, "subsampling": 0},
                    "bmp": {},
                }[suffix]
                stored.save(file, **options)
                found = read(file)
                where = (mode, orientation, compression)
                assert found.shape[:2] == (HEIGHT, WIDTH), where
                expected = seen if seen.ndim == 3 else seen[..., None]
                assert found.shape == expected.shape, where
                off = np.abs(found - expected.astype(float)).max()
                assert off <= (12 if suffix == "jpg" else 2 if mode == "YCbCr" else 1), where


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_uncompressed_tiff_handed_over_before_it_is_decoded_is_upright(
    tmp_path: Path, orientation: int
) -> None:
    for name, pixels in {
        "grey": random_images(HEIGHT, WIDTH),
        "clear": random_images(HEIGHT, WIDTH, 4),
        "deep": np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 500,
    }.items():
        save(tmp_path / name / "0.tif", turned(pixels, orientation), tiffinfo={0x0112: orientation})
        alike = save(tmp_path / name / "0.png", pixels)
        with Image.open(tmp_path / name / "0.tif") as lazy, Image.open(alike) as plain:
            np.testing.assert_array_equal(
                fit_image(lazy, None, None), fit_image(plain, None, None), name
            )


# --- depth ---

LOW, HIGH = 300, 4095


def deep_pixels(channels: int) -> NDArray[np.uint16]:
    drawn = np.random.default_rng(0).integers(LOW, HIGH + 1, (HEIGHT, WIDTH, channels))
    drawn[0, 0], drawn[-1, -1] = LOW, HIGH
    return drawn.astype(np.uint16)


def stretched(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.float64]:
    return (np.clip(values.astype(float), low, high) - low) / (high - low) * 255


@pytest.mark.parametrize("made", ["png", "II", "MM", "deflate", "MM deflate"])
def test_16_bit_colour_keeps_its_values(tmp_path: Path, made: str) -> None:
    colour = deep_pixels(3)
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[2:4] = 65535 // 3
    alpha[5, 5] = 0
    clear = np.concatenate([colour, alpha], -1)
    for orientation in (1, 6):
        for name, pixels in {"rgb": colour, "rgba": clear}.items():
            file = tmp_path / f"{name}{orientation}.{'png' if made == 'png' else 'tif'}"
            stored = turned(pixels, orientation)
            if made == "png":
                exif = Image.Exif()
                exif[0x0112] = orientation
                about = (b"eXIf", exif.tobytes()[6:])
                file.write_bytes(png(stored, about, kind=2 if name == "rgb" else 6))
            else:
                tifffile.imwrite(
                    file,
                    stored,
                    photometric="rgb",
                    byteorder=">" if "MM" in made else "<",
                    compression="deflate" if "deflate" in made else None,
                    extrasamples=["unassalpha"] if name == "rgba" else None,
                    extratags=[(0x0112, 3, 1, orientation, True)],
                )
            share = (alpha / 65535.0) if name == "rgba" else 1.0
            for settings, (low, high) in (
                ({}, (LOW, HIGH)),
                ({"intensity": (0.0, 65535.0)}, (0, 65535)),
                ({"intensity": (1000.0, 2000.0)}, (1000, 2000)),
            ):
                found = read(file, **settings)
                off = np.abs(found - stretched(colour, low, high) * share).max()
                assert off <= (1.5 if name == "rgba" else 0.5 + 1e-9), (name, settings)
            on_white = read(file, background=255)
            expected = stretched(colour, LOW, HIGH) * share + 255 * (1 - share)
            assert np.abs(on_white - expected).max() <= 1.5


def test_16_bit_grey_with_transparency_stays_grey(tmp_path: Path) -> None:
    grey, alpha = deep_pixels(1), np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[3] = 0
    grey[3] = 60000  # What cannot be seen does not stretch the rest.
    file = tmp_path / "grey.png"
    file.write_bytes(png(np.concatenate([grey, alpha], -1), kind=4))
    expected = stretched(grey, LOW, HIGH)
    expected[3] = 0
    assert read(file).shape == (HEIGHT, WIDTH, 1)
    assert np.abs(read(file) - expected).max() <= 0.5 + 1e-9
    keyed = tmp_path / "keyed.png"
    keyed.write_bytes(png(grey, (b"tRNS", struct.pack(">H", 60000)), kind=0))
    np.testing.assert_array_equal(read(keyed, background=9)[3], 9)
    np.testing.assert_array_equal(read(keyed)[4:], read(file)[4:])
    colour = np.repeat(grey, 3, -1)
    keyed.write_bytes(png(colour, (b"tRNS", struct.pack(">HHH", 60000, 60000, 60000)), kind=2))
    np.testing.assert_array_equal(read(keyed)[..., :1], read(file))
    assert survey(folder_with(tmp_path / "task", file)).grey == [True]


def folder_with(root: Path, *files: Path) -> DataConfig:
    (root / "one").mkdir(parents=True)
    for file in files:
        (root / "one" / file.name).write_bytes(file.read_bytes())
    return folder(root)


def test_white_is_white_in_whole_numbers_of_32_bits_and_where_zero_is_white(tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**32 - 1, 64).astype(np.uint32).reshape(8, 8)
    expected = np.rint(np.linspace(0, 255, 64)).reshape(8, 8, 1)
    for compression in (None, "deflate"):
        tifffile.imwrite(tmp_path / "wide.tif", ramp, compression=compression, byteorder="<")
        assert np.abs(read(tmp_path / "wide.tif") - expected).max() <= 1
        turned_over = np.linspace(65535, 0, 64).astype(np.uint16).reshape(8, 8)
        tifffile.imwrite(
            tmp_path / "white.tif",
            turned_over,
            photometric="miniswhite",
            compression=compression,
            byteorder="<",
        )
        assert np.abs(read(tmp_path / "white.tif") - expected).max() <= 1
    tifffile.imwrite(
        tmp_path / "float.tif", np.eye(8, dtype=np.float32), photometric="miniswhite", byteorder="<"
    )
    assert "floats whose zero is white" in message_of(read, tmp_path / "float.tif")


def test_depths_that_have_no_reading_are_refused_with_file_and_mode(tmp_path: Path) -> None:
    ink = tmp_path / "ink.tif"
    tifffile.imwrite(ink, deep_pixels(4), photometric="separated", byteorder="<")
    planes = tmp_path / "planes.tif"
    tifffile.imwrite(
        planes, np.moveaxis(deep_pixels(3), -1, 0), photometric="rgb", planarconfig="separate"
    )
    premultiplied = tmp_path / "premultiplied.tif"
    tifffile.imwrite(premultiplied, deep_pixels(4), photometric="rgb", extrasamples=["assocalpha"])
    for file, mode in ((ink, "CMYK"), (planes, "RGB"), (premultiplied, "RGBA")):
        text = message_of(read, file)
        assert f"cannot read image {file}: pictures of mode {mode}" in text
        assert "allowed: 8 bits a channel" in text


# --- pages ---


def test_pages_are_said_and_all_are_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    stack = [random_images(8, 8, seed=seed) for seed in range(4)]
    frames = [Image.fromarray(page).convert("RGB") for page in stack]
    made = {
        "stack.tif": {"save_all": True, "append_images": frames[1:]},
        "moving.png": {"save_all": True, "append_images": frames[1:]},
        "moving.webp": {"save_all": True, "append_images": frames[1:], "lossless": True},
    }
    for name, options in made.items():
        (tmp_path / name / "one").mkdir(parents=True)
        frames[0].save(tmp_path / name / "one" / name, **options)
        save(tmp_path / name / "one" / "single.png", np.dstack([stack[0][::-1]] * 3))
        first = load_task(folder(tmp_path / name), 0)
        assert len(first.train) + len(first.test) == 2
        said = " ".join(describe_images(folder(tmp_path / name), 1))
        assert f"1 of 2 pictures have more than one page ({name}: 4 pages)" in said
        assert "the first of each is taken" in said
        every = load_task(config := folder(tmp_path / name, pages="all"), 0)
        seen = {image[..., 0].tobytes() for image in (*every.train, *every.test)}
        assert seen == {page.tobytes() for page in (*stack, stack[0][::-1])}, name
        assert "every one is taken" in " ".join(describe_images(config, 1))
        assert sum(survey(config).training) == 4


def test_a_stacks_pages_are_upright_and_its_thumbnails_are_no_pictures(tmp_path: Path) -> None:
    pages = [random_images(HEIGHT, WIDTH, seed=seed) for seed in range(3)]
    file = tmp_path / "one" / "stack.tif"
    file.parent.mkdir()
    with tifffile.TiffWriter(file) as writer:
        for orientation, page in zip((1, 6, 8), pages, strict=True):
            writer.write(
                turned(page, orientation),
                photometric="minisblack",
                extratags=[(0x0112, 3, 1, orientation, True)],
                metadata=None,
            )
            writer.write(page[:5, :5], subfiletype=1, photometric="minisblack", metadata=None)
    task = load_task(folder(tmp_path, pages="all"), 0)
    seen = {image.tobytes() for image in (*task.train, *task.test)}
    assert seen == {page.tobytes() for page in pages}


# --- metadata ---


@pytest.mark.parametrize("behind", [False, True])
def test_what_a_png_says_of_itself_costs_no_pixel(tmp_path: Path, behind: bool) -> None:
    pixels = random_images(8, 8, 3)
    much = b"Comment\0\0" + zlib.compress(bytes(2 * 2**20))
    extras = {
        "text.png": chunk(b"zTXt", much),
        "profile.png": chunk(b"iCCP", b"icc\0\0" + much[9:]),
        "plain.png": chunk(b"tEXt", b"Comment\0" + b"x" * 2 * 2**20),
        "international.png": chunk(b"iTXt", b"Comment\0\1\0en\0\0" + much[9:]),
        "checksum.png": chunk(b"tEXt", b"Title\0a", wrong=1),
        "exif.png": chunk(b"eXIf", b"no EXIF at all"),
    }
    for name, extra in extras.items():
        file = with_chunk(save(tmp_path / "one" / name, pixels), extra, behind=behind)
        np.testing.assert_array_equal(read(file), pixels, name)
    said = " ".join(describe_images(folder(tmp_path), 1))
    assert "6 of 6 pictures have metadata that are not read" in said
    assert "checksum.png: tEXt with a wrong checksum" in said


def test_pixels_that_are_damaged_or_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = random_images(8, 8, 3)
    file = save(tmp_path / "cut.png", pixels)
    file.write_bytes(file.read_bytes()[:-40])
    assert f"cannot read image {file}" in message_of(read, file)
    file = with_chunk(save(tmp_path / "key.png", pixels), chunk(b"tRNS", bytes(6), wrong=1))
    assert f"cannot read image {file}" in message_of(read, file)
    file.write_bytes(b"no picture")
    assert "of a kind that is not read" in message_of(read, file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    assert "decompression bomb" in message_of(read, save(tmp_path / "bomb.png", pixels))


def test_the_orientation_that_xmp_tells_survives(tmp_path: Path) -> None:
    pixels = random_images(HEIGHT, WIDTH, 3)
    text = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    file = with_chunk(save(tmp_path / "x.png", turned(pixels, 6)), chunk(b"iTXt", text))
    np.testing.assert_array_equal(read(file), pixels)


def test_a_damaged_exif_leaves_a_photograph_as_it_lies(tmp_path: Path) -> None:
    file = save(tmp_path / "one" / "x.jpg", random_images(8, 8, 3), exif=b"Exif\0\0broken")
    with Image.open(file) as image:
        np.testing.assert_array_equal(read(file), np.asarray(image))
    assert "x.jpg: EXIF" in " ".join(describe_images(folder(tmp_path), 1))

"""Images as arrays: the range that models see, and the one rule for modes, sizes and channels."""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from srfed.data.pictures import GREY_MODES, as_object, deep_pixels, is_deep, upright
from srfed.errors import UserError

if TYPE_CHECKING:
    # What is wrong with a data set is found without torch, whose import takes seconds.
    import torch

Images = NDArray[np.uint8]
CHANNELS = (1, 3)
"""Grey and RGB."""
SMALLEST = 5
"""Least height and width of an image, in pixels: the UNet halves it three times."""
LARGEST = 512
"""Greatest height and width that ``data.image_size`` allows, and that are trained on without it."""
MOST_CHANNELS = 4
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
FAR = 4
"""A least or greatest value this many times further away than the others reach is taken for no
measurement.
"""
Intensity = Literal["per_image"] | tuple[float, float]
"""How 16-bit, 32-bit and float pixels become 0 to 255: by each picture's own range, or by one for
all.
"""


def to_model_range(images: Images) -> "torch.Tensor":
    """Scale uint8 images (N x H x W x C) to float32 in [-1, 1] (N x C x H x W): x / 127.5 - 1.

    Raises:
        ValueError: the array is not uint8 or not four-dimensional.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 images N x H x W x C, got {images.dtype} {images.shape}")
    import torch

    # np.array copies: torch accepts neither the negative strides of a mirrored view nor read-only
    # memory.
    return (
        torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        .float()
        .div_(127.5)
        .sub_(1)
    )


def to_uint8(images: "torch.Tensor") -> Images:
    """Quantise images in [-1, 1] (N x C x H x W, any float type) to uint8 (N x H x W x C).

    Values outside are clamped; each value takes the *nearest* of the 256 levels, so that
    ``to_uint8(to_model_range(x))`` is x.

    Raises:
        ValueError: the tensor is not floating point or not four-dimensional, or has a NaN.
    """
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            f"expected float images N x C x H x W, got {images.dtype} {tuple(images.shape)}"
        )
    if images.isnan().any():
        raise ValueError("the images contain NaN")
    return to_levels(images).cpu().numpy()


def to_levels(images: "torch.Tensor") -> "torch.Tensor":
    """The same of images of which nothing is asked, as a tensor on their device, uint8
    N x H x W x C; of NaN it makes anything.
    """
    import torch

    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def fit_image(
    image: Image.Image,
    size: int | None,
    channels: Literal[1, 3] | None,
    intensity: Intensity = "per_image",
    background: int = 0,
) -> Images:
    """Bring one picture into the form that a task's images have.

    In this order: the EXIF orientation is applied; pixels of 16 bits, 32 bits and floats, grey and
    colour, are scaled as ``intensity`` says; transparency is composited on ``background``; the
    picture becomes grey (ITU-R 601 luma) or RGB; the short side is resized to ``size`` by Pillow's
    antialiased bicubic filter and the centre is cut out, as torchvision's ``Resize(size, BICUBIC)``
    and ``CenterCrop(size)`` do. Of several frames or pages the current one counts, which is the
    first in a file just opened.

    Args:
        image: any mode that Pillow converts to RGB.
        size: height and width of the result; None keeps the picture's, up to 512.
        channels: 1 for grey, 3 for RGB; None keeps grey pictures grey and makes all others RGB.
        intensity: the values that become 0 and 255: a fixed range, where values outside become the
            nearer end and NaN the lower one; or "per_image", the picture's own least and greatest
            value, of all its channels and where it can be seen (a constant picture becomes 0).
            Pictures of 8 bits are left alone.
        background: the grey, 0 to 255, that is seen through what is transparent.

    Returns:
        uint8, H x W x C.

    Raises:
        UserError: the picture is smaller than 5 x 5 pixels, or larger than 512 where ``size`` is
            None; it is of a mode that is not read; or, under "per_image", has values that are not
            finite, or a least or greatest one so far from all others that it seems to stand for "no
            data".
    """
    image = as_object(image)
    check_size(image.width, image.height, size)
    if is_deep(image):
        pixels = deep_pixels(image)
        image = Image.fromarray(_to_8_bits(pixels.values, pixels.visible, intensity))
        if pixels.alpha is not None:
            image.putalpha(Image.fromarray(pixels.alpha))
    else:
        image = upright(image)
    grey = image.mode in GREY_MODES
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 or (channels is None and grey) else "RGB")
    if size is not None:
        image = _resize_and_crop(image, size)
    return np.array(image).reshape(image.height, image.width, -1)


def fit_images(images: Images, size: int | None, channels: Literal[1, 3] | None) -> Images:
    """Apply :func:`fit_image` to arrays, N x H x W x C with any C; None keeps what the images have.

    Raises:
        UserError: the images are smaller than 5 x 5 pixels, or larger than 512 where ``size`` is
            None; or ``channels`` asks for a conversion other than between grey and RGB.
    """
    _, height, width, depth = images.shape
    check_size(width, height, size)
    if channels not in (None, depth) and depth not in (1, 3):
        raise UserError(
            f"data.channels = {channels} is impossible for images with {depth} channels, only grey "
            "and RGB are converted; allowed: null"
        )
    if (size is None or size == height == width) and channels in (None, depth):
        return images
    if depth not in (1, 3):
        return np.concatenate(
            [fit_images(images[..., [c]], size, None) for c in range(depth)], axis=-1
        )
    pictures = images[..., 0] if depth == 1 else images
    return np.stack([fit_image(Image.fromarray(picture), size, channels) for picture in pictures])


def check_layout(images: NDArray[np.generic], where: str) -> None:
    """Look at the sides of images N x H x W x C, which somebody may have laid out otherwise.

    Args:
        images: four-dimensional.
        where: what they are, for the error.

    Raises:
        UserError: they have more than 4 channels, or a side below 5 px.
    """
    _, height, width, channels = images.shape
    if channels <= MOST_CHANNELS and min(height, width) >= SMALLEST:
        return
    turned = (
        ", and this looks like N x C x H x W: turn it with images.transpose(0, 2, 3, 1)"
        if min(width, channels) >= SMALLEST and height < min(width, channels)
        else ""
    )
    raise UserError(
        f"{where} is {images.dtype} {images.shape}; allowed: N x H x W x C of 1 to {MOST_CHANNELS} "
        f"channels and at least {SMALLEST} x {SMALLEST} px{turned}"
    )


def check_size(width: int, height: int, size: int | None) -> None:
    """Raise UserError where images are too small, or too large to stay so under a
    ``data.image_size`` of None.
    """
    if min(width, height) < SMALLEST:
        raise UserError(
            f"images of {width} x {height} px are too small; allowed: {SMALLEST} x {SMALLEST} and "
            "more"
        )
    if size is None and max(width, height) > LARGEST:
        raise UserError(
            f"images of {width} x {height} px are too large to train on as they are, and "
            f"data.image_size is null; allowed: sides of up to {LARGEST} px, or data.image_size "
            f"from {SMALLEST} to {LARGEST}"
        )


def _to_8_bits(
    values: NDArray[np.generic], visible: NDArray[np.generic], intensity: Intensity
) -> Images:
    exact = values.astype(np.float64)
    if intensity == "per_image":
        least, greatest = _own_range(visible.astype(np.float64)) if visible.size else (0.0, 0.0)
    else:
        least, greatest = intensity
    # What cannot be seen may be anything.
    exact = np.clip(np.nan_to_num(exact, nan=least, posinf=greatest, neginf=least), least, greatest)
    exact -= least
    levels: Images = np.rint(exact * (255 / ((greatest - least) or 1.0))).astype(np.uint8)
    return levels


def _own_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """The least and the greatest value, where both can be measurements."""
    advice = (
        'set data.intensity to the range that counts, "[low, high]": what is outside becomes '
        "its nearer end"
    )
    if not np.isfinite(values).all():
        raise UserError(
            f"an image has pixel values that are not finite; {advice}, and NaN the low one"
        )
    least, greatest = float(values.min()), float(values.max())
    if least < greatest:
        second, last_but_one = (
            float(values[values > least].min()),
            float(values[values < greatest].max()),
        )
        for lone, gap, rest in (
            (least, second - least, greatest - second),
            (greatest, greatest - last_but_one, last_but_one - least),
        ):
            # A picture of two levels has no rest to be far from.
            if gap > FAR * rest > 0:
                raise UserError(
                    f'an image has the value {lone:g} far from all others, as if for "no data", '
                    "and would lose its "
                    f"contrast to it; {advice}"
                )
    return least, greatest


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    if short != size:
        resized = (size * image.width // short, size * image.height // short)
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))

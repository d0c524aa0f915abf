"""Where the images come from, and what they are made into."""

import json
from typing import Literal

from pydantic import field_validator

from srfed.config.settings import Section, setting

DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "npz", "folder", "sites"
]


class DataConfig(Section):
    dataset: DatasetName = setting(
        "digits",
        description="where a simulation's tasks, and the server's reference images, come from; "
        "`sites`: nobody but the deployed sites has images",
    )
    dir: str = setting(
        "",
        decides="nothing",
        description="root of the torchvision sets (or of cifar10_500.npz / cifar100_500.npz); the "
        ".npz file of `npz`; the folder of task folders of `folder`",
    )
    images_per_task: int | None = setting(
        None,
        ge=1,
        description="training images of each task, the first in file order; null takes all",
    )
    validation_images: int = setting(
        0,
        ge=0,
        description="how many of these are set aside to choose a round by, as their content says, "
        "and are not trained on: 0, or 2 and more",
    )
    image_size: int | None = setting(
        None,
        ge=5,
        le=512,
        description="resize the short side to this (antialiased) and crop the centre; null keeps "
        "the images' size, and tasks may differ in it",
    )
    channels: Literal[1, 3] | None = setting(
        None,
        description="convert images to grey (1) or RGB (3); null keeps what the data has, "
        "and tasks may differ in it",
    )
    intensity: Literal["per_image"] | tuple[float, float] = setting(
        "per_image",
        description="what becomes black and white in pictures of 16 bits, 32 bits or floats: "
        "per_image, each picture's own least and greatest value; or one range for all, [low, "
        "high], which keeps what a value means",
    )
    background: int = setting(
        0,
        ge=0,
        le=255,
        description="the grey behind what is transparent in a picture, 0 black to 255 white",
    )
    pages: Literal["first", "all"] = setting(
        "first",
        description="what is taken of a picture file with several pages (TIFF, APNG, animated "
        "WebP): the first, or all as images of their own",
    )
    test_fraction: float = setting(
        0.2,
        gt=0,
        lt=1,
        description="share held out as test images where there is no test split: of published sets "
        "the end, of `npz`, `folder` and sites those images whose content says so, about so many",
    )
    horizontal_flip: bool = setting(
        False, description="mirror half of the training images at random"
    )

    @field_validator("channels", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: object) -> object:
        if isinstance(value, bool):  # Python's True equals 1, so the Literal would take it
            raise ValueError(f"{json.dumps(value)} is not allowed; allowed: 1 | 3 | null")
        return value

    @field_validator("validation_images")
    @classmethod
    def _check_validation(cls, count: int) -> int:
        if count == 1:
            raise ValueError("1 is not allowed; allowed: 0, or 2 and more")
        return count

    @field_validator("intensity")
    @classmethod
    def _check_range(cls, value: str | tuple[float, float]) -> str | tuple[float, float]:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(
                f"{json.dumps(value)} is not allowed; allowed: [low, high] with low below high, "
                "per_image"
            )
        return value

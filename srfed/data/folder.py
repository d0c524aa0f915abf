"""Folders of image files: one sub-folder for each task, pictures of any size and mode inside.

What is taken of a folder, and what is passed over and why, is decided in :func:`list_images` and
nowhere else.
"""

import errno
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from srfed.config import DataConfig
from srfed.data.images import Images, fit_image
from srfed.data.mapped import ImageCollector
from srfed.data.pictures import damaged_metadata, deep_pixels, is_deep, opened, pages_of
from srfed.data.record import ImageRecord
from srfed.data.source import data_path, slugs, split, split_by_content
from srfed.errors import UserError
from srfed.units import escaped, printable

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")
"""Folders of these names, in any case of letters, say which side images are on."""
SYSTEM_NAMES = frozenset(
    {
        "@eadir",
        "__macosx",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    }
)
"""Folders that network storage and desktops leave behind: thumbnails, resource forks, what was
deleted.
"""
HIDDEN, SYSTEM, OTHER = "hidden", "left by a system", "no picture by its name"
BESIDE, SPECIAL = "beside the folders that are read", "no regular file"
LINK, DANGLING = "a link to a folder, not followed", "a link to nothing"
SHOWN = 3
"""Most files that a line names."""
Skipped = tuple[str, Path]
"""Why an entry of a folder was passed over, and which."""


class Page(NamedTuple):
    """A picture in a file, which may have more of them."""

    file: Path
    number: int
    """From 0."""

    def __str__(self) -> str:
        return f"{self.file}, page {self.number + 1}" if self.number else str(self.file)


@dataclass(frozen=True)
class Listing:
    """What is in a task's folder.

    Attributes:
        train: picture files in the order of their paths, none opened; all of them where ``test`` is
            None.
        test: those of the owner's own test folder.
        skipped: what was passed over, as (reason, path); a folder counts once.
        folders: the one that was read, or the owner's train and test.
        links: folders that were entered although they are links, as the owner named them: a task's,
            train, test.
    """

    train: list[Path]
    test: list[Path] | None
    skipped: list[Skipped]
    folders: list[Path]
    links: list[Path]

    @property
    def files(self) -> list[Path]:
        """Every picture."""
        return [*self.train, *(self.test or [])]


@dataclass
class FolderSource:
    """Task folders found under ``data.dir``; only the loaded task's files are opened."""

    config: DataConfig
    names: list[str]
    folders: list[tuple[Path, Path | None]]
    """Each task's folder, or its folder of training images and that of its test images."""
    skipped: list[Skipped]
    """What is beside the task folders."""

    def load(self, index: int, known: ImageRecord | None = None) -> tuple[Images, Images]:
        return load_listing(self.config, self.names[index], self.listings[index], known)

    @cached_property
    def listings(self) -> list[Listing]:
        """What is in each task's folder."""
        return [list_images(folder, test) for folder, test in self.folders]


def open_folder(config: DataConfig) -> FolderSource:
    """One task for each sub-folder, in the order of their names.

    Where ``data.dir`` holds exactly the folders ``train`` and ``test``, the task folders are inside
    these. A task's folder may instead have a ``train`` and a ``test`` of its own
    (:func:`list_images`).

    Raises:
        UserError: there are no task folders, ``train`` and ``test`` hold different ones, names
            collide, or it is not clear which folders are the split.
    """
    root = data_path(config, "a folder with one sub-folder for each task")
    skipped: list[Skipped] = []
    tasks = _task_folders(root, skipped)
    own = find_split(root)
    if own is None:
        return FolderSource(
            config, slugs(list(tasks)), [(folder, None) for folder in tasks.values()], skipped
        )
    train, test = (_task_folders(folder, skipped) for folder in own)
    unpaired = sorted(set(train) ^ set(test))
    if unpaired:
        raise UserError(f"data.dir: task {unpaired[0]} is not in both {own[0]} and {own[1]}")
    return FolderSource(
        config, slugs(list(train)), [(train[name], test[name]) for name in train], skipped
    )


def find_split(folder: Path) -> tuple[Path, Path] | None:
    """The owner's split: the sub-folders ``train`` and ``test``, in any case of letters; None where
    there is none.

    Raises:
        UserError: sub-folders have names of splits but are not exactly these two, so that nobody
            can tell what the owner meant. A lone ``train`` is a folder like others.
    """
    found = _sub_folders(folder, [])
    spoken = [name for name in found if name.casefold() in SPLIT_NAMES]
    if sorted(name.casefold() for name in found) == ["test", "train"]:
        train, test = sorted(found, key=str.casefold, reverse=True)
        return found[train], found[test]
    if not spoken or [name.casefold() for name in spoken] in (["train"], ["training"]):
        return None
    others = [name for name in found if name not in spoken]
    shown = ", ".join([*spoken, *others[:3], *(["..."] if len(others) > 3 else [])])
    raise UserError(
        f"data: {folder} holds {shown}, so it is not clear which images are held out; allowed: "
        f"exactly the folders train and test, or no folder called {', '.join(SPLIT_NAMES)}"
    )


def list_images(folder: Path, test: Path | None = None) -> Listing:
    """Look through a task's folder and the folders inside it, and open none of the files.

    Taken are regular files, and links to such, whose suffix is of a picture. Passed over are other
    files; whatever is hidden; folders that systems leave behind; links to folders, which may lead
    anywhere and in circles.

    Args:
        folder: the task's; or, with ``test``, its training images.
        test: its test images. Without it the folder's own ``train`` and ``test`` are the split,
            where it has them.

    Raises:
        UserError: a folder may not be read, or it is not clear which folders are the split.
    """
    links = [path for path in (folder, test) if path is not None and path.is_symlink()]
    skipped: list[Skipped] = []
    if test is None:
        own = find_split(folder)
        if own is not None:
            for path in _entries(folder):
                if path not in own:
                    skipped.append((_why_not(path) or BESIDE, path))
            links += [path for path in own if path.is_symlink()]
            folder, test = own
    folders = [folder] if test is None else [folder, test]
    files = [_walk(one, skipped) for one in folders]
    return Listing(files[0], None if test is None else files[1], skipped, folders, links)


def load_listing(
    config: DataConfig, name: str, listing: Listing, known: ImageRecord | None = None
) -> tuple[Images, Images]:
    """Decode a task's training and held-out test images, uint8 N x H x W x C.

    Without a split of the owner's, every picture is opened, as its content decides whether it is
    held out.

    Raises:
        UserError: there are no pictures, or too few; one cannot be read; they differ in size or
            channels after fitting.
    """
    for folder, files in zip(listing.folders, (listing.train, listing.test), strict=False):
        if not files:
            passed_over = (
                f"; skipped: {describe_skipped(listing.skipped)}" if listing.skipped else ""
            )
            raise UserError(f"data: {folder} holds no images{passed_over}")
    if listing.test is None:
        return split_by_content(
            config, name, read_pages(pages(listing.train, config), config), known
        )
    train, test = split(
        config, name, *(pages(files, config) for files in (listing.train, listing.test))
    )
    images = read_pages([*train, *test], config)
    return images[: len(train)], images[len(train) :]


def describe_listings(listings: Sequence[Listing], beside: Iterable[Skipped] = ()) -> list[str]:
    """What was taken and what was passed over, by kind with an example; at most two lines."""
    kinds = Counter(file.suffix.lower() for listing in listings for file in listing.files)
    taken = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    links = [link for listing in listings for link in listing.links]
    lines = [
        f"taken:      {sum(kinds.values())} pictures ({taken})"
        + (f"; through {len(links)} linked folder(s) (e.g. {links[0].name})" if links else "")
    ]
    skipped = [*beside, *(entry for listing in listings for entry in listing.skipped)]
    lines += [f"skipped:    {describe_skipped(skipped)}"] if skipped else []
    return [escaped(line) for line in lines]


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """How many entries were passed over, by reason with an example."""
    reasons: dict[str, list[Path]] = {}
    for reason, path in skipped:
        reasons.setdefault(reason, []).append(path)
    return ", ".join(
        f"{len(paths)} {reason} (e.g. {paths[0].name})" for reason, paths in reasons.items()
    )


def describe_pictures(files: Sequence[Path], config: DataConfig) -> list[str]:
    """What is in the files and is not plainly one picture of 8 bits: more pages, metadata that are
    damaged, which values the pictures of more than 8 bits have and what becomes of them; no line
    where there is nothing.

    Raises:
        UserError: a picture cannot be read.
    """
    deep = _Deep(config)
    paged: dict[Path, int] = {}
    damaged: dict[Path, str] = {}
    for file in files:
        if said := damaged_metadata(file):
            damaged[file] = said
        with opened(file) as image:
            if len(found := pages_of(image)) > 1:
                paged[file] = len(found)
            if is_deep(image):
                deep.add(image)
    lines = []
    if paged:
        what = (
            "the first of each is taken; data.pages=all takes every one"
            if config.pages == "first"
            else "every one is taken (data.pages)"
        )
        lines += [
            f"pages:      {len(paged)} of {len(files)} pictures have more than one page "
            f"({_named({file: f'{count} pages' for file, count in paged.items()})});",
            f"            {what}",
        ]
    if damaged:
        lines += [
            f"metadata:   {len(damaged)} of {len(files)} pictures have metadata that are not read; "
            "their pixels are",
            f"            ({_named(damaged)})",
        ]
    return [*lines, *deep.lines(len(files))]


def _named(found: dict[Path, str]) -> str:
    """Some files, each with what is said of it.

    >>> _named({Path("a/x.png"): "2 pages"})
    'x.png: 2 pages'
    """
    shown = [f"{printable(file.name)}: {said}" for file, said in list(found.items())[:SHOWN]]
    return ", ".join([*shown, *(["..."] if len(found) > SHOWN else [])])


class _Deep:
    """Which values the pictures of more than 8 bits have."""

    def __init__(self, config: DataConfig) -> None:
        self._intensity = config.intensity
        self._count, self._outside, self._values = 0, 0, 0
        self._least, self._greatest = np.inf, -np.inf

    def add(self, image: Image.Image) -> None:
        found = deep_pixels(image).visible.astype(np.float64)
        finite = found[np.isfinite(found)]
        self._count, self._values = self._count + 1, self._values + found.size
        self._least = min(self._least, finite.min(initial=np.inf))
        self._greatest = max(self._greatest, finite.max(initial=-np.inf))
        if self._intensity != "per_image":
            low, high = self._intensity
            self._outside += found.size - int(((found >= low) & (found <= high)).sum())

    def lines(self, files: int) -> list[str]:
        """In words; none where there are no such pictures."""
        if not self._count:
            return []
        what = (
            f"{self._count} of {files} pictures have more than 8 bits, values {self._least:g} to "
            f"{self._greatest:g}"
        )
        if self._intensity == "per_image":
            return [
                f"intensity:  {what}; each is stretched by its own",
                "            least and greatest value; where a value means something, set "
                "data.intensity to [low, high]",
            ]
        low, high = self._intensity
        return [
            f"intensity:  {what}; {low:g} becomes black,",
            f"            {high:g} white (data.intensity); "
            f"{self._outside / max(1, self._values):.2%} of the values are outside, or no numbers",
        ]


def pages(files: Sequence[Path], config: DataConfig) -> list[Page]:
    """The pictures in the files, as ``data.pages`` says: the first of each, or all.

    Raises:
        UserError: all are asked for, and a file cannot be read.
    """
    if config.pages == "first":
        return [Page(file, 0) for file in files]
    found = []
    for file in files:
        with opened(file) as image:
            found += [Page(file, number) for number in pages_of(image)]
    return found


def read_pages(wanted: Sequence[Page], config: DataConfig) -> Images:
    """Read pictures, in the given order, at least one, as ``image_size``, ``channels``,
    ``intensity`` and ``background`` say.

    Returns:
        uint8, N x H x W x C.

    Raises:
        UserError: one cannot be read, or they differ in size or channels after fitting.
    """
    collector = ImageCollector()
    for page in wanted:
        image = _read_page(page, config)
        first = collector.shape or image.shape
        if image.shape[:2] != first[:2]:
            raise UserError(
                f"images differ in size: {wanted[0]} is {first[1]} x {first[0]} px, "
                f"{page} is {image.shape[1]} x {image.shape[0]} px; set data.image_size"
            )
        if image.shape != first:
            raise UserError(
                f"grey and colour images are mixed: {wanted[0]} has {first[2]} channels, "
                f"{page} has {image.shape[2]}; set data.channels to 1 or 3"
            )
        collector.add(image[None])
    return collector.images()


def _read_page(page: Page, config: DataConfig) -> Images:
    with opened(page.file) as image:
        image.seek(page.number)
        return fit_image(
            image, config.image_size, config.channels, config.intensity, config.background
        )


def _walk(folder: Path, skipped: list[Skipped]) -> list[Path]:
    """The picture files of a folder and the folders inside it, in the order of their paths."""
    files: list[Path] = []
    inside = [folder]
    while inside:
        here = inside.pop()
        folders = []
        for path in _entries(here):
            reason = _why_not(path)
            if reason is not None:
                skipped.append((reason, path))
            elif path.is_dir():
                folders.append(path)
            else:
                files.append(path)
        sides = [path.name for path in folders if path.name.casefold() in SPLIT_NAMES]
        if len(sides) > 1:
            raise UserError(
                f"data: {here} holds the folders {' and '.join(sides)}, below the top of {folder}; "
                "allowed: a split at the top, or none"
            )
        inside += folders
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _why_not(path: Path) -> str | None:
    """Why an entry of a folder is passed over; None for a picture file, and for a folder to look
    into.
    """
    if path.name.startswith("."):
        return HIDDEN
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return DANGLING
    except OSError as error:
        if error.errno == errno.ELOOP:
            return DANGLING
        raise UserError(f"data: cannot read {path}: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        return (
            SYSTEM if path.name.casefold() in SYSTEM_NAMES else LINK if path.is_symlink() else None
        )
    if path.suffix.lower() not in SUFFIXES:
        return OTHER
    return None if stat.S_ISREG(mode) else SPECIAL


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"data: cannot list {folder}: {error.strerror or error}") from error


def _sub_folders(folder: Path, skipped: list[Skipped]) -> dict[str, Path]:
    """Folders that may mean something, by name; links to folders too, which an owner has named."""
    found = {}
    for path in _entries(folder):
        reason = _why_not(path)
        if reason == LINK or (reason is None and path.is_dir()):
            found[path.name] = path
        else:
            skipped.append((reason or BESIDE, path))
    return found


def _task_folders(folder: Path, skipped: list[Skipped]) -> dict[str, Path]:
    found = _sub_folders(folder, skipped)
    if not found:
        raise UserError(
            f"data.dir: {folder} has no task folders; put each task's images into a folder of its "
            "own"
        )
    return found

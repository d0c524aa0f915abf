"""Folders of image files: one sub-folder for each task, pictures of any size and mode inside.

What is taken of a folder, and what is passed over and why, is decided in :func:`list_images` and
nowhere else.
"""

import errno
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from srfed.config import DataConfig
from srfed.data.images import Images, fit_image, is_deep
from srfed.data.mapped import ImageCollector
from srfed.data.record import ImageRecord
from srfed.data.source import data_path, slugs, split, split_by_content
from srfed.errors import UserError

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
Skipped = tuple[str, Path]
"""Why an entry of a folder was passed over, and which."""


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
        return split_by_content(config, name, read_files(listing.train, config), known)
    train, test = split(config, name, listing.train, listing.test)
    images = read_files([*train, *test], config)
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
    return [*lines, *([f"skipped:    {describe_skipped(skipped)}"] if skipped else [])]


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """How many entries were passed over, by reason with an example."""
    reasons: dict[str, list[Path]] = {}
    for reason, path in skipped:
        reasons.setdefault(reason, []).append(path)
    return ", ".join(
        f"{len(paths)} {reason} (e.g. {paths[0].name})" for reason, paths in reasons.items()
    )


def describe_intensity(files: Sequence[Path], config: DataConfig) -> list[str]:
    """Which values the pictures of more than 8 bits have, and what becomes of them; no line where
    there are none.

    Raises:
        UserError: a picture cannot be read.
    """
    count, least, greatest, outside, values = 0, np.inf, -np.inf, 0, 0
    for file in files:
        with _opened(file) as image:
            if not is_deep(image):
                continue
            found = np.asarray(image, dtype=np.float64)
        finite = found[np.isfinite(found)]
        count, values = count + 1, values + found.size
        least, greatest = (
            min(least, finite.min(initial=np.inf)),
            max(greatest, finite.max(initial=-np.inf)),
        )
        if config.intensity != "per_image":
            outside += found.size - int(
                ((found >= config.intensity[0]) & (found <= config.intensity[1])).sum()
            )
    if not count:
        return []
    what = (
        f"{count} of {len(files)} pictures have more than 8 bits, values {least:g} to {greatest:g}"
    )
    if config.intensity == "per_image":
        return [
            f"intensity:  {what}; each is stretched by its own",
            "            least and greatest value; where a value means something, set "
            "data.intensity to [low, high]",
        ]
    low, high = config.intensity
    return [
        f"intensity:  {what}; {low:g} becomes black,",
        f"            {high:g} white (data.intensity); {outside / values:.2%} of the values are "
        "outside, or no numbers",
    ]


def read_files(files: Sequence[Path], config: DataConfig) -> Images:
    """Read image files, in the given order, at least one, as ``image_size``, ``channels`` and
    ``intensity`` say.

    Returns:
        uint8, N x H x W x C.

    Raises:
        UserError: one cannot be read, or they differ in size or channels after fitting.
    """
    first = _read_file(files[0], config)
    collector = ImageCollector()
    for position, file in enumerate(files):
        image = _read_file(file, config) if position else first
        if image.shape[:2] != first.shape[:2]:
            raise UserError(
                f"images differ in size: {files[0]} is {first.shape[1]} x {first.shape[0]} px, "
                f"{file} is {image.shape[1]} x {image.shape[0]} px; set data.image_size"
            )
        if image.shape != first.shape:
            raise UserError(
                f"grey and colour images are mixed: {files[0]} has {first.shape[2]} channels, "
                f"{file} has {image.shape[2]}; set data.channels to 1 or 3"
            )
        collector.add(image[None])
    return collector.images()


def _read_file(file: Path, config: DataConfig) -> Images:
    with _opened(file) as image:
        return fit_image(image, config.image_size, config.channels, config.intensity)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """A picture, and one line that names it for whatever goes wrong with it."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:
        # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and others for
        # damaged files.
        raise UserError(f"cannot read image {file}: {' '.join(str(error).split())}") from error


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

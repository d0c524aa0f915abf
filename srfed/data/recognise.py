"""What lies in a place that was named without saying what it is."""

from srfed.config import DatasetName
from srfed.data.folder import SUFFIXES
from srfed.errors import UserError
from srfed.paths import user_path

PUBLISHED: dict[DatasetName, tuple[str, ...]] = {
    "mnist": ("MNIST/raw",),
    "fashion_mnist": ("FashionMNIST/raw",),
    "cifar10": ("cifar-10-batches-py", "cifar10_500.npz"),
    "cifar100": ("cifar-100-python", "cifar100_500.npz"),
}
"""By what each published set is known; there may be several in one folder, so one of them has to be
named.
"""


def recognise(named: str) -> DatasetName:
    """The ``data.dataset`` that an owner's own images in ``data.dir`` are: ``npz`` or ``folder``.

    Raises:
        UserError: nothing is there, something else is, or published sets, one of which has to be
            named.
    """
    path = user_path(named)
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return "npz"
        raise UserError(
            f"data.dir = {named} is no data set; allowed: an .npz file, or a folder of task folders"
        )
    if not path.is_dir():
        raise UserError(
            f"data.dir = {named} does not exist; allowed: an .npz file, or a folder of task folders"
        )
    if published := published_in(named):
        raise UserError(
            f"data.dir = {named} holds {' and '.join(published)}; say which is meant, for example "
            f"--preset {published[0]} or --set data.dataset={published[0]}"
        )
    inside = list(path.iterdir())
    if not any(one.is_dir() for one in inside):
        files = sorted(one.name for one in inside if one.suffix.lower() == ".npz")
        if files:
            raise UserError(
                f"data.dir = {named} is a folder; name the file in it, such as {path / files[0]}"
            )
        if any(one.suffix.lower() in SUFFIXES for one in inside):
            raise UserError(
                f"data.dir = {named} holds pictures and no task folders; put each task's pictures "
                "into a folder of its own"
            )
    return "folder"


def published_in(named: str) -> list[DatasetName]:
    """The published sets that lie in a folder; none where it is no folder.

    Raises:
        UserError: an unknown ``~name``.
    """
    path = user_path(named)
    return [
        name for name, signs in PUBLISHED.items() if any((path / sign).exists() for sign in signs)
    ]

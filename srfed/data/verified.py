"""Published files, read once and compared with the checksum that torchvision knows for them."""

import hashlib
from pathlib import Path

from srfed.errors import UserError


def read_verified(path: Path, md5: str) -> bytes:
    """Return the content of a file, which is what was published and not merely what has its name.

    The bytes that were checked are the bytes that are returned: no second look at the disk comes
    between.

    Raises:
        UserError: the file cannot be read, or is truncated, corrupted or another one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.dir: cannot read {path}: {error.strerror or error}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(
            f"data.dir: {path} is truncated, corrupted or not the published file (md5 {found}, "
            f"expected {md5}); delete it and download it again"
        )
    return content


def how_to_get(name: str, root: Path) -> str:
    """The command with which torchvision downloads its data set ``name``."""
    program = f"from torchvision.datasets import {name}; {name}({str(root)!r}, download=True)"
    return f'get it with: python -c "{program}"'

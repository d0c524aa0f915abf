"""The standard FID network's weights file: found where the user says, or downloaded once and
verified.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.paths import user_path

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_CHUNK = 1 << 20
_TIMEOUT = 60.0


def read_inception_weights(named: str = "") -> tuple[bytes, str]:
    """Content and SHA-256 of the Inception weights file.

    Args:
        named: a file, read whatever its SHA-256 is. Empty takes the official file from the cache,
            $SRFED_CACHE or ~/.cache/srfed, where it is downloaded to on first use.

    Raises:
        UserError: the file cannot be read or downloaded, or what should be the official file is
            not.
    """
    if named:
        content = _read(user_path(named))
        return content, hashlib.sha256(content).hexdigest()
    path = cache_folder() / INCEPTION_URL.rpartition("/")[2]
    if not path.exists():
        write_bytes(path, _download(path))
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"{path} is not the official file: its SHA-256 is {digest}, not {INCEPTION_SHA256}; "
            "delete it, so that it is downloaded again"
        )
    return content, digest


def cache_folder() -> Path:
    """Where downloads are kept: $SRFED_CACHE, or ~/.cache/srfed."""
    return user_path(os.environ.get("SRFED_CACHE") or "~/.cache/srfed")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _download(target: Path) -> bytes:
    """The official file's content; nothing is kept unless its SHA-256 is right."""
    remedy = f"put the file at {target}, or name it in evaluation.inception_weights"
    content = bytearray()
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            # disable=None draws the bar on a terminal only.
            with tqdm(
                total=int(length) if length else None,
                desc="Inception weights",
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar:
                while chunk := response.read(_CHUNK):
                    content += chunk
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"cannot download {INCEPTION_URL} ({reason}); {remedy}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"the download of {INCEPTION_URL} has SHA-256 {digest}, not {INCEPTION_SHA256}, and "
            f"was not kept; {remedy}"
        )
    return bytes(content)

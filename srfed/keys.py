"""Public keys of SuperNodes, and the fingerprints by which people compare them. Needs neither
Flower nor PyTorch.
"""

import base64
import hashlib
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from srfed.errors import UserError


@lru_cache(maxsize=4096)
def key_fingerprint(public_key: bytes) -> str:
    """``SHA256:...`` of a public key in PEM or OpenSSH's format, as ``ssh-keygen -lf`` prints it.

    Bytes that are no such key have a fingerprint too: a grid that is no SuperLink may name its
    nodes as it likes.
    """
    content = public_key
    try:
        load = (
            serialization.load_pem_public_key
            if b"BEGIN" in public_key[:40]
            else serialization.load_ssh_public_key
        )
        ssh = load(public_key).public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        content = base64.b64decode(ssh.split()[1])
    except (ValueError, UnsupportedAlgorithm):
        pass
    return "SHA256:" + base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def read_key(path: Path) -> str:
    """The fingerprint of a public key's file; raises UserError where it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return fingerprint_of_line(content, str(path))


def fingerprint_of_line(content: bytes, where: str) -> str:
    """The fingerprint of a line of OpenSSH's format; raises UserError naming ``where`` for anything
    else.
    """
    try:
        serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"{where}: this is no public key; write the line of the site's site-<name>.pub"
        ) from error
    return key_fingerprint(content.strip())

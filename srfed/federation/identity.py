"""Who is behind a node: SuperNode keys, their fingerprints, and a run's roster file of them.

A SuperLink verifies with every request of a SuperNode that it holds the private key of its node, and tells a
ServerApp the public keys.
"""

import base64
import hashlib
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.proto.node_pb2 import NodeInfo

from srfed.config.yaml_rules import Loader
from srfed.errors import UserError
from srfed.files import read_json

ROSTER_FILE = "roster.json"
"""Where a run's folder keeps its roster."""
SELF_REGISTRATION_SECONDS = 2.0
"""A SuperNode without a key makes one, registers it itself and is connected in the same moment."""


@lru_cache(maxsize=4096)
def key_fingerprint(public_key: bytes) -> str:
    """``SHA256:...`` of a public key in PEM or OpenSSH's format, as ``ssh-keygen -lf`` prints it.

    Bytes that are no such key have a fingerprint too: a grid that is no SuperLink may name its nodes as it likes.
    """
    content = public_key
    try:
        load = serialization.load_pem_public_key if b"BEGIN" in public_key[:40] else serialization.load_ssh_public_key
        ssh = load(public_key).public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
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
    return _fingerprint_of_key(content, str(path))


def read_roster(path: Path) -> dict[str, str]:
    """A roster file: client id to public key, as a site's ``site-<name>.pub`` holds it; gives fingerprints.

    Raises:
        UserError: it cannot be read, is no such mapping, a key is none, or two clients have the same one.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is no roster; it must map client ids to public keys, one a line")
    keys = {str(client): _fingerprint_of_key(str(key).encode(), f"{path}: {client}") for client, key in content.items()}
    for client, key in keys.items():
        if list(keys.values()).count(key) > 1:
            raise UserError(f"{path}: {client} has the key of another client; each site has a key of its own")
    return keys


def kept_roster(run: Path) -> dict[str, str] | None:
    """The roster that a run's folder keeps, as fingerprints by client id; None where it was given none."""
    path = run / ROSTER_FILE
    if not path.exists():
        return None
    return {str(client): str(key) for client, key in dict(read_json(path, "keys")["keys"]).items()}


def registered_by_hand(node: NodeInfo) -> bool:
    """Whether a node's key was registered by somebody, so that it outlives the SuperNode's process.

    SuperNodes without keys register a new one in each process (Flower's simulation likewise): those say nothing of
    who it is. A SuperLink does not tell which is which, but for the name that ``srfed.deploy register`` gives, and
    the time between registration and connection.
    """
    if not node.public_key:
        return False
    if node.name or not node.registered_at or not node.last_activated_at:
        return True
    registered, connected = (datetime.fromisoformat(at) for at in (node.registered_at, node.last_activated_at))
    return abs((connected - registered).total_seconds()) > SELF_REGISTRATION_SECONDS


def _fingerprint_of_key(content: bytes, where: str) -> str:
    try:
        serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{where}: this is no public key; write the line of the site's site-<name>.pub") from error
    return key_fingerprint(content.strip())

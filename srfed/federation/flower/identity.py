"""Who is behind a node: SuperNode keys, their fingerprints, and a run's roster file of them.

A SuperLink verifies with every request of a SuperNode that it holds the private key of its node,
and tells a ServerApp the public keys.
"""

from datetime import datetime
from pathlib import Path

import yaml
from flwr.proto.node_pb2 import NodeInfo

from srfed.config.yaml import read_yaml_file
from srfed.errors import UserError
from srfed.files import read_json
from srfed.keys import fingerprint_of_line

ROSTER_FILE = "roster.json"
"""Where a run's folder keeps its roster."""
SELF_REGISTRATION_SECONDS = 2.0
"""A SuperNode without a key makes one, registers it itself and is connected in the same moment."""


def read_roster(path: Path) -> dict[str, str]:
    """A roster file: client id to public key, as a site's ``site-<name>.pub`` holds it; gives
    fingerprints.

    Raises:
        UserError: it cannot be read, is no such mapping, a key is none, or two clients have the
            same one.
    """
    try:
        content = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is no roster; it must map client ids to public keys, one a line")
    keys = {
        str(client): fingerprint_of_line(str(key).encode(), f"{path}: {client}")
        for client, key in content.items()
    }
    for client, key in keys.items():
        if list(keys.values()).count(key) > 1:
            raise UserError(
                f"{path}: {client} has the key of another client; each site has a key of its own"
            )
    return keys


def kept_roster(run: Path) -> dict[str, str] | None:
    """The roster that a run's folder keeps, as fingerprints by client id; None where it was given
    none.
    """
    path = run / ROSTER_FILE
    if not path.exists():
        return None
    return {str(client): str(key) for client, key in dict(read_json(path, "keys")["keys"]).items()}


def registered_by_hand(node: NodeInfo) -> bool:
    """Whether a node's key was registered by somebody, so that it outlives the SuperNode's process.

    SuperNodes without keys register a new one in each process (Flower's simulation likewise): those
    say nothing of who it is. A SuperLink does not tell which is which, but for the name that
    ``srfed.deploy register`` gives, and the time between registration and connection.
    """
    if not node.public_key:
        return False
    if node.name or not node.registered_at or not node.last_activated_at:
        return True
    registered, connected = (
        datetime.fromisoformat(at) for at in (node.registered_at, node.last_activated_at)
    )
    return abs((connected - registered).total_seconds()) > SELF_REGISTRATION_SECONDS

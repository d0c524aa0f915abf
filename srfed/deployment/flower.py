"""How Flower's programs are started, and how their processes are found again.

Nothing here imports Flower or PyTorch; only the processes do.
"""

import json
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import srfed
from srfed.errors import UserError
from srfed.federation.flower.shim import ALONE, CLIENT_APP, install

HOST = "127.0.0.1"
CONNECTION = "deployment"
"""Name of the connection to the SuperLink in Flower's configuration."""
FOLDER_VARIABLE = "SRFED_DEPLOYMENT"
"""Environment variable that marks every process of a deployment with its folder; descendants
inherit it.
"""
PART_VARIABLE = "SRFED_DEPLOYMENT_PART"
"""Environment variable that says whose process it is: "superlink", "site <client>" or "flwr"."""
POLL_VARIABLE = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
"""Environment variable of Flower's: seconds from one look for work to the next; 1 if it is not set,
here a tenth.
"""
SUPERNODE = "flower-supernode"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Without these every program of Flower's, each ClientApp anew for each message, posts to its
maker's host.
"""


def environment_for(home: Path, folder: Path, part: str) -> dict[str, str]:
    """The environment of a program of Flower's: it tells nobody anything, and finds its helpers and
    this srfed.

    Args:
        home: where it keeps what it unpacks.
        folder, part: how its processes are marked.

    Raises:
        UserError: a site's ``home`` cannot be written.
    """
    # Without what a simulation in this process may have set for its own apps.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SRFED_")
    }
    # Flower's helpers are started by name; without an activated environment they are not on the
    # path.
    programs = Path(sys.executable).parent
    environment |= {
        "PATH": f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home),
        **QUIET,
        POLL_VARIABLE: environment.get(POLL_VARIABLE, "0.1"),
        "PYTHONUNBUFFERED": "1",
        # Where there is a proxy, it cannot reach this machine's loopback.
        **dict.fromkeys(
            ("NO_PROXY", "no_proxy"),
            f"{environment.get('NO_PROXY', '')},{HOST},localhost".strip(","),
        ),
        FOLDER_VARIABLE: str(folder),
        PART_VARIABLE: part,
    }
    if part.startswith("site"):
        environment["PATH"] = f"{_programs(home)}{os.pathsep}{environment['PATH']}"
    package = Path(srfed.__file__).parent.parent
    if package != Path(sysconfig.get_path("purelib")):
        # Not installed, or not this copy: what the processes run is to be what runs here.
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(package), environment.get("PYTHONPATH", "")])
        )
    return environment


def _programs(home: Path) -> Path:
    """Where a SuperNode finds the program that looks at what the SuperLink hands out; it is not
    started without.
    """
    try:
        return install(home, sys.executable)
    except OSError as error:
        raise UserError(f"cannot write {home / 'bin'}: {error.strerror or error}") from error


def program(name: str) -> Path:
    """One of Flower's programs, beside the running Python; raises UserError where it is missing."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path} is missing; install Flower with: pip install 'flwr[simulation]'")
    return path


@dataclass(frozen=True)
class Alive:
    """A living process of a deployment: its part, and the program it runs."""

    pid: int
    part: str
    program: str


def marked(folder: Path) -> list[Alive]:
    """Processes that carry a folder's mark; without /proc none is found, and Flower's children end
    alone.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # A process that has ended but is not yet collected by its parent has an empty
            # environment.
            environment = dict(pair.partition("=")[::2] for pair in _words(entry / "environ"))
            if environment.get(FOLDER_VARIABLE) == str(folder):
                # Scripts run as "python /where/flower-superlink ...".
                words = (w for w in _words(entry / "cmdline")[1:] if not w.startswith("-"))
                name = next((Path(word).name for word in words), "")
                name = CLIENT_APP if name == ALONE else name
                found.append(Alive(int(entry.name), environment.get(PART_VARIABLE, ""), name))
        except (OSError, ValueError):
            continue  # it ended meanwhile, or is another user's
    return sorted(found, key=lambda process: process.pid)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def plain(line: str) -> str:
    """A line without its colours and frames."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │╭╮╰╯─\t\r")


def toml(values: Mapping[str, Any], table: str = "") -> bytes:
    """A flat TOML table; JSON's texts and truth values are TOML's too."""
    lines = [f"[{table}]"] if table else []
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return ("\n".join(lines) + "\n").encode()


def _words(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\0")

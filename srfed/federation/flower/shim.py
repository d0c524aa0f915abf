"""What a SuperNode starts as ``flwr-clientapp``: it hands the message to a process that has
imported everything already.

Flower starts a program for every message, which imports PyTorch for seconds before it looks at what
it is to do. The first one here starts :mod:`srfed.federation.flower.warm`, which imports the same
once and then forks for each message; where that cannot be, :mod:`srfed.federation.flower.program`
runs by itself. Flower's own never does, nor do its programs for other kinds of app, which would run
what an archive holds.

A copy of this file is the program, run without site-packages, so it imports the standard library
alone.
"""

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

SOCKET, LOCK = "clientapp.sock", "clientapp.lock"
SIZE = struct.Struct("!I")
"""Of the request that follows, bytes."""
WARM_SECONDS = 120.0
"""How long the imports may take."""
CLIENT_APP = "flwr-clientapp"
ALONE = "srfed.federation.flower.program"
"""What answers a message where nothing can be forked."""
OTHERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
"""What else a SuperNode starts where the SuperLink says that a run is of another kind."""
_REFUSING = """#!/bin/sh
echo "refused: $(basename "$0"), which the SuperLink's run asks for: this site runs a ClientApp" >&2
exit 1
"""


def install(home: Path, python: str) -> Path:
    """Write the programs.

    Args:
        home: a folder of the SuperNode's own.
        python: the interpreter, with everything installed.

    Returns:
        The folder to put first on the SuperNode's PATH.

    Raises:
        OSError: they cannot be written.
    """
    folder = home / "bin"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A first line is short; paths of interpreters may be long.
    first = f"#!/bin/sh\n'''exec' \"{python}\" -IS \"$0\" \"$@\"\n' '''\n"
    last = f"\nimport sys\n\nraise SystemExit(run({str(home)!r}, {python!r}, sys.argv[1:]))\n"
    text = first + Path(__file__).read_text(encoding="utf-8") + last
    for name, content in {CLIENT_APP: text, **dict.fromkeys(OTHERS, _REFUSING)}.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.chmod(0o700)
        temporary.replace(folder / name)
    return folder


def run(home: str, python: str, arguments: Sequence[str]) -> int:
    """Have a message answered, and wait for that; returns the exit code.

    Args:
        home, python: as of :func:`install`.
        arguments: of Flower's program.
    """
    try:
        connection = _connected(home, python, arguments)
    except OSError:
        os.execv(python, [python, "-m", ALONE, *arguments])
    with connection:
        words = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        request = json.dumps(words).encode()
        socket.send_fds(connection, [SIZE.pack(len(request))], [0, 1, 2])
        connection.sendall(request)

        def forward(number: int, _frame: FrameType | None) -> None:
            connection.sendall(bytes([number]))

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, forward)
        code = connection.recv(1)
    return code[0] if code else 1


def address(home_descriptor: int) -> str:
    """Of the socket in a folder that is open: a path of any length is too long for a socket's."""
    return f"/proc/self/fd/{home_descriptor}/{SOCKET}"


def _connected(home: str, python: str, arguments: Sequence[str]) -> socket.socket:
    """A connection to the process that has imported everything, which is started where there is
    none; raises OSError.
    """
    if not (hasattr(os, "pidfd_open") and os.path.exists("/proc/self/fd")):
        raise OSError("this system lacks what it needs")
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX)
    warm, deadline = None, time.monotonic() + WARM_SECONDS
    try:
        while True:
            try:
                connection.connect(address(folder))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                warm = warm or _started(home, python, arguments)
            if (warm and warm.poll() is not None) or time.monotonic() > deadline:
                raise OSError("it did not start")
            time.sleep(0.02)
    except OSError:
        connection.close()
        raise
    finally:
        os.close(folder)


def _started(home: str, python: str, arguments: Sequence[str]):  # type: ignore[no-untyped-def]
    """The process that imports everything; None where another one is starting it."""
    # Neither is needed for any message but the first.
    import fcntl
    import subprocess

    lock = os.open(os.path.join(home, LOCK), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        parent = arguments[arguments.index("--parent-pid") + 1]
        return subprocess.Popen(
            [python, "-m", "srfed.federation.flower.warm", home, parent, str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock],
        )
    except BlockingIOError:
        return None
    except ValueError as error:
        raise OSError("nobody says whose child it is") from error
    finally:
        os.close(lock)

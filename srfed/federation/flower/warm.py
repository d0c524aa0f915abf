"""A process that has imported what a ClientApp needs, and forks for each message:
``python -m srfed.federation.flower.warm HOME PID LOCK``.

What it forks is :mod:`srfed.federation.flower.program` in every respect but the imports; it ends
with the process PID, which is the SuperNode's. :mod:`srfed.federation.flower.shim` starts it, and
asks.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# What takes the time; neither uses a thread, which a fork would lose.
import torch  # noqa: F401

from srfed.federation.flower import program
from srfed.federation.flower.shim import SIZE, SOCKET, address

LOOK_SECONDS = 0.2
"""From one look at the SuperNode to the next."""


@dataclass(frozen=True)
class _Request:
    """What Flower's program was started with."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]


def main() -> None:
    """Listen until the SuperNode ends."""
    home, supernode, lock = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if (request := _listen(home, supernode, lock)) is None:
        return
    for number, descriptor in enumerate(request.streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.argv = ["flwr-clientapp", *request.arguments]
    code = 0
    try:
        program.main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    _end(code)


def _end(code: int) -> NoReturn:
    """End as an interpreter does, but for taking apart every module: all that is imported would be
    copied from the process that this one was forked from, which takes longer than a round.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _listen(home: Path, supernode: int, lock: int) -> _Request | None:
    """Take requests; returns one in the child that is to answer it, and None when the SuperNode has
    ended. ``lock`` is held by this process alone.
    """
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as listener:
        with suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=folder)
        # A collection would touch, and so copy, what all children share.
        gc.freeze()
        listener.bind(address(folder))
        listener.listen()
        while _lives(supernode):
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not select.select([listener], [], [], LOOK_SECONDS)[0]:
                continue
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    os.close(folder)
                    os.close(lock)
                    return _attend(connection)
    return None


def _attend(connection: socket.socket) -> _Request:
    """Fork the child that is to answer, in which this returns; the parent passes signals on to it,
    says how it ended, and ends.
    """
    size, streams, *_ = socket.recv_fds(connection, SIZE.size, 3)
    if len(size) < SIZE.size:
        os._exit(1)
    content = b""
    while len(content) < SIZE.unpack(size)[0]:
        if not (part := connection.recv(1 << 16)):
            os._exit(1)
        content += part
    child = os.fork()
    if child == 0:
        connection.close()
        return _Request(**json.loads(content), streams=streams)
    for descriptor in streams:
        os.close(descriptor)
    ended, heard = os.pidfd_open(child), [connection.fileno()]
    while ended not in (ready := select.select([ended, *heard], [], [])[0]):
        if ready and not (numbers := connection.recv(16)):
            # Who asked was killed, and so is the one that it is.
            os.kill(child, signal.SIGKILL)
            heard = []
        else:
            for number in numbers:
                os.kill(child, number)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with suppress(OSError):
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()

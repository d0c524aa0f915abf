"""Federations of Flower's own processes on this machine."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from srfed.data import Task
from srfed.deployment import certificates
from srfed.deployment.flower import HOST
from srfed.deployment.flower_run import FlowerRun
from support.tiny_run import TINY

SAMPLES = 30
TWO = {
    "federation.clients": 2,
    "federation.rounds": 2,
    "federation.keep_attempts": 9,
    "evaluation.samples": SAMPLES,
}
RUN_SECONDS = 480.0
"""How long a run of two rounds may take on a busy machine."""


def write_config(path: Path, overrides: Mapping[str, Any]) -> Path:
    """The tiny federation of two sites and two rounds, with some "section.key" set otherwise."""
    content: dict[str, Any] = {
        "name": "tiny",
        **{section: dict(keys) for section, keys in TINY.items()},
    }
    for name, value in {**TWO, **overrides}.items():
        section, key = name.split(".")
        content.setdefault(section, {})[key] = value
    path.write_text(yaml.safe_dump(content))
    return path


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def site_data(folder: Path, task: Task) -> Path:
    path = folder / f"{task.name}.npz"
    np.savez(path, train_images=task.train, test_images=task.test)
    return path


def assert_succeeded(run: FlowerRun) -> None:
    code = run.wait(RUN_SECONDS)
    output = "\n".join(run.lines()) if code is not None else "it still goes on"
    assert code is not None, output
    assert run.result()[0] == "finished:completed", output


WAIT_SECONDS = 150.0
"""How long until a process on a busy machine does what is expected of it."""


def wait_until(true: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@contextmanager
def answering(folder: Path, offset: timedelta = timedelta()) -> Iterator[str]:
    """A TLS server with a folder's certificate whose clock is wrong; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) + offset, usegmt=True)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "superlink.crt", folder / "superlink.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def at(moment: datetime) -> Iterator[None]:
    """Certificates are made as if it were another time."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return moment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "datetime", Clock)
        yield

"""A run's page while it goes on, served on this machine alone."""

import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from srfed.errors import UserError
from srfed.files import Stamp, stamp
from srfed.reporting.report import POLICY, RealImages, real_images, render_report
from srfed.storage.run_folder import RunFolder

HOST = "127.0.0.1"
"""Nobody on another machine can ask."""


class Watch:
    """A server of one page, which a browser asks for again every few seconds.

    Its address has a secret in it: whoever else has an account on this machine can reach the port,
    and may not see a run's folder, nor real images.

    Args:
        run: the run's folder.
        port: where to listen; 0 takes one that is free.
        every: seconds after which the page is asked for again.

    Raises:
        UserError: nobody can listen on this port.
    """

    def __init__(self, run: RunFolder, *, port: int, every: int) -> None:
        self._run, self._every = run, every
        self._real = RealImages({})
        self._made: tuple[object, bytes] | None = None
        self._lock = Lock()
        self._path = f"/{secrets.token_urlsafe(24)}/"
        try:
            self._server = ThreadingHTTPServer((HOST, port), self._handler())
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"--port {port} cannot be used: {why}; allowed: a free port up to 65535, or 0 for "
                "any"
            ) from error
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self._server.server_address[1]}{self._path}"

    def serve(self) -> None:
        """Answer until :meth:`close`, or until something is raised here."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """End :meth:`serve` in another thread, and let go of the port."""
        self._server.shutdown()
        self.let_go()

    def let_go(self) -> None:
        """Let go of the port, where nobody serves any more."""
        self._server.server_close()

    def _page(self) -> bytes:
        """The page, made again where the run has gone on; a run whose configuration was changed by
        going on with it is opened again.
        """
        with self._lock:
            state = [_stamp(self._run.path / name) for name in ("metrics.jsonl", "config.yaml")]
            state.append(_stamp(self._run.samples))
            if self._made is None or self._made[0] != state:
                self._run = RunFolder.open(self._run.path)
                if not self._real.images:
                    # A simulation that has only begun has no clients/ to be known by.
                    self._real = real_images(self._run)
                page = render_report(self._run, self._real, refresh=self._every)
                self._made = (state, page.encode())
            return self._made[1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        watch = self

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = "srfed", ""

            def do_GET(self) -> None:
                if not secrets.compare_digest(self.path.encode(), watch._path.encode()):
                    self.send_error(404)
                    return
                try:
                    self._answer("text/html", watch._page(), {"Content-Security-Policy": POLICY})
                except UserError as error:
                    # The next asking may find it mended.
                    self._answer("text/plain", str(error).encode(), {"Refresh": str(watch._every)})

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, kind: str, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(200)
                for name, value in {
                    "Content-Type": f"{kind}; charset=utf-8",
                    "Content-Length": str(len(content)),
                    "Cache-Control": "no-store",
                    "Referrer-Policy": "no-referrer",
                    "X-Content-Type-Options": "nosniff",
                    "X-Frame-Options": "DENY",
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        return Handler


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp(path)
    except UserError:
        return None

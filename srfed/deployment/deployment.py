"""A federation on one machine, all on loopback: SuperLink, SuperNodes, their keys, and their end.

Used by the rehearsal, by tests that kill some of them, and by long-running measurements. Nothing
here imports Flower or PyTorch; only the processes do.
"""

import random
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import srfed
from srfed.deployment.certificates import (
    CA_CERTIFICATE,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    check_validity,
    make_certificates,
    read_certificate,
    site_key,
)
from srfed.deployment.flower import (
    CONNECTION,
    HOST,
    SUPERNODE,
    Alive,
    environment_for,
    marked,
    program,
    send,
    toml,
)
from srfed.deployment.flower_run import FlowerRun
from srfed.deployment.process import POLL_SECONDS, READY_SECONDS, Process
from srfed.deployment.sites import NOTES, REGISTERED, note_site
from srfed.errors import UserError
from srfed.federation.flower.shim import CLIENT_APP
from srfed.federation.run_config import app_config_toml
from srfed.files import make_folder, write_bytes
from srfed.keys import read_key

Role = Literal["superlink", "supernode", "serverapp", "client"]
PORTS = range(15_000, 32_000)
"""Below the ports that systems give to outgoing connections, so that a free one is still free when
it is bound.
"""
GRACE_SECONDS = 5.0
"""How long a process may take to end by itself before it is killed."""
REJOIN_SECONDS = 180.0
"""How long a SuperNode may be refused because the SuperLink takes its predecessor, which was
killed, for alive.
"""
_PROGRAMS: Mapping[Role, str] = {
    "superlink": "flower-superlink",
    "supernode": SUPERNODE,
    "serverapp": "flwr-serverapp",
    "client": CLIENT_APP,
}


class Deployment:
    """One SuperLink and its sites, each process with its log in a file, all ended on leaving the
    context.

    The folder holds what the machines of a real deployment would: ``certificates/``, the
    SuperLink's ``superlink.db``, Flower's homes (``flower/``, ``sites/<client>/flower/``) and
    ``logs/``. A deployment in a folder that had one before goes on with its certificates, keys and
    database.

    Args:
        folder: where it all lies.
        tls: encrypt; without it a test can disturb what travels.
        authentication: let in only SuperNodes whose keys are registered; needs ``tls``.
        threads: OMP_NUM_THREADS of every process.

    Raises:
        ValueError: authentication without TLS, which Flower refuses.
        UserError: the folder cannot be written, or processes of an earlier deployment there still
            live.
    """

    def __init__(
        self, folder: Path, *, tls: bool = True, authentication: bool = True, threads: int = 1
    ) -> None:
        if authentication and not tls:
            raise ValueError("authentication needs tls")
        self.folder = folder.absolute()
        self.certificates = self.folder / "certificates"
        self.logs = self.folder / "logs"
        self._tls, self._authentication, self._threads = tls, authentication, threads
        self._superlink: Process | None = None
        self._sites: dict[str, _Site] = {}
        self._started: list[Process] = []
        if alive := self._alive():
            pids = " ".join(str(process.pid) for process in alive)
            raise UserError(
                f"processes of an earlier run in {self.folder} still live; end them with: kill "
                f"{pids}"
            )
        self._ports = _free_ports()
        self.superlink_port = next(self._ports)
        self._write_app()
        self._write_connection()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def superlink_address(self) -> str:
        """Where SuperNodes and ``flwr`` find the SuperLink."""
        return f"{HOST}:{self.superlink_port}"

    # --- SuperLink -------------------------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again on the same port and database; returns once it
        listens.

        Raises:
            UserError: it ends or does not listen in time; the text has its last words.
        """
        command = ["flower-superlink", "--host", HOST, "--port", str(self.superlink_port)]
        command += [
            "--database",
            str(self.folder / "superlink.db"),
            "--disable-runtime-dependency-installation",
        ]
        if self._tls:
            command += ["--ssl-certfile", str(self.certificates / SERVER_CERTIFICATE)]
            command += ["--ssl-keyfile", str(self.certificates / SERVER_KEY)]
            command += ["--ssl-ca-certfile", str(self.certificates / CA_CERTIFICATE)]
        else:
            command.append("--insecure")
        if self._authentication:
            command.append("--enable-supernode-auth")
        self._end(
            signal.SIGKILL, "superlink"
        )  # what is left of an earlier one, as a service manager would
        self._superlink = self._start(command, "superlink", self.folder / "flower", "superlink.log")
        self._superlink.wait_until(lambda: _listens(self.superlink_port))

    def stop_superlink(self) -> None:
        """End the SuperLink and its ServerApps as an administrator would (SIGTERM)."""
        self._end(signal.SIGTERM, "superlink")

    def kill_superlink(self) -> None:
        """End the SuperLink and its ServerApps at once (SIGKILL), as a power cut would."""
        self._end(signal.SIGKILL, "superlink")

    # --- Sites -----------------------------------------------------------------------------------

    def add_site(
        self,
        client: str,
        data: Path,
        state_dir: Path,
        *,
        key: Path | None = None,
        superlink_address: str | None = None,
        wait: bool = True,
    ) -> None:
        """Register a site's key with the running SuperLink, and start its SuperNode.

        Args:
            client: the client's id.
            data: its images, a folder or an .npz file.
            state_dir: where it keeps its state.
            key: its private key ``<name>.key``, with the public key ``<name>.pub`` beside it; by
                default a pair is made, once.
            superlink_address: where the SuperNode is to look for the SuperLink; by default where it
                is.
            wait: return only once it is connected.

        Raises:
            UserError: the SuperLink does not take the key, or as :meth:`start_site`.
        """
        if self._authentication:
            if key is None:
                key = self.certificates / site_key(client)
                if not key.exists():
                    make_certificates(self.certificates, [], [client])
            self._register(key.with_suffix(".pub"))
        self._sites[client] = _Site(
            data.absolute(),
            state_dir.absolute(),
            key,
            superlink_address or self.superlink_address,
            next(self._ports),
        )
        self.start_site(client, wait=wait)

    def start_site(self, client: str, *, wait: bool = True) -> None:
        """Start a site's SuperNode, or start it again with the same key, data, state and port.

        Raises:
            UserError: with ``wait``, as :meth:`wait_for_site`.
        """
        site = self._sites[client]
        home = self.folder / "sites" / client
        node_config = {
            "client-id": client,
            "data": str(site.data),
            "state-dir": str(site.state_dir),
        }
        write_bytes(home / "node-config.toml", toml(node_config))
        command = [SUPERNODE, "--superlink", site.superlink_address, "--host", HOST]
        command += ["--port", str(site.port), "--node-config", str(home / "node-config.toml")]
        command += (
            ["--root-certificates", str(self.certificates / CA_CERTIFICATE)]
            if self._tls
            else ["--insecure"]
        )
        if site.key is not None:
            command += ["--auth-supernode-private-key", str(site.key)]
        self._end(
            signal.SIGKILL, f"site {client}"
        )  # what is left of an earlier one, as a service manager would
        # Each site has a home of its own, as each machine has: two processes that unpack the app
        # there at once fail.
        site.process = self._start(command, f"site {client}", home / "flower", f"site-{client}.log")
        if wait:
            self.wait_for_site(client)

    def wait_for_site(self, client: str) -> None:
        """Wait until a site's SuperNode is connected.

        After a SuperNode was killed, the SuperLink refuses another with its key until the heartbeat
        is overdue, for about a minute; so a refused one is started again, as the service manager of
        a real site would.

        Raises:
            UserError: it ends or does not connect in time; the text has its last words.
        """
        deadline = time.monotonic() + REJOIN_SECONDS
        while True:
            process = self._sites[client].process
            assert process is not None
            try:
                process.wait_until(partial(_connected, process))
                return
            except UserError:
                if (
                    "Failed to activate SuperNode" not in process.output()
                    or time.monotonic() > deadline
                ):
                    raise
                self.start_site(client, wait=False)

    def stop_site(self, client: str) -> None:
        """End a site's SuperNode and its ClientApps as an administrator would (SIGTERM)."""
        self._end(signal.SIGTERM, f"site {client}")

    def kill_site(self, client: str) -> None:
        """End all processes of a site at once (SIGKILL), as a power cut would."""
        self._end(signal.SIGKILL, f"site {client}")

    # --- Runs ------------------------------------------------------------------------------------

    def run(
        self, run_dir: Path, config: Path | None = None, overrides: Sequence[str] = ()
    ) -> FlowerRun:
        """Submit a run; it begins in ``run_dir``, or goes on with what is there.

        Args:
            run_dir: the run's folder at the server.
            config: its YAML file; None takes what the run was begun with, or the defaults.
            overrides: "section.key=value" each.
        """
        values = {
            "run-dir": str(run_dir.absolute()),
            "config": "" if config is None else str(config.absolute()),
            "set": shlex.join(overrides),
        }
        # A file, because the option's own syntax knows no way to write quotation marks.
        file = self.folder / "flower" / "run-config.toml"
        write_bytes(file, toml(values))
        arguments = [str(self.folder / "app"), CONNECTION, "--stream", "--run-config", str(file)]
        process = self._start(
            ["flwr", "run", *arguments], "flwr", self.folder / "flower", "run.log"
        )
        return FlowerRun(process, self.flwr)

    def flwr(self, *arguments: str, timeout: float = READY_SECONDS) -> str:
        """The output of a command of ``flwr``; raises UserError with its last words where it fails
        or takes longer.
        """
        process = self._start(["flwr", *arguments], "flwr", self.folder / "flower", "flwr.log")
        if process.wait(timeout) != 0:
            raise process.failure("failed")
        return process.output()

    # --- Processes -------------------------------------------------------------------------------

    def pids(self, role: Role, client: str | None = None) -> list[int]:
        """The living processes of a role, oldest first.

        Args:
            role: "superlink", "supernode" (a site's own process), "serverapp" or "client" (what
                Flower starts for a run, and for a message to a site).
            client: only this site's.
        """
        parts = () if client is None else (f"site {client}",)
        return [
            process.pid for process in self._alive(*parts) if process.program == _PROGRAMS[role]
        ]

    def close(self) -> None:
        """End every process of this deployment, and only those; signals to this one wait until that
        is done.

        ServerApps first, so that none takes what follows for clients that fail; then the sites, so
        that each can still tell the SuperLink; then the SuperLink.
        """
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        )
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                send(number, self.pids("serverapp"))
                self._wait_while(lambda: self.pids("serverapp"))
            self._end(signal.SIGTERM, "flwr", *(f"site {client}" for client in self._sites))
            self._end(signal.SIGTERM, "superlink")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _start(self, command: Sequence[str], part: str, home: Path, log: str) -> Process:
        make_folder(home)
        make_folder(self.logs)
        environment = environment_for(home, self.folder, part) | {
            "OMP_NUM_THREADS": str(self._threads)
        }
        process = Process(
            [str(program(command[0])), *command[1:]], part, environment, self.logs / log
        )
        self._started.append(process)
        return process

    def _register(self, public_key: Path) -> None:
        site = public_key.stem.removeprefix("site-")
        try:
            said = self.flwr("supernode", "register", str(public_key), CONNECTION, "--name", site)
            if node := REGISTERED.search(said):
                note_site(self.certificates / NOTES, site, int(node[1]), read_key(public_key))
        except UserError as error:
            # The database of an earlier deployment in this folder knows the key already.
            if "already in use" not in str(error):
                raise

    def _alive(self, *parts: str) -> list[Alive]:
        """Living processes of some parts, or of all; children of children too, whoever their parent
        is by now.
        """
        return [process for process in marked(self.folder) if not parts or process.part in parts]

    def _end(self, number: signal.Signals, *parts: str) -> None:
        """End the processes of some parts: first those that were started here, then by force what
        is left.
        """
        ours = [process for process in self._started if process.part in parts]
        if number != signal.SIGKILL:
            for process in ours:
                process.send(number)
            # Their children are not waited for: those that hold something commit it whole or not at
            # all, and all would go on for a while asking the dead.
            self._wait_while(lambda: any(process.lives for process in ours))
        while alive := self._alive(*parts):
            send(signal.SIGKILL, [process.pid for process in alive])
            time.sleep(POLL_SECONDS)
        for process in ours:
            process.send(
                signal.SIGKILL
            )  # finds them all ended, except where there is no /proc to look into
            process.wait()
        self._started = [process for process in self._started if process not in ours]

    def _wait_while(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while condition() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _write_app(self) -> None:
        """The Flower app to submit. It holds no code: each party has srfed installed."""
        app = {
            "project": {
                "name": "srfed",
                "version": srfed.__version__,
                "description": "Federated SR-DDPM",
                "license": "Apache-2.0",
            },
            "tool.flwr.app": {"publisher": "srfed"},
            "tool.flwr.app.components": {
                "serverapp": "srfed.federation.flower.server_app:app",
                "clientapp": "srfed.federation.flower.client_app:app",
            },
        }
        tables = [*(toml(t, name) for name, t in app.items()), app_config_toml().encode()]
        write_bytes(self.folder / "app" / "pyproject.toml", b"\n".join(tables))

    def _write_connection(self) -> None:
        if self._tls and not (self.certificates / CA_CERTIFICATE).exists():
            make_certificates(self.certificates, [HOST])
        for name in (CA_CERTIFICATE, SERVER_CERTIFICATE) if self._tls else ():
            check_validity(
                read_certificate(self.certificates / name), str(self.certificates / name)
            )
        security = (
            {"root-certificates": str(self.certificates / CA_CERTIFICATE)}
            if self._tls
            else {"insecure": True}
        )
        connection = {"address": self.superlink_address, **security}
        content = toml({"default": CONNECTION}, "superlink") + toml(
            connection, f"superlink.{CONNECTION}"
        )
        write_bytes(self.folder / "flower" / "config.toml", content)


@dataclass
class _Site:
    data: Path
    state_dir: Path
    key: Path | None
    superlink_address: str
    port: int
    process: Process | None = None


def _connected(supernode: Process) -> bool:
    return "SuperNode ID:" in supernode.output()


def _free_ports() -> Iterator[int]:
    """Ports of the loopback that nobody listens on, each once."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            # As servers do: a connection that was closed a moment ago does not occupy its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        yield port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0

"""What a site runs: its SuperNode, kept alive, watched, quiet towards strangers, and explained.

Flower's SuperNode gives up where it is refused, and waits for ever for a ClientApp that was ended
(docs/upstream.md); so this process stays beside it, reads what it says, and starts it again.
"""

import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from srfed.deployment.certificates import (
    certificate_fingerprint,
    check_site_name,
    check_validity,
    read_certificate,
)
from srfed.deployment.connection import check_superlink
from srfed.deployment.flower import (
    HOST,
    SUPERNODE,
    environment_for,
    marked,
    plain,
    program,
    send,
    toml,
)
from srfed.errors import UserError
from srfed.federation.agreement import AGREEMENT_FILE, COMMAND, Agreement
from srfed.federation.flower.shim import CLIENT_APP
from srfed.federation.mods import changed_mod
from srfed.files import append_text, exists, held, write_bytes
from srfed.units import printable

PORT = 9094
"""Where the SuperNode's ClientApps find it, on this machine's loopback alone."""
RETRY_SECONDS = 10.0
"""Before a SuperNode that has ended is started again."""
LOST_SECONDS = 90.0
"""How long a message may be without the ClientApp that answers it: Flower itself gives one up after
a minute.
"""
STOPPED_SECONDS = 5.0
"""The same once the ClientApp has said that it was stopped, in which case Flower waits for ever."""
GRACE_SECONDS = 10.0
"""How long the SuperNode may take to end, with the message that its end is for."""
LONGEST_LINE = 2000
"""Letters of a line that are kept."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_USUAL = re.compile(r"(INFO|DEBUG)\b|\s*$")
_TURN_SECONDS = 1.0


@dataclass(frozen=True)
class SiteSettings:
    """What a site's owner says, once and for ever.

    Attributes:
        superlink: where the SuperLink is, "host:port".
        root_certificates: the certificate of the authority that signs the SuperLink's.
        key: the site's private key.
        client: the site's id.
        data: its images, a folder or an .npz file.
        state_dir: where it keeps its state.
        port: of this machine's loopback, for the SuperNode and its ClientApps.
    """

    superlink: str
    root_certificates: Path
    key: Path
    client: str
    data: Path
    state_dir: Path
    port: int = PORT

    @property
    def folder(self) -> Path:
        """Everything that this site keeps."""
        return self.state_dir / self.client

    @property
    def log(self) -> Path:
        """Where all that Flower says goes."""
        return self.folder / "supernode.log"


def check_before_start(state_dir: Path, client_id: str, certificate: Path) -> None:
    """What must hold before a site's SuperNode starts, each time that it starts.

    Args:
        state_dir: where the site keeps its state.
        client_id: the site's id.
        certificate: the certificate of the authority that vouches for the coordinator.

    Raises:
        UserError: it does not; the text says what to do.
    """
    check_validity(read_certificate(certificate), str(certificate))
    file = state_dir / client_id / AGREEMENT_FILE
    if not exists(file):
        raise UserError(
            f"{file} is missing: a site without an agreement answers nothing; agree with: {COMMAND}"
        )
    agreement = Agreement.load(file.parent)
    if said := changed_mod(agreement.mods):
        raise UserError(f"{said}; if it is meant, agree again with: {COMMAND}")
    agreed, found = agreement.coordinator, certificate_fingerprint(certificate)
    if agreed not in (None, found):
        raise UserError(
            f"{certificate} is not the certificate of the coordinator that was agreed to (its "
            f"SHA-256 is {found}, agreed was {agreed}); ask who runs the SuperLink, and if it is "
            f"meant, agree again with: {COMMAND}"
        )


def run_site(site: SiteSettings) -> None:
    """Take part until SIGINT, SIGTERM or SIGHUP comes.

    Whatever is written has mode 0600, in folders of mode 0700. What the SuperNode says goes to
    ``supernode.log`` in the site's folder, and, but for its routine, to standard output.

    Raises:
        UserError: a setting is impossible, another process is this site, the SuperLink's
            certificate or the clock is wrong; nothing is left running.
    """
    os.umask(0o077)
    _check(site)
    with held(site.folder / "site.lock", wait=False), _until_a_signal() as stop:
        _end_all(site)  # what is left of a predecessor that was killed
        told = ""
        while not stop:
            check_before_start(site.state_dir, site.client, site.root_certificates)
            if unreachable := check_superlink(site.superlink, site.root_certificates):
                _say(
                    f"waiting for the SuperLink at {site.superlink}, which cannot be reached yet: "
                    f"{unreachable}"
                )
            if _taken(site.port):
                raise UserError(
                    f"port {site.port} of {HOST} is in use by another process; name another with "
                    "--port"
                )
            ending = _Ending()
            try:
                ending = _run_supernode(site, stop)
            finally:
                _end_all(site)
            told = "" if ending.connected else told
            if not stop and ending.reason != told:
                told = ending.reason
                _say(told)
            _wait(0 if ending.deaf else RETRY_SECONDS, stop)
        _say("stopped")


@dataclass
class _Ending:
    """Why a SuperNode has ended, in words, and how far it had come."""

    reason: str = ""
    connected: bool = False
    deaf: bool = False


@dataclass
class _Listener:
    """What a SuperNode is about, as its output tells it.

    Attributes:
        busy: when the message that it is at work on had come, or its ClientApp was last seen; None
            between messages.
        stopped: whether a ClientApp has said that it was stopped.
        last: its last errors, or its last words.
    """

    busy: float | None = None
    stopped: bool = False
    connected: bool = False
    last: list[str] = field(default_factory=list)

    def hear(self, line: str, now: float) -> None:
        """Take note of a line."""
        if "Received successfully" in line:
            self.busy, self.stopped = now, False
        elif "Sending: " in line or "Failed to receive" in line or "Ignoring" in line:
            self.busy = None
        elif "Task stopped." in line:
            self.stopped = True
        if line:
            self.last = [*self.last[-11:], line]

    def is_deaf(self, now: float, works: bool) -> bool:
        """Whether it waits for an answer that nobody is making any more."""
        if self.busy is None:
            return False
        if works:
            self.busy = now
        return now - self.busy > (STOPPED_SECONDS if self.stopped else LOST_SECONDS)


def _run_supernode(site: SiteSettings, stop: list[int]) -> _Ending:
    """One SuperNode from its start to its end."""
    node_config = site.folder / "node-config.toml"
    values = {"client-id": site.client, "data": str(site.data), "state-dir": str(site.state_dir)}
    write_bytes(node_config, toml(values))
    command = [str(program(SUPERNODE)), "--superlink", site.superlink]
    command += [
        "--root-certificates",
        str(site.root_certificates),
        "--auth-supernode-private-key",
        str(site.key),
    ]
    command += ["--host", HOST, "--port", str(site.port), "--node-config", str(node_config)]
    environment = environment_for(site.folder / "flower", site.folder, "site")
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as supernode:
        try:
            return _follow(site, supernode, stop)
        finally:
            supernode.terminate()
            with suppress(subprocess.TimeoutExpired):
                supernode.wait(GRACE_SECONDS)
            supernode.kill()


def _follow(site: SiteSettings, supernode: "subprocess.Popen[bytes]", stop: list[int]) -> _Ending:
    assert supernode.stdout is not None
    heard, rest = _Listener(), b""
    output = supernode.stdout.fileno()
    watches = Path("/proc/self/environ").exists()
    while not stop:
        # Asked before reading, so that the last words are not missed.
        lives = supernode.poll() is None
        arrived = b""
        if select.select([output], [], [], _TURN_SECONDS if lives else 0)[0]:
            arrived = os.read(output, 1 << 16)
        *lines, rest = (rest + arrived).split(b"\n")
        for line in lines:
            _hear(site, heard, line.decode(errors="replace"))
        if not lives and not arrived:
            return _Ending(_reason(site, supernode.returncode, heard), heard.connected)
        if watches and heard.is_deaf(time.monotonic(), _works(site)):
            return _Ending(
                "the ClientApp was ended before it answered, for which the SuperNode waits for "
                "ever; starting it again",
                heard.connected,
                deaf=True,
            )
    return _Ending(connected=heard.connected)


def _hear(site: SiteSettings, heard: _Listener, line: str) -> None:
    clean = printable(plain(line), LONGEST_LINE).rstrip()
    heard.hear(clean, time.monotonic())
    kept = _keep(site.log, clean)
    if not kept or not _USUAL.match(clean):
        _print(clean)
    if found := re.search(r"SuperNode ID: (\d+)", clean):
        heard.connected = True
        _say(f"connected to the SuperLink at {site.superlink}, as node {found[1]}")


def _reason(site: SiteSettings, code: int, heard: _Listener) -> str:
    """Why a SuperNode has ended, from what it said."""
    said = " ".join(heard.last)
    again = f"trying again every {RETRY_SECONDS:g} s"
    if "Failed to activate SuperNode" in said:
        public = site.key.with_suffix(".pub").name
        return (
            f"the SuperLink does not let this site's key in: either {public} is not registered "
            f"there (flwr supernode register {public}), or the SuperLink takes another SuperNode "
            f"with this key for alive, as it does for a minute after one was killed; {again}"
        )
    if "401 Unauthorized" in said:
        return (
            f"the SuperLink refuses this site's signature, though the clocks agree: is {site.key} "
            f"its key? {again}"
        )
    if heard.connected and code == 0:
        return f"the SuperNode ended by itself; {again}"
    errors = (
        [line for line in heard.last if "ERROR" in line or "Error" in line]
        or heard.last
        or ["no output"]
    )
    return f"the SuperNode ended with code {code}: {errors[-1]} (all of it: {site.log}); {again}"


def _works(site: SiteSettings) -> bool:
    return any(process.program == CLIENT_APP for process in marked(site.folder))


def _end_all(site: SiteSettings) -> None:
    """End what the SuperNode has left: what a ClientApp holds it commits whole or not at all."""
    while alive := marked(site.folder):
        send(signal.SIGKILL, [process.pid for process in alive])
        time.sleep(0.05)


def _check(site: SiteSettings) -> None:
    """Raise UserError where a setting is impossible."""
    check_site_name(site.client, "--client-id")
    host, _, port = site.superlink.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--superlink {site.superlink} is impossible; allowed: HOST:PORT")
    if not 0 < site.port < 65536:
        raise UserError(f"--port {site.port} is impossible; allowed: 1 to 65535")
    if not site.data.exists():
        raise UserError(f"--data {site.data} does not exist")
    try:
        site.key.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read --key {site.key}: {error.strerror or error}; its owner must run this"
        ) from error


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _keep(log: Path, line: str) -> bool:
    """Append a line to the log; whether that worked."""
    try:
        append_text(log, f"{line}\n")
    except UserError:
        return False
    return True


def _say(text: str) -> None:
    _print(f"site: {text}")


def _print(line: str) -> None:
    # Whoever reads may be gone; the site stays.
    with suppress(OSError):
        print(line, flush=True)


def _wait(seconds: float, stop: list[int]) -> None:
    deadline = time.monotonic() + seconds
    while not stop and time.monotonic() < deadline:
        time.sleep(0.1)


@contextmanager
def _until_a_signal() -> Iterator[list[int]]:
    """A list that gets each signal that asks to end."""
    stop: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Real Flower processes: what travels between a site and the SuperLink, byte for byte, and who is
let in.
"""

import gzip
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

import srfed
from srfed.config import ResourcesConfig, load_config
from srfed.data import Task, load_tasks, to_model_range
from srfed.deployment.agree import agree_as_rehearsed
from srfed.deployment.certificates import make_certificates, site_key, site_public_key
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import CONNECTION, HOST
from srfed.deployment.sites import NOTES, sites_in_words
from srfed.evaluation.generation import generate
from srfed.federation.messages import DESCRIBE, EVALUATE, TRAIN
from srfed.keys import read_key
from srfed.runs.run import TrainedSite
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.manifest import read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.deployed import SAMPLES, TWO, assert_succeeded, free_ports, site_data, write_config
from support.tiny_run import begin, run_in_process, server_bits, tiny_config

pytestmark = pytest.mark.slow

SITES = ["digit-0", "digit-1"]
LOG_SECONDS = 120.0
"""How long until a process says what is expected of it."""


# --- Recording what travels ----------------------------------------------------------------------


class Proxy:
    """A TCP proxy on the loopback that keeps every byte of both directions, by connection."""

    def __init__(self, target: int) -> None:
        self.connections: list[tuple[bytearray, bytearray]] = []
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    @property
    def address(self) -> str:
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((HOST, self._target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                up, down = bytearray(), bytearray()
                self.connections.append((up, down))
                for source, sink, kept in ((near, far, up), (far, near, down)):
                    threading.Thread(
                        target=self._pass_on, args=(source, sink, kept), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Spoken:
    """One HTTP request or response: its first line, its header fields, and its body without chunk
    framing.
    """

    first: str
    fields: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.first.split()[1]


def read_http(stream: bytes) -> list[Spoken]:
    """The whole messages of one direction of an HTTP/1.1 connection; one that was cut short is left
    out.

    Raises:
        ValueError: it is not HTTP/1.1.
    """
    spoken = []
    at = 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        first, *lines = stream[at:end].decode("latin-1").split("\r\n")
        if "HTTP/1.1" not in first:
            raise ValueError(f"not HTTP/1.1: {first!r:.100}")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        at = end + 4
        if "chunked" in fields.get("transfer-encoding", ""):
            body, at = read_chunks(stream, at)
        else:
            length = int(fields.get("content-length", 0))
            body, at = stream[at : at + length], at + length
        if at > len(stream):
            break
        spoken.append(Spoken(first, fields, body))
    return spoken


def read_chunks(stream: bytes, at: int) -> tuple[bytes, int]:
    """A chunked body, and where it ends; beyond the stream where it was cut short."""
    parts = []
    while (end := stream.find(b"\r\n", at)) >= 0:
        size = int(stream[at:end].split(b";")[0], 16)
        parts.append(stream[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
        if size == 0:
            return b"".join(parts), at
    return b"", len(stream) + 1


def unpacked(data: bytes) -> Iterator[bytes]:
    """What any zlib stream, gzip file or member of a zip archive (as of .npz) anywhere in the data
    holds.
    """
    starts = [(b"\x78" + level, zlib.MAX_WBITS) for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")]
    starts += [(b"\x1f\x8b\x08", 16 + zlib.MAX_WBITS), (b"PK\x03\x04", -zlib.MAX_WBITS)]
    for start, bits in starts:
        at = data.find(start)
        while at >= 0:
            begins = at
            if bits < 0:
                begins += 30 + sum(
                    int.from_bytes(data[at + k : at + k + 2], "little") for k in (26, 28)
                )
            with suppress(zlib.error):
                content = zlib.decompressobj(bits).decompress(data[begins:])
                if len(content) > 16:
                    yield content
            at = data.find(start, at + 1)


@dataclass
class Traffic:
    """What all sites and the SuperLink said to each other."""

    raw: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    exchanges: list[tuple[Spoken, Spoken]] = field(default_factory=list)
    haystack: bytes = b""

    @classmethod
    def of(cls, proxies: Sequence[Proxy]) -> Self:
        traffic = cls()
        hay: list[bytes] = []
        for up, down in (connection for proxy in proxies for connection in proxy.connections):
            traffic.raw["up"] += len(up)
            traffic.raw["down"] += len(down)
            requests, responses = read_http(bytes(up)), read_http(bytes(down))
            assert 0 <= len(requests) - len(responses) <= 1
            traffic.exchanges += zip(requests, responses, strict=False)
            hay += [bytes(up), bytes(down), *(spoken.body for spoken in (*requests, *responses))]
        traffic.haystack = searchable(hay)
        return traffic

    def bodies(self, direction: str) -> list[bytes]:
        """The bodies that carry the objects of messages."""
        if direction == "up":
            return [
                request.body
                for request, _ in self.exchanges
                if request.path == "/v1/fleet/push-object"
            ]
        return [
            response.body
            for request, response in self.exchanges
            if request.path == "/v1/fleet/pull-object"
        ]

    def messages(self, direction: str) -> list[Message]:
        """The messages, put together from their objects by Flower itself."""
        objects = {
            get_object_id(content): content
            for kind in ("up", "down")
            for content in self._objects(kind)
        }
        # An object that the SuperLink still has from another message is not sent to it again.
        heads = {
            get_object_id(content)
            for content in self._objects(direction)
            if content.startswith(b"Message ")
        }
        return [
            inflate_object_from_contents(head, objects, keep_object_contents=True)
            for head in sorted(heads)
        ]

    def _objects(self, direction: str) -> list[bytes]:
        if direction == "up":
            return [PushObjectRequest.FromString(body).object_content for body in self.bodies("up")]
        return [PullObjectResponse.FromString(body).object_content for body in self.bodies("down")]


def searchable(hay: Sequence[bytes]) -> bytes:
    """Everything one after the other, and what is packed in it."""
    return b"".join([*hay, *(content for data in hay for content in unpacked(data))])


# --- What is searched for ------------------------------------------------------------------------


def needle(values: torch.Tensor) -> bytes | None:
    """A piece of a tensor that cannot be there by chance: 64 bytes that vary, or all of a shorter
    one; or None.
    """
    flat = values.detach().contiguous().numpy().ravel()
    step = max(1, 64 // flat.itemsize)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        if piece.nbytes > 16 and len(np.unique(piece)) > 3:
            return piece.tobytes()
    return None


def private_needles(state: Path, lineage: str) -> Iterator[tuple[str, bytes]]:
    """θ_i, its average and its moments, of every attempt of every site."""
    for attempt in sorted(state.glob(f"*/lineages/{lineage}/round-*")):
        checkpoint = read_checkpoint(attempt)
        for group in ("exclusive", "exclusive_average", "exclusive_moments"):
            for name, tensor in checkpoint.group(group).items():
                if (found := needle(tensor)) is not None:
                    yield f"{attempt} {group} {name}", found


def generated_images(state: Path, client: str) -> list[bytes]:
    """The images that a site has generated in the last evaluation, made once more."""
    site = TrainedSite(state / client, ResourcesConfig(backend="inline", device="cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the site did
    try:
        images = generate(
            site.denoiser(site.tasks[0]),
            site.objective.process,
            site.config.sampling,
            count=SAMPLES // len(SITES),
            shape=site.shapes[0],
            seed=site.config.seed,
            task=client,
        ).images
    finally:
        torch.set_num_threads(threads)
    return [image.tobytes() for image in images]


def test_the_search_finds_what_is_packed_or_split() -> None:
    secret = np.random.default_rng(0).normal(size=100).astype(np.float32)
    wanted, other = secret.tobytes(), b"other" * 50
    buffer = io.BytesIO()
    np.savez_compressed(buffer, theta=secret)
    for packed in (
        wanted,
        zlib.compress(wanted),
        zlib.compress(wanted, 1),
        gzip.compress(wanted),
        buffer.getvalue(),
    ):
        assert wanted in searchable([other + packed + other])
    assert wanted not in searchable([other, zlib.compress(other)])

    # Split by chunk framing, after another message, before one that is cut short.
    parts = [wanted[:7], wanted[7:300], wanted[300:]]
    framed = b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    stream = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    stream += b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed
    stream += b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"
    assert wanted not in stream
    assert [spoken.body for spoken in read_http(stream)] == [b"abc", wanted]


# --- The wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["samples", "statistics"])
def test_nothing_private_crosses_the_wire_and_the_log_tells_how_much_does(
    mode: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "tiny.yaml", {"evaluation.mode": mode})
    state = tmp_path / "state"
    tasks = load_tasks(tiny_config().data, len(SITES))
    assert [task.name for task in tasks] == SITES
    with ExitStack() as stack:
        deployment = stack.enter_context(
            Deployment(tmp_path / "d", tls=False, authentication=False)
        )
        deployment.start_superlink()
        proxies = [stack.enter_context(Proxy(deployment.superlink_port)) for _ in SITES]
        for task, proxy in zip(tasks, proxies, strict=True):
            data = site_data(tmp_path, task)
            agree_as_rehearsed(load_config(config), data, state, task.name)
            deployment.add_site(task.name, data, state, superlink_address=proxy.address, wait=False)
        for client in SITES:
            deployment.wait_for_site(client)
        assert_succeeded(deployment.run(tmp_path / "run", config))
    run = RunFolder.open(tmp_path / "run")
    traffic = Traffic.of(proxies)
    haystack = traffic.haystack

    # The search finds what does travel ...
    assert not any(
        "content-encoding" in spoken.fields for pair in traffic.exchanges for spoken in pair
    )
    shared = read_checkpoint(run.server / "round-00001").group("shared").values()
    needles = [found for found in map(needle, shared) if found is not None]
    assert len(needles) > 20
    assert all(found in haystack for found in needles)
    # ... and nothing of what must not, though it would.
    private = dict(private_needles(state, run.lineage))
    assert len({what.split()[0] for what in private}) == 4, "two sites, two rounds"
    assert len(private) > 4 * 3 * 4
    assert [what for what, found in private.items() if found in haystack] == []
    assert [task.name for task in tasks for found in image_needles(task) if found in haystack] == []
    for control in (next(iter(private.values())), next(image_needles(tasks[0]))):
        for packed in (control, zlib.compress(control)):
            assert control in searchable([haystack, packed])

    generated = [image for client in SITES for image in generated_images(state, client)]
    assert len(set(generated)) == SAMPLES
    assert sum(image in haystack for image in generated) == (SAMPLES if mode == "samples" else 0)

    lines = [*MetricsLog(run.metrics).rounds(), *MetricsLog(run.metrics).evaluations()]
    assert len(lines) == 3
    for direction in ("up", "down"):
        messages = traffic.messages(direction)
        kinds = [message.metadata.message_type for message in messages]
        assert {kind: kinds.count(kind) for kind in kinds} == {DESCRIBE: 2, TRAIN: 4, EVALUATE: 2}
        claimed = sum(line[f"bytes_{direction}"] for line in lines)
        # What the log claims is to the byte what the messages of rounds and evaluations held,
        logged = [message for message in messages if message.metadata.message_type != DESCRIBE]
        assert claimed == sum(map(size_of, logged))
        # what carried them is a few percent more, or a little less where messages have an object in
        # common,
        bodies = sum(map(len, traffic.bodies(direction)))
        assert 0.98 * claimed < bodies < 1.04 * claimed
        # and all else is asking, confirming, the app's own archive, and the fields of HTTP.
        everything = sum(len(exchange[direction == "down"].body) for exchange in traffic.exchanges)
        assert everything - bodies < 30_000
        assert 0 <= traffic.raw[direction] - everything < 1500 * len(traffic.exchanges)


def image_needles(task: Task) -> Iterator[bytes]:
    """Each training and test image as uint8, and as the model sees it."""
    for images in (task.train, task.test):
        for image, scaled in zip(images, to_model_range(images), strict=True):
            yield image.tobytes()
            yield scaled.contiguous().numpy().tobytes()


def size_of(message: Message) -> int:
    """Bytes of arrays and their names, and of other records as they are serialised."""
    total = 0
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name.encode()) + len(array.data) for name, array in record.items())
        else:
            total += len(record.deflate())
    return total


# --- Strangers -----------------------------------------------------------------------------------


class Stranger:
    """A SuperNode started by hand, not by the deployment, that says it is digit-1."""

    def __init__(
        self,
        folder: Path,
        deployment: Deployment,
        port: int,
        authority: Path,
        key: Path,
        data: Path | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._log = folder / "log"
        options = {
            "--superlink": deployment.superlink_address,
            "--host": HOST,
            "--port": str(port),
            "--root-certificates": str(authority / "ca.crt"),
            "--auth-supernode-private-key": str(key),
            "--node-config": f'client-id="digit-1" data="{data or folder}" state-dir="{folder}"',
        }
        programs = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": f"{HOST},localhost",
            "no_proxy": f"{HOST},localhost",
        }
        command = [
            str(programs / "flower-supernode"),
            *(word for option in options.items() for word in option),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + LOG_SECONDS
        while words not in self.said:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)


def test_sites_whose_images_differ_in_size_and_channels_train_together(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "tiny.yaml", {"data.dataset": "sites", "evaluation.mode": "statistics"}
    )
    pixels = np.random.default_rng(0)
    tasks = [
        Task(name, *(pixels.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (30, 8)))
        for name, shape in (("grey", (8, 8, 1)), ("coloured", (10, 12, 3)))
    ]
    with Deployment(tmp_path / "d", tls=False, authentication=False) as deployment:
        deployment.start_superlink()
        for task in tasks:
            data = site_data(tmp_path, task)
            agree_as_rehearsed(load_config(config), data, tmp_path / "state", task.name)
            deployment.add_site(task.name, data, tmp_path / "state", wait=False)
        for task in tasks:
            deployment.wait_for_site(task.name)
        assert_succeeded(deployment.run(tmp_path / "run", config))
    log = MetricsLog(RunFolder.open(tmp_path / "run").metrics)
    assert [line["accepted"] for line in log.rounds()] == [["coloured", "grey"]] * 2
    assert {*log.evaluations()[-1]["score_by_client"]} == {"coloured", "grey"}
    for task in tasks:
        site = srfed.open_run(tmp_path / "state" / task.name)
        assert site.sample(0, 2).shape == (2, *task.shape)


def test_strangers_are_refused_and_the_run_goes_on_without_them(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", {})
    state = tmp_path / "state"
    tasks = load_tasks(tiny_config().data, len(SITES))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 10, 10, 1), dtype=np.uint8)
    larger = Task("digit-2", pixels[:40], pixels[40:], 2)
    elsewhere = tmp_path / "elsewhere"
    make_certificates(elsewhere, [HOST], ["unknown", "astray"])
    with ExitStack() as stack:
        deployment = stack.enter_context(Deployment(tmp_path / "d"))
        deployment.start_superlink()
        with ExitStack() as strangers:
            # One has the right certificate, and a key that nobody registered; the other a
            # registered key, and the certificate of another authority.
            deployment.flwr("supernode", "register", str(elsewhere / "site-astray.pub"), CONNECTION)
            unknown, astray = (
                strangers.enter_context(
                    Stranger(
                        tmp_path / name, deployment, port, authority, elsewhere / site_key(name)
                    )
                )
                for name, port, authority in zip(
                    ("unknown", "astray"),
                    free_ports(2),
                    (deployment.certificates, elsewhere),
                    strict=True,
                )
            )
            unknown.wait_for("Failed to activate SuperNode")
            astray.wait_for("certificate verify failed")
            assert "certificate" not in unknown.said
            assert not any("SuperNode ID:" in stranger.said for stranger in (unknown, astray)), (
                "never connected"
            )
        for task in (larger, *tasks):
            data = site_data(tmp_path, task)
            agree_as_rehearsed(load_config(config), data, state, task.name)
            deployment.add_site(task.name, data, state, wait=False)
        for client in ("digit-2", *SITES):
            deployment.wait_for_site(client)
        run = deployment.run(tmp_path / "run", config)
        assert_succeeded(run)
        output = "\n".join(run.lines())
    superlink = (deployment.logs / "superlink.log").read_text()
    assert superlink.count("[Fleet.ActivateNode] Activated") == 3, "the sites, and none else"
    assert "refused client 'digit-2': the server's reference images have no such task" in output
    assert not list((state / "digit-2").glob("lineages/*/round-*")), "it was never asked to train"

    deployed = RunFolder.open(tmp_path / "run")
    log = MetricsLog(deployed.metrics)
    assert [task.client for task in log.tasks()] == SITES
    assert [(line["round"], line["accepted"]) for line in log.rounds()] == [(1, SITES), (2, SITES)]
    assert not any(
        line["refused"] or line["missing"] for line in (*log.rounds(), *log.evaluations())
    )
    # To the bit what the two would have computed alone, in one process.
    simulated = run_in_process(begin(tmp_path / "simulated", TWO))
    assert server_bits(deployed) == server_bits(simulated)
    theirs, ours = accepted_bits(deployed, state), accepted_bits(simulated, simulated.clients)
    assert list(theirs) == SITES
    assert theirs == ours


def test_a_stranger_with_a_registered_key_cannot_take_the_place_of_a_site_that_restarts(
    tmp_path: Path,
) -> None:
    settings = {"federation.rounds": 3, "federation.on_missing": "wait", "evaluation.every": 0}
    config = write_config(tmp_path / "tiny.yaml", settings)
    tasks = load_tasks(tiny_config().data, len(SITES))
    elsewhere = tmp_path / "elsewhere"
    make_certificates(elsewhere, [], ["stranger"])
    with ExitStack() as stack:
        deployment = stack.enter_context(Deployment(tmp_path / "d"))
        deployment.start_superlink()
        command = [
            sys.executable,
            "-m",
            "srfed",
            "deploy",
            "register",
            "--site",
            "stranger",
            "--connection",
            CONNECTION,
        ]
        command += ["--key", str(elsewhere / site_public_key("stranger"))]
        environment = {**os.environ, "FLWR_HOME": str(deployment.folder / "flower")}
        registered = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert registered.returncode == 0, registered.stderr
        for task in tasks:
            data = site_data(tmp_path, task)
            agree_as_rehearsed(load_config(config), data, tmp_path / "state", task.name)
            deployment.add_site(task.name, data, tmp_path / "state", wait=False)
        agree_as_rehearsed(load_config(config), data, tmp_path / "stranger", "digit-1")
        for client in SITES:
            deployment.wait_for_site(client)
        run = deployment.run(tmp_path / "run", config)
        refused = 0
        for line in run.lines():
            if "round 1/3" in line:
                deployment.stop_site("digit-1")
                key, data = elsewhere / site_key("stranger"), tmp_path / "digit-1.npz"
                stack.enter_context(
                    Stranger(
                        tmp_path / "stranger",
                        deployment,
                        *free_ports(1),
                        deployment.certificates,
                        key,
                        data,
                    )
                )
            if "client 'digit-1' belongs to another SuperNode key" in line:
                refused += 1
                deployment.start_site("digit-1")
        assert_succeeded(run)
    assert refused == 1
    deployed = RunFolder.open(tmp_path / "run")
    assert [line["accepted"] for line in MetricsLog(deployed.metrics).rounds()] == [SITES] * 3
    simulated = run_in_process(begin(tmp_path / "simulated", {**TWO, **settings}))
    assert server_bits(deployed) == server_bits(simulated)
    # Who is who: by what was noted at registration, and by what the run knows.
    assert "stranger" in sites_in_words(None, elsewhere / NOTES)
    rows = sites_in_words(deployed.path, deployment.certificates / NOTES).splitlines()
    row = next(row for row in rows if row.startswith("digit-1")).split()
    assert row[1] == "digit-1"
    assert row[3] == read_key(deployment.certificates / site_public_key("digit-1"))
    assert "evaluation 3" in " ".join(row)


def accepted_bits(run: RunFolder, state: Path) -> dict[str, Any]:
    """The hashes of each site's accepted attempt."""
    attempts = read_manifest(sorted(run.server.glob("round-*"))[-1])["attempts"]
    return {
        client: read_manifest(state / client / "lineages" / run.lineage / attempt)["sha256"]
        for client, attempt in sorted(attempts.items())
    }

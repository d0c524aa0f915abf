"""What crosses the wire: never θ_i, its moments or an image of S_i; and the guard that sees to
it.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp

from srfed.config import RunConfig
from srfed.data import load_tasks, to_model_range
from srfed.federation.flower import client_app
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import (
    LAYOUT,
    array_record,
    read_layout,
    read_tensors,
    request_content,
)
from srfed.federation.layout import layout_bytes
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    EXAMPLES,
    GENERATED,
    METRICS,
    REFUSED,
    REPLY,
    REQUEST,
    SHARED,
    TRAIN,
    Request,
)
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.federation.together import AbandonedError
from srfed.interrupts import Interrupted
from srfed.model import build_model, build_partition
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.agreed_site import AgreedSite
from support.tiny_run import accepted_attempts, begin, round_lines, run_on_grid, tiny_config
from support.wire import SECRET, RecordingGrid, is_bare_error, log_of

# --- What the type checker refuses ---------------------------------------------------------------

LEAKING_PROGRAM = """
from srfed.federation.flower.packing import reply_content
from srfed.config import RunConfig
from srfed.federation.control import encode_control
from srfed.federation.messages import CONTROL, GENERATED, SHARED, ReplyHeader, Samples
from srfed.training.local import LocalResult
from srfed.training.part import ClientState
def reply(
    config: RunConfig, header: ReplyHeader, result: LocalResult, state: ClientState, made: Samples
) -> None:
    codes, _ = encode_control(config, result.gradient, "a", 1)
    reply_content(header, {}, {SHARED: result.shared, GENERATED: made, CONTROL: codes})
    reply_content(header, {}, {SHARED: state.exclusive.weights})
    reply_content(header, {}, {SHARED: state.exclusive.average})
    reply_content(header, {}, {SHARED: state.exclusive.moments})
    reply_content(header, {}, {CONTROL: state.exclusive.weights})
    encode_control(config, state.exclusive.weights, "a", 1)
"""


def test_mypy_refuses_a_program_that_hands_what_is_exclusive_to_the_packer(tmp_path: Path) -> None:
    program = tmp_path / "leaks.py"
    program.write_text(LEAKING_PROGRAM)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    wrong = re.findall(r"leaks\.py:(\d+): error: .*incompatible type", done.stdout)
    assert wrong == ["13", "14", "15", "16", "17"], done.stdout + done.stderr


# --- A whole run, every message recorded ---------------------------------------------------------


def contents(tensor: torch.Tensor) -> bytes | None:
    """The bytes of a tensor, unless they are so few, or so equal, that they prove nothing."""
    data = tensor.contiguous().numpy().tobytes()
    return data if len(data) > 16 and len(tensor.unique()) > 1 else None


def private_tensors(run: RunFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """All that any kept attempt of any client holds, except its copy of φ's moments."""
    for folder in run.clients.glob(f"*/lineages/{run.lineage}/*"):
        checkpoint = read_checkpoint(folder)
        for group in ("exclusive", "exclusive_average", "exclusive_moments"):
            for name, tensor in checkpoint.group(group).items():
                yield f"{folder.parents[2].name} {group} {name}", tensor


@pytest.mark.parametrize(
    "settings",
    [
        {"training.update": "joint", "training.shared_moments": "reset"},
        {
            "training.update": "alternating",
            "training.shared_moments": "keep",
            "model.exclusive_stages": "io",
        },
        {
            "model.exclusive_stages": "none",
            "model.owned": ["vector", "film"],
            "training.owned_learning_rate": 2e-2,
        },
    ],
    ids=["joint-reset", "alternating-keep-io", "all-shared-but-vector-and-film"],
)
def test_no_private_tensor_and_no_image_is_in_any_message_of_a_whole_run(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = begin(tmp_path / "run", {**settings, "federation.keep_attempts": 9})
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    # Three descriptions, nine updates, six evaluations.
    assert len(grid.requests) == len(grid.replies) == 3 + 9 + 6
    partition = build_partition(run.config, build_model(run.config, 1))
    assert set(partition.shared) <= grid.names
    assert not [
        name for name in grid.names if any(name.endswith(own) for own in partition.exclusive)
    ]

    haystack = grid.data
    # The search finds what does travel ...
    shared = read_checkpoint(run.server / "round-00002").group("shared")
    assert all(
        contents(tensor) is None or contents(tensor) in haystack for tensor in shared.values()
    )
    # ... and nothing of what must not.
    searched = 0
    for what, tensor in private_tensors(run):
        needle = contents(tensor)
        searched += needle is not None
        assert needle is None or needle not in haystack, what
    assert searched > 9 * 3
    for task in load_tasks(run.config.data, 3):
        for images in (task.train, task.test):
            for image, scaled in zip(images, to_model_range(images), strict=True):
                assert image.tobytes() not in haystack
                assert scaled.numpy().tobytes() not in haystack


def test_the_recorded_traffic_is_what_travelled(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.rounds": 2})
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)

    def array_bytes(messages: list[Message], kind: str, number: int) -> int:
        chosen = [
            m
            for m in messages
            if m.metadata.message_type == kind and m.metadata.group_id == str(number)
        ]
        assert len(chosen) == 3
        records = [
            record for message in chosen for record in message.content.array_records.values()
        ]
        return sum(
            len(name.encode()) + len(a.data) for record in records for name, a in record.items()
        )

    lines = [(TRAIN, line) for line in round_lines(run)]
    lines += [(EVALUATE, line) for line in MetricsLog(run.metrics).evaluations()]
    assert len(lines) == 3
    for kind, line in lines:
        for direction, messages in (("bytes_up", grid.replies), ("bytes_down", grid.requests)):
            tensors = array_bytes(messages, kind, line["round"])
            # Beside the tensors: header, numbers and, downwards, the configuration.
            assert tensors < line[direction] < tensors + 3 * 4096
    # φ's float32 weights of three clients, and .npy headers of at most 128 bytes each.
    model = build_model(run.config, 1)
    partition = build_partition(run.config, model)
    state = model.state_dict()
    payload = 3 * 4 * sum(state[name].numel() for name in partition.shared)
    assert (
        payload
        < lines[0][1]["bytes_up"]
        < payload + 3 * len(partition.shared) * (128 + 64) + 3 * 4096
    )


def test_clients_send_deltas_of_nothing_when_nothing_is_shared(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.rounds": 1, "model.exclusive_stages": "all"})
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    assert grid.names == {"images", "strip"}
    assert round_lines(run)[0]["bytes_up"] < 2000


# --- The guard itself ----------------------------------------------------------------------------
LEAK = np.frombuffer(SECRET.encode(), np.uint8)
Handler = Callable[[Message, Context], Message]
Leak = Callable[[Message], None]


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


@pytest.fixture
def ask(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Message]:
    """Send one request to the client of digit-0, with or without the guard, and return its
    reply.
    """
    monkeypatch.setenv(STATE_DIR_VARIABLE, str(tmp_path))

    def send(
        kind: str, handler: Handler, *, guarded: bool, samples: int = 4, config: RunConfig = config
    ) -> Message:
        app = ClientApp(mods=[wire_guard] if guarded else [])
        category, _, action = kind.partition(".")
        getattr(app, category)(action or "default")(handler)
        grid = InlineGrid(app, 1)
        model = build_model(config, 1)
        shared = build_partition(config, model).take_shared(model.state_dict())
        # The same question has one name, however often it is asked.
        request = Request(
            config.to_json(), "lineage", "digit-0", round=1, attempt="attempt", samples=samples
        )
        content = request_content(request, {SHARED: shared} if kind != DESCRIBE else None)
        return grid.send_and_receive([Message(content, 1, kind)])[0]

    return send


def add_array(record: str, name: str) -> Leak:
    def leak(reply: Message) -> None:
        tensors = (
            read_tensors(reply.content, record) if record in reply.content.array_records else {}
        )
        reply.content[record] = array_record({**tensors, name: torch.from_numpy(LEAK.copy())})

    return leak


def add_bare_array(record: str, name: str) -> Leak:
    """An array that the layout does not mention."""

    def leak(reply: Message) -> None:
        reply.content.array_records[record][name] = Array(LEAK)

    return leak


def add_number(record: str, name: str, value: Any) -> Leak:
    def leak(reply: Message) -> None:
        numbers = dict(reply.content.metric_records.get(record, {}))
        reply.content[record] = MetricRecord({**numbers, name: value})

    return leak


def add_field(record: str, name: str, value: Any) -> Leak:
    def leak(reply: Message) -> None:
        fields = dict(reply.content.config_records.get(record, {}))
        reply.content[record] = ConfigRecord({**fields, name: value})

    return leak


def replace_array(record: str, name: str, values: np.ndarray) -> Leak:
    def leak(reply: Message) -> None:
        tensors = read_tensors(reply.content, record)
        assert name in tensors
        reply.content[record] = array_record({**tensors, name: torch.from_numpy(values)})

    return leak


def append_bytes(record: str, name: str) -> Leak:
    """Bytes behind an array's values: numpy reads over them, but they would travel."""

    def leak(reply: Message) -> None:
        arrays = reply.content.array_records[record]
        array = arrays[name]
        arrays[name] = Array(
            array.dtype, array.shape, array.stype, array.data + SECRET.encode() * 40
        )

    return leak


def respelled_layout(record: str) -> Leak:
    """The same layout with white space in it, which could be counted."""

    def leak(reply: Message) -> None:
        arrays = reply.content.array_records[record]
        text = layout_bytes(read_layout(arrays)).replace(b",", b", ")
        arrays[LAYOUT] = Array(np.frombuffer(text, np.uint8))

    return leak


def announced_as(record: str, key: str, shape: tuple[int, ...], stype: str) -> Leak:
    """An array of the same values that Flower's own fields announce otherwise."""

    def leak(reply: Message) -> None:
        arrays = reply.content.array_records[record]
        array = arrays[key]
        arrays[key] = Array(array.dtype, shape or array.shape, stype or array.stype, array.data)

    return leak


AS_NUMBERS = [float(byte) for byte in SECRET.encode()]
LEAKS: dict[str, tuple[str, Leak]] = {
    "an exclusive tensor among φ": (TRAIN, add_array(SHARED, "head.conv.weight")),
    "an exclusive tensor in a record of its own": (
        TRAIN,
        add_array("exclusive", "head.conv.weight"),
    ),
    "moments of θ among φ": (TRAIN, add_array(SHARED, "exp_avg.head.conv.weight")),
    "training images under the name of a shared tensor": (
        TRAIN,
        replace_array(SHARED, "bottleneck.attention.norm.bias", np.zeros((142, 64), np.float32)),
    ),
    "bytes behind the shared tensors": (TRAIN, append_bytes(SHARED, "float32")),
    "bytes behind the layout": (TRAIN, append_bytes(SHARED, LAYOUT)),
    "an array that the layout does not mention": (TRAIN, add_bare_array(SHARED, "uint8")),
    "a layout in other words": (TRAIN, respelled_layout(SHARED)),
    "moments nobody asked for": (TRAIN, add_array("shared-moments", "exp_avg.stem.weight")),
    "training images with an update": (TRAIN, add_array(GENERATED, "images")),
    "training images in an unknown record": (TRAIN, add_array("debug", "batch")),
    "training images with a description": (DESCRIBE, add_array(GENERATED, "images")),
    "training images beside the samples": (EVALUATE, add_array(GENERATED, "originals")),
    "samples that are not uint8": (
        EVALUATE,
        replace_array(GENERATED, "images", np.zeros((4, 8, 8, 1))),
    ),
    "more samples than asked for": (
        EVALUATE,
        replace_array(GENERATED, "images", np.zeros((142, 8, 8, 1), np.uint8)),
    ),
    "an unknown number": (TRAIN, add_number(METRICS, "pixel", 0.5)),
    "a known number in an unknown record": (TRAIN, add_number("more", "loss", 0.5)),
    "pixels in place of a number": (TRAIN, add_number(METRICS, "loss", AS_NUMBERS)),
    "pixels in the list of losses": (TRAIN, add_number(METRICS, "loss_by_quarter", AS_NUMBERS)),
    "pixels in the list of SSIM": (EVALUATE, add_number(METRICS, "ssim", AS_NUMBERS)),
    "a number with a description": (DESCRIBE, add_number(METRICS, "loss", 0.5)),
    "a long text": (TRAIN, add_field(REPLY, "client", SECRET * 20)),
    "bytes": (TRAIN, add_field(REPLY, "client", SECRET.encode())),
    "a list": (TRAIN, add_field(REPLY, "round", [1, 2, 3])),
    "an unknown field": (TRAIN, add_field(REPLY, "note", SECRET)),
    "a record of text": (EVALUATE, add_field("notes", "client", SECRET)),
    "an unknown field of a description": (DESCRIBE, add_field(REPLY, "path", SECRET)),
    "a short text in place of the client": (TRAIN, add_field(REPLY, "client", SECRET)),
    "a short text in place of the attempt": (TRAIN, add_field(REPLY, "attempt", SECRET)),
    "a text for no features": (TRAIN, add_field(REPLY, "features", SECRET)),
    "a whole number in place of the round": (TRAIN, add_field(REPLY, "round", 4711**5)),
    "a truth value in place of the round": (TRAIN, add_field(REPLY, "round", True)),
    "a short text in place of the version": (DESCRIBE, add_field(REPLY, "version", SECRET)),
    "a number in place of the test images": (DESCRIBE, add_field(REPLY, "test_images", 4711)),
    "another count of images": (TRAIN, add_number(METRICS, EXAMPLES, 4711.0)),
    "a count with a fraction": (TRAIN, add_number(METRICS, "images", 20.5)),
    "an update without its numbers": (TRAIN, lambda reply: reply.content.pop(METRICS)),
    "a text for how values are serialised": (
        TRAIN,
        announced_as(SHARED, "float32", (), SECRET),
    ),
}
REAL = {TRAIN: client_app.train, EVALUATE: client_app.evaluate, DESCRIBE: client_app.describe}


def is_refusal(reply: Message, words: str) -> bool:
    return reply.has_error() and reply.error.code == REFUSED and reply.error.reason == words


@pytest.mark.parametrize("kind", [DESCRIBE, TRAIN, EVALUATE])
def test_an_honest_reply_passes_the_guard_unchanged(ask: Callable[..., Message], kind: str) -> None:
    guarded, free = (ask(kind, REAL[kind], guarded=guarded) for guarded in (True, False))
    assert guarded.has_content()
    assert list(guarded.content) == list(free.content)
    for name, record in guarded.content.array_records.items():
        assert list(record.items()) == list(free.content.array_records[name].items())


@pytest.mark.parametrize("what", LEAKS)
def test_the_guard_turns_a_leak_into_a_bare_error_and_logs_why(
    ask: Callable[..., Message], tmp_path: Path, what: str
) -> None:
    kind, leak = LEAKS[what]

    def leaky(message: Message, context: Context) -> Message:
        reply = REAL[kind](message, context)
        leak(reply)
        return reply

    assert ask(kind, leaky, guarded=False).has_content(), "without the guard it leaves"
    reply = ask(kind, leaky, guarded=True)
    assert is_bare_error(reply)
    assert re.search("NotAllowedError|TypeError: Unsupported", log_of(tmp_path))
    assert len(log_of(tmp_path).splitlines()[0]) < 200


def test_the_fields_in_which_flower_announces_an_array_are_written_anew(
    ask: Callable[..., Message],
) -> None:
    """Nobody reads the announced shape, so a reply with another one is as good; it is not passed
    on.
    """

    def leaky(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        announced_as(SHARED, "float32", tuple(map(int, AS_NUMBERS)), "")(reply)
        reply.metadata.ttl = 47.11
        return reply

    replies = [ask(TRAIN, leaky, guarded=guarded) for guarded in (True, False)]
    shapes = [reply.content.array_records[SHARED]["float32"].shape for reply in replies]
    values = replies[0].content.array_records[SHARED]["float32"].numpy()
    assert shapes == [values.shape, tuple(map(int, AS_NUMBERS))]
    assert [reply.metadata.ttl == 47.11 for reply in replies] == [False, True]


def test_a_number_beyond_its_range_leaves_as_infinity(ask: Callable[..., Message]) -> None:
    def leaky(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        add_number(METRICS, "loss", 4711e300)(reply)
        return reply

    told = [
        ask(TRAIN, leaky, guarded=guarded).content.metric_records[METRICS]["loss"]
        for guarded in (True, False)
    ]
    assert told == [float("inf"), 4711e300]


Private = Callable[[Path], np.ndarray]


def piece_of(group: str, kind: str = "") -> Private:
    """Sixteen bytes of what the store holds."""

    def take(folder: Path) -> np.ndarray:
        (stored,) = folder.glob("digit-0/lineages/lineage/*")
        found = read_checkpoint(stored).group(group)
        tensors = [tensor for name, tensor in found.items() if kind in name]
        flat = max(tensors, key=lambda tensor: tensor.numel()).numpy().reshape(-1)
        return flat[5:9].copy()

    return take


def piece_of_image(scaled: bool) -> Private:
    def take(folder: Path) -> np.ndarray:
        (task,) = load_tasks(tiny_config().data, 1)
        images = task.train[3:4]
        if scaled:
            # Four pixels of different grey in a row.
            flat = to_model_range(images).numpy().reshape(-1)
            return flat[next(i for i in range(60) if len(set(flat[i : i + 4])) == 4) :][:4].copy()
        flat = images.reshape(-1)
        start = next(i for i in range(1, 48) if len(set(flat[i : i + 16])) >= 9)
        return flat[start : start + 16].view(np.float32).copy()

    return take


PIECES: dict[str, Private] = {
    "θ_i": piece_of("exclusive"),
    "the average of θ_i": piece_of("exclusive_average"),
    "a moment of θ_i": piece_of("exclusive_moments"),
    "a second moment of θ_i": piece_of("exclusive_moments", "exp_avg_sq"),
    "a moment of φ": piece_of("shared_moments"),
    "an image": piece_of_image(scaled=False),
    "an image as the network sees it": piece_of_image(scaled=True),
}


POSITIVE = "a second moment of θ_i"
"""Such as numbers of a reply may be."""


@pytest.mark.parametrize(
    ("what", "place"),
    [*((what, "φ") for what in PIECES), (POSITIVE, "numbers"), (POSITIVE, "bytes of numbers")],
)
def test_no_sixteen_bytes_of_what_is_private_leave_under_an_allowed_name(
    ask: Callable[..., Message], tmp_path: Path, what: str, place: str
) -> None:
    """A mistake in a handler that names nothing wrongly."""

    def leaky(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        piece = PIECES[what](tmp_path)
        if place == "φ":
            tensors = read_tensors(reply.content, SHARED)
            flat = next(t for t in tensors.values() if t.ndim == 4).view(-1)
            flat[3:7] = torch.from_numpy(piece)
            reply.content[SHARED] = array_record(tensors)
        elif place == "numbers":
            add_number(METRICS, "loss_by_quarter", piece.astype(float).tolist())(reply)
        else:
            hidden = np.concatenate([piece, np.full(4, 0.25, np.float32)])
            add_number(METRICS, "loss_by_quarter", hidden.view(np.float64).tolist())(reply)
        return reply

    config = tiny_config({"training.shared_moments": "keep"})
    assert ask(TRAIN, client_app.train, guarded=False, config=config).has_content()
    assert is_bare_error(ask(TRAIN, leaky, guarded=True, config=config))
    assert "PrivateError: 16 bytes of" in log_of(tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_each_reply_of_a_site_is_looked_at_and_not_only_some(tmp_path: Path, number: int) -> None:
    def leaky(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        tensors = read_tensors(reply.content, SHARED)
        flat = next(t for t in tensors.values() if t.ndim == 4).view(-1)
        flat[3:7] = torch.from_numpy(PIECES["an image"](tmp_path))
        reply.content[SHARED] = array_record(tensors)
        return reply

    app = ClientApp(mods=[wire_guard])
    app.train()(leaky)
    site = AgreedSite(tmp_path, client_app=app)
    assert is_bare_error(site.ask(TRAIN, round=number))
    assert "PrivateError: 16 bytes of an image" in site.log
    assert not site.stored


def test_images_leave_only_when_the_request_asks_for_samples(ask: Callable[..., Message]) -> None:
    def leaky(message: Message, context: Context) -> Message:
        reply = client_app.evaluate(message, context)
        strip = read_tensors(reply.content, GENERATED)["strip"]
        reply.content[GENERATED] = array_record(
            {"images": torch.zeros((4, 8, 8, 1), dtype=torch.uint8), "strip": strip}
        )
        return reply

    assert ask(EVALUATE, leaky, guarded=True, samples=4).has_content()
    assert is_bare_error(ask(EVALUATE, leaky, guarded=True, samples=0))


def test_the_text_of_an_exception_stays_at_the_client(
    ask: Callable[..., Message], tmp_path: Path
) -> None:
    def failing(message: Message, context: Context) -> Message:
        raise RuntimeError(f"cannot open /data/{SECRET}.png")

    free = ask(TRAIN, failing, guarded=False)
    assert SECRET in (free.error.reason or ""), "without the guard it leaves"
    assert is_bare_error(ask(TRAIN, failing, guarded=True))
    assert SECRET in log_of(tmp_path)
    assert "RuntimeError" in log_of(tmp_path)


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("raised", [SystemExit, Panic, GeneratorExit])
def test_what_would_end_the_process_is_a_failure_like_any_other(
    ask: Callable[..., Message], tmp_path: Path, raised: type[BaseException]
) -> None:
    def ending(message: Message, context: Context) -> Message:
        raise raised(SECRET)

    with pytest.raises(raised):
        ask(TRAIN, ending, guarded=False)
    assert is_bare_error(ask(TRAIN, ending, guarded=True))
    assert f"ExitError: {raised.__name__} was raised: {SECRET}" in log_of(tmp_path)
    assert "in ending" in log_of(tmp_path), "where it was raised"


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), Interrupted(signal.SIGTERM), AbandonedError()]
)
def test_a_process_that_is_to_end_ends(
    ask: Callable[..., Message], tmp_path: Path, raised: BaseException
) -> None:
    def ending(message: Message, context: Context) -> Message:
        raise raised

    with pytest.raises(type(raised)):
        ask(TRAIN, ending, guarded=True)
    assert not (tmp_path / "digit-0" / "client.log").exists()


def test_the_exit_of_a_signals_handler_ends_the_process(
    ask: Callable[..., Message], tmp_path: Path
) -> None:
    """Flower's handler puts back the one before it, and exits."""
    before = signal.getsignal(signal.SIGTERM)

    def graceful(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, before)
        sys.exit(0)

    def stopped(message: Message, context: Context) -> Message:
        signal.raise_signal(signal.SIGTERM)
        return client_app.train(message, context)

    signal.signal(signal.SIGTERM, graceful)
    try:
        with pytest.raises(SystemExit):
            ask(TRAIN, stopped, guarded=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "digit-0" / "client.log").exists()


def test_an_error_reply_of_the_handlers_own_is_replaced(ask: Callable[..., Message]) -> None:
    def failing(message: Message, context: Context) -> Message:
        return Message(Error(7, f"lost {SECRET}"), reply_to=message)

    assert SECRET in (ask(TRAIN, failing, guarded=False).error.reason or "")
    assert is_bare_error(ask(TRAIN, failing, guarded=True))


def test_a_message_of_unknown_kind_gets_no_content(ask: Callable[..., Message]) -> None:
    def obliging(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    assert ask("query.weights", obliging, guarded=False).has_content()
    assert is_refusal(
        ask("query.weights", obliging, guarded=True), "the request is of an unknown kind"
    )


def test_a_request_of_another_protocol_gets_a_bare_error(tmp_path: Path) -> None:
    grid = InlineGrid(client_app.app, 1)
    request = request_content(Request("{}", "lineage"))
    del request[REQUEST]
    assert is_refusal(
        grid.send_and_receive([Message(request, 1, TRAIN)])[0], "the request is of another protocol"
    )


def test_a_phi_of_another_model_is_refused_at_the_client(
    ask: Callable[..., Message], tmp_path: Path
) -> None:
    other = tiny_config({"model.channels": [8, 16, 16, 32]})

    def swapped(message: Message, context: Context) -> Message:
        tensors = read_tensors(message.content, SHARED)
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
        message.content[SHARED] = array_record({**tensors, name: torch.zeros(1, 1)})
        return client_app.train(message, context)

    assert is_bare_error(ask(TRAIN, swapped, guarded=True, config=other))
    assert "the φ received has" in log_of(tmp_path)


def test_an_attempt_is_stored_before_its_update_leaves(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.rounds": 3, "federation.keep_attempts": 9})
    run_on_grid(run, InlineGrid)
    for folder in accepted_attempts(run).values():
        attempts = sorted(folder.parent.iterdir())
        chain = [read_checkpoint(path).manifest for path in attempts]
        assert [m["round"] for m in chain] == [1, 2, 3]
        assert chain[0]["parent"] == "none"
        assert all(later["parent"] == earlier["attempt"] for earlier, later in pairwise(chain))

"""One client that fails, lies or is late: the round goes on, it is named, and φ is as if it were
absent.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.common.constant import SType

from srfed.errors import UserError
from srfed.federation.flower import client_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import LAYOUT, array_record, read_tensors
from srfed.federation.messages import GENERATED, METRICS, REPLY, SHARED
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.faults import Tensors, app_with, fail, set_field, set_number, without
from support.tiny_run import (
    all_bits,
    begin,
    records,
    round_lines,
    run_in_process,
    run_on_grid,
    server_bits,
)

MIDDLE, LAST = 1, 2
"""Positions of the client that fails; the middle one would show in any sum over the clients."""


def edit_tensors(
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], record: str = SHARED
) -> Callable[[Message], None]:
    """Change the tensors of a record."""

    def change(reply: Message) -> None:
        reply.content[record] = array_record(edit(read_tensors(reply.content, record)))

    return change


def edit_array(
    edit: Callable[[np.ndarray], np.ndarray], record: str = SHARED
) -> Callable[[Message], None]:
    """Change the first tensor of a record."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(iter(tensors))
        return {
            **tensors,
            name: torch.from_numpy(np.ascontiguousarray(edit(tensors[name].numpy()))),
        }

    return edit_tensors(change, record)


def with_first_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values.flat[0] = value
        return values

    return edit


def edit_bytes(edit: Callable[[bytes], bytes], name: str = "float32") -> Callable[[Message], None]:
    """Change an array's bytes, not what is said of them."""

    def change(reply: Message) -> None:
        arrays = reply.content.array_records[SHARED]
        array = arrays[name]
        arrays[name] = Array(array.dtype, array.shape, SType.NUMPY, edit(array.data))

    return change


def without_first(tensors: Tensors) -> Tensors:
    return dict(list(tensors.items())[1:])


def with_another(tensors: Tensors) -> Tensors:
    return {**tensors, "head.weight": torch.zeros(3)}


def swapped(tensors: Tensors) -> Tensors:
    first = next(iter(tensors))
    other = next(name for name in tensors if tensors[name].shape != tensors[first].shape)
    return {**tensors, first: tensors[other], other: tensors[first]}


def permuted(tensors: Tensors) -> Tensors:
    """A list of tensors that slipped by one: every value finite, every name known."""
    values = list(tensors.values())
    return dict(zip(tensors, values[1:] + values[:1], strict=True))


def scaled(tensors: Tensors) -> Tensors:
    return {name: 1000 * tensor for name, tensor in tensors.items()}


def relaid(edit: Callable[[bytes], bytes]) -> Callable[[Message], None]:
    """Another layout, the same values."""

    def change(reply: Message) -> None:
        arrays = reply.content.array_records[SHARED]
        arrays[LAYOUT] = Array(np.frombuffer(edit(arrays[LAYOUT].numpy().tobytes()), np.uint8))

    return change


def with_empty_tensors(text: bytes) -> bytes:
    """A layout with 400,000 further entries, none of which holds a value."""
    return (
        b",".join([text[:-1], *(b'["%d","float32",[0]]' % number for number in range(400_000))])
        + b"]"
    )


def with_arrays(count: int) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        for number in range(count):
            reply.content.array_records[SHARED][f"float{number}"] = Array(np.zeros(1, np.float32))

    return change


def as_error(reply: Message) -> Message:
    return Message(Error(100, "secret text"), reply_to=reply_to(reply))


def as_error_of(code: int, reason: str) -> Callable[[Message], Message]:
    return lambda reply: Message(Error(code, reason), reply_to=reply_to(reply))


def reply_to(reply: Message) -> Message:
    """A stand-in for the request: an error reply needs only its metadata."""
    request = Message(reply.content, reply.metadata.src_node_id, reply.metadata.message_type)
    request.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return request


TRAIN_FAULTS: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "it raises": (fail, "failed"),
    "it answers with an error": (as_error, "the reason is in the client's own log"),
    "NaN": (edit_array(with_first_value(np.nan)), "not finite"),
    "infinity": (edit_array(with_first_value(np.inf)), "not finite"),
    "minus infinity": (edit_array(with_first_value(-np.inf)), "not finite"),
    "a tensor is missing": (edit_tensors(without_first), "1 tensors are missing"),
    "a tensor too many": (edit_tensors(with_another), "1 unknown ['head.weight']"),
    "wrong shape": (edit_array(lambda values: values[None]), "torch.float32 (1, "),
    "transposed": (edit_array(lambda values: values.reshape(-1)), "torch.float32"),
    "wrong dtype": (edit_array(lambda values: values.astype(np.float64)), "torch.float64"),
    "integers": (edit_array(lambda values: values.astype(np.int32)), "torch.int32"),
    "a thousand times too large": (edit_tensors(scaled), "is the most that a round can move φ"),
    "two tensors swapped": (edit_tensors(swapped), "tensor "),
    "all tensors permuted": (edit_tensors(permuted), "tensor "),
    "bytes that are no array": (edit_bytes(lambda data: b"garbage"), "cannot be read"),
    "half an array": (edit_bytes(lambda data: data[: len(data) // 2]), "cannot be read"),
    "a header that does not parse": (
        edit_bytes(lambda data: data[:10] + b"(" * 118 + data[128:]),
        "cannot be read",
    ),
    "bytes of another shape than announced": (
        edit_bytes(lambda data: Array(np.zeros(2, np.float32)).data),
        "of its",
    ),
    "values in two dimensions": (
        edit_bytes(lambda data: Array(np.zeros((2, 2), np.float32)).data),
        "has no values",
    ),
    "more values than announced": (
        edit_bytes(lambda data: Array(np.zeros(10**6, np.float32)).data),
        "bytes long, where",
    ),
    "no layout": (
        lambda reply: reply.content.array_records[SHARED].__delitem__(LAYOUT),
        "no layout",
    ),
    "a layout that is no JSON": (relaid(lambda text: text[:-3]), "cannot be read"),
    "a layout of something else": (relaid(lambda text: b"7"), "cannot be read"),
    "a layout with negative shapes": (
        relaid(lambda text: text.replace(b"[16]", b"[-16]", 1)),
        "cannot be read",
    ),
    "a layout that names a tensor twice": (
        relaid(lambda text: b"[" + text[1:-1] + b"," + text[1:]),
        "named twice",
    ),
    "a layout without end": (relaid(lambda text: b"[" * 5000), "cannot be read"),
    "400,000 empty tensors": (relaid(with_empty_tensors), "its layout is"),
    "an array for each letter": (with_arrays(200), "it sent 201 arrays"),
    "no tensors": (without(SHARED), "no arrays 'arrays'"),
    "no header": (without(REPLY), "header is malformed"),
    "no numbers": (without(METRICS), "'num-examples'"),
    "another client's name": (set_field("client", "digit-0"), "answers as 'digit-0'"),
    "an older attempt": (
        set_field("attempt", "round-00001-0123abcd"),
        "attempt 'round-00001-0123abcd'",
    ),
    "an older round": (set_field("round", 1), "not for this one"),
    "a round that is no number": (set_field("round", "2"), "header is malformed"),
    "no images": (set_number("num-examples", 0.0), "'num-examples' is 0.0, not 146"),
    "half an image": (set_number("num-examples", 0.5), "'num-examples' is 0.5"),
    "more images than it said at first": (
        set_number("num-examples", 1e300),
        "'num-examples' is 1e+300, not 146",
    ),
    "less than no image": (set_number("num-examples", -146.0), "'num-examples' is -146.0"),
    "infinitely many images": (set_number("num-examples", float("inf")), "'num-examples'"),
    "a loss that is no number": (set_number("loss", float("nan")), "'loss'"),
    "a list for a loss": (set_number("loss", [0.5]), "'loss'"),
    "three quarters": (
        set_number("loss_by_quarter", [0.5] * 3),
        "'loss_by_quarter' is a list of 3",
    ),
    "a giant quarter": (
        set_number("loss_by_quarter", [0.5, 1e30, 0.5, 0.5]),
        "'loss_by_quarter' is 1e+30",
    ),
    "a loss below 0": (set_number("loss", -1.0), "'loss' is -1.0"),
    "a giant loss": (set_number("loss", 1e30), "'loss' is 1e+30"),
    "more images a round than there are": (set_number("images", 1e15), "'images' is"),
    "a round of a million years": (set_number("seconds", 1e13), "'seconds' is"),
    "a number that nobody asked for": (set_number("password", 1.0), "'password'"),
    "a record that nobody asked for": (
        lambda reply: reply.content.__setitem__("besides", MetricRecord({"one": 1.0})),
        "'besides'",
    ),
    "a field that nobody asked for": (set_field("password", "123"), "'password'"),
    "a name of 5 MB": (set_field("attempt", "a" * 5_000_000), "5000000 characters"),
    "a name that draws on the terminal": (
        set_field("attempt", "\x1b[2J\x1b]0;owned\x07"),
        "not printable",
    ),
    "a reason that draws on the terminal": (
        as_error_of(101, "not agreed:\x1b[2J \x1b]0;owned\x07\u202etxt " + "x" * 5_000_000),
        "it refuses: not agreed: [2J ]0;owned txt xxx",
    ),
    "steps without end": (set_number("shared_steps", 1e15), "steps"),
    "steps backwards": (set_number("shared_steps", -3.0), "steps"),
}

EVALUATE_FAULTS: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "it raises": (fail, "failed"),
    "too few images": (edit_array(lambda images: images[1:], GENERATED), "tensor 'images' is"),
    "too many images": (
        edit_array(lambda images: np.concatenate([images, images]), GENERATED),
        "tensor 'images' is",
    ),
    "images of another size": (
        edit_array(lambda images: images[:, 1:], GENERATED),
        "tensor 'images' is",
    ),
    "float images": (edit_array(lambda images: images / 255, GENERATED), "tensor 'images' is"),
    "no images": (without(GENERATED), "no arrays 'generated'"),
    "a strip that is a number": (
        edit_tensors(
            lambda tensors: {**tensors, "strip": torch.tensor(3, dtype=torch.uint8)}, GENERATED
        ),
        "tensor 'strip' is",
    ),
    "SSIM above 1": (set_number("ssim", [1.5]), "'ssim' is 1.5, not from -1 to 1"),
    "SSIM that is no number": (set_number("ssim", [float("nan")]), "'ssim' is nan"),
    "more SSIM than timesteps": (
        set_number("ssim", [0.5] * 7),
        "'ssim' is a list of 7, not a list of 1",
    ),
    "SSIM at another timestep": (
        set_number("ssim_timesteps", [3.0]),
        "measured at [3.0], not at [5]",
    ),
    "SSIM at infinity": (set_number("ssim_timesteps", [float("inf")]), "'ssim_timesteps' is inf"),
    "more judged images than there are": (
        set_number("ssim_images", 1e9),
        "'ssim_images' is 1000000000.0, not 1",
    ),
    "a window as large as the sky": (
        set_number("ssim_window", 1e300),
        "'ssim_window' is 1e+300, not 7",
    ),
    "a film for a strip": (
        edit_tensors(
            lambda tensors: {**tensors, "strip": torch.zeros((9, 8, 8, 1), dtype=torch.uint8)},
            GENERATED,
        ),
        "tensor 'strip' is torch.uint8 (9, 8, 8, 1), not torch.uint8 (3, 8, 8, 1)",
    ),
    "an audit before the end": (
        set_number("memorisation_pixels_share", 0.0),
        "numbers that nobody asked for",
    ),
    "no window": (
        lambda reply: reply.content.__setitem__(
            METRICS,
            MetricRecord({k: v for k, v in reply.content[METRICS].items() if k != "ssim_window"}),
        ),
        "'ssim_window'",
    ),
    "another client's name": (set_field("client", "digit-0"), "answers as 'digit-0'"),
    "an older attempt": (
        set_field("attempt", "round-00001-0123abcd"),
        "attempt 'round-00001-0123abcd'",
    ),
}


class Runs(NamedTuple):
    faulty: RunFolder
    absent: RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A fault a round, another an evaluation, then an honest round; and the same with mere
    exceptions.
    """
    folder = tmp_path_factory.mktemp("faults")
    settings = {
        "federation.rounds": len(TRAIN_FAULTS) + 1,
        "federation.server_optimizer": "momentum",
        "federation.weights": "examples",
        "evaluation.every": 2,
        "evaluation.samples": 6,
        "evaluation.samples_between": 6,
        "evaluation.ssim_images": 1,
        "evaluation.ssim_curve": [],
        "sampling.steps": 1,
        "training.local_steps": 1,
        "training.batch_size": 4,
    }
    train, evaluate = (
        [fault for fault, _ in faults.values()] for faults in (TRAIN_FAULTS, EVALUATE_FAULTS)
    )
    return Runs(
        run_in_process(begin(folder / "faulty", settings), app_with(MIDDLE, train, evaluate)),
        run_in_process(
            begin(folder / "absent", settings),
            app_with(MIDDLE, [fail] * len(train), [fail] * len(evaluate)),
        ),
    )


@pytest.mark.parametrize("what", TRAIN_FAULTS)
def test_a_faulty_update_is_refused_with_its_reason_and_leaves_no_trace(
    runs: Runs, what: str
) -> None:
    place = list(TRAIN_FAULTS).index(what)
    line, reference = (round_lines(run)[place] for run in runs)
    assert line["accepted"] == ["digit-0", "digit-2"]
    assert line["missing"] == {}
    assert list(line["refused"]) == ["digit-1"]
    assert TRAIN_FAULTS[what][1] in line["refused"]["digit-1"]
    assert "secret text" not in line["refused"]["digit-1"]
    assert line["refused"]["digit-1"].isprintable()
    assert len(line["refused"]["digit-1"]) <= 200
    for name in (
        "loss",
        "loss_by_client",
        "loss_by_quarter",
        "images",
        "update_norm",
        "disagreement",
    ):
        assert line[name] == reference[name], name


def test_after_faults_of_every_kind_every_bit_is_as_if_the_client_had_been_absent(
    runs: Runs,
) -> None:
    assert round_lines(runs.faulty)[-1]["accepted"] == ["digit-0", "digit-1", "digit-2"]
    assert all_bits(runs.faulty) == all_bits(runs.absent)


@pytest.mark.parametrize("what", EVALUATE_FAULTS)
def test_a_faulty_evaluation_is_refused_and_the_others_are_scored(runs: Runs, what: str) -> None:
    place = list(EVALUATE_FAULTS).index(what)
    line, reference = (MetricsLog(run.metrics).evaluations()[place] for run in runs)
    assert list(line["refused"]) == ["digit-1"]
    assert EVALUATE_FAULTS[what][1] in line["refused"]["digit-1"]
    assert sorted(line["ssim_by_client"]) == ["digit-0", "digit-2"]
    for name in (
        "score",
        "score_by_client",
        "ssim",
        "ssim_by_client",
        "floor",
        "samples",
        "references",
    ):
        assert line[name] == reference[name], name
    assert line["samples"] == 4


def test_an_evaluation_that_every_client_fails_is_left_out_and_the_run_goes_on_to_its_last(
    tmp_path: Path,
) -> None:
    app = ClientApp()
    app.query("describe")(client_app.describe)
    app.train()(client_app.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise RuntimeError

    run = begin(tmp_path / "run", {"federation.rounds": 2, "evaluation.every": 1})
    with pytest.raises(UserError, match="evaluation 2 has no score, as no client gave samples"):
        run_in_process(run, app)
    assert [line["kind"] for line in records(run)] == ["tasks", "round", "round"]


def test_the_order_of_the_tensors_in_a_reply_does_not_matter(tmp_path: Path) -> None:
    def reverse(reply: Message) -> None:
        tensors = read_tensors(reply.content, SHARED)
        reply.content[SHARED] = array_record(
            {name: tensors[name] for name in reversed(list(tensors))}
        )

    settings = {"federation.rounds": 2, "evaluation.samples": 6}
    ordered = run_in_process(begin(tmp_path / "ordered", settings))
    reversed_ = run_in_process(
        begin(tmp_path / "reversed", settings), app_with(0, train=[reverse, reverse])
    )
    assert all_bits(ordered) == all_bits(reversed_)


def test_too_few_accepted_updates_stop_the_run_in_one_line(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.min_clients": 3, "federation.rounds": 2})
    with pytest.raises(UserError) as caught:
        run_in_process(run, app_with(MIDDLE, train=[lambda reply: None, fail]))
    text = str(caught.value)
    assert "federation.min_clients = 3" in text
    assert "round 2 has 2 accepted updates" in text
    assert "digit-1: it failed" in text
    assert "\n" not in text
    assert server_bits(run)["round"] == 1


# --- Late replies --------------------------------------------------------------------------------

TIMEOUT = 3.0


class LateGrid(InlineGrid):
    """Holds the last client's reply of round 2 back and hands it over, unasked, in round 3
    (twice).
    """

    def __init__(self, app: ClientApp, nodes: int, state_dir: Path) -> None:
        super().__init__(app, nodes, state_dir)
        self._held: list[Message] = []
        self.handed_over = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        if replies and replies[0].has_content() and REPLY in replies[0].content.config_records:
            header = replies[0].content.config_records[REPLY]
            if header.get("round") == 2 and header["client"] == "digit-2":
                self._held = [replies[0], replies[0]]
                return []
            if header.get("round") == 3:
                late, self._held = self._held, []
                self.handed_over += len(late)
                return [*late, *replies, *replies]
        return replies


def test_late_and_repeated_replies_are_ignored_now_and_for_ever(tmp_path: Path) -> None:
    settings = {
        "federation.rounds": 3,
        "federation.round_timeout": TIMEOUT,
        "federation.server_optimizer": "momentum",
        "evaluation.every": 0,
        "evaluation.samples": 6,
    }
    absent = begin(tmp_path / "absent", settings)
    run_in_process(absent, app_with(LAST, train=[fail, fail]))

    def sleep(reply: Message) -> None:
        time.sleep(TIMEOUT + 0.5)

    late = begin(tmp_path / "late", settings)
    grid = run_on_grid(late, LateGrid, app_with(LAST, train=[sleep]))
    assert isinstance(grid, LateGrid)
    assert grid.handed_over == 2
    lines = round_lines(late)
    assert [line["missing"] for line in lines] == [{"digit-2": "no reply in time"}] * 2 + [{}]
    assert [line["accepted"] for line in lines] == [["digit-0", "digit-1"]] * 2 + [
        ["digit-0", "digit-1", "digit-2"]
    ]
    assert all_bits(late) == all_bits(absent)


# --- Clients that do not fit ---------------------------------------------------------------------


def describing(change: Callable[[Message, int], Message | None]) -> ClientApp:
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        reply = client_app.describe(message, context)
        return change(reply, int(context.node_config["partition-id"])) or reply

    return app


def set_own(name: str, value: Any) -> Callable[[Message, int], None]:
    """A client that says something else of itself; the others do not."""

    def change(reply: Message, index: int) -> None:
        if index == MIDDLE:
            reply.content.config_records[REPLY][name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("client", "digit-0", "another node is client 'digit-0' already"),
        ("partition", "0" * 64, "'digit-1': it divides the model differently"),
        ("height", 9, "its images are 9x8x1, this run's are 8x8x1"),
        ("images", "many", "'images'"),
        ("client", "../digit-1", "is no name for a store"),
        ("client", "digit-7", "no such task"),
        ("version", "0.0.1", "it runs srfed '0.0.1'"),
        ("version", "\x1b[2J", "not printable"),
        ("task", "a" * 5_000_000, "5000000 characters"),
        ("task", "digit\x1b]0;owned\x07", "not printable"),
        ("client", "d" * 101, "101 characters"),
        ("images", 2**62, "'images' is 4611686018427387904, not a whole number from 1"),
        ("images", -16, "'images' is -16"),
        ("images", 15, "training.batch_size = 16 is above the 15 training images"),
        ("test_images", -1, "'test_images' is -1"),
        ("index", -7, "'index' is -7"),
    ],
)
def test_clients_that_do_not_fit_together_stop_the_run_at_the_door(
    tmp_path: Path, name: str, value: Any, expected: str
) -> None:
    run = begin(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run_in_process(run, describing(set_own(name, value)))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert not run.started


def test_a_client_that_claims_more_images_than_can_be_counted_off_is_refused(
    tmp_path: Path,
) -> None:
    run = begin(tmp_path / "run", {"training.local_steps": None, "training.local_epochs": 1})
    with pytest.raises(
        UserError,
        match="'digit-1': 1000000000 images make 62500000 steps a round; allowed: 1000000",
    ):
        run_in_process(run, describing(set_own("images", 10**9)))


def test_a_client_that_cannot_describe_itself_is_named(tmp_path: Path) -> None:
    def raising(reply: Message, index: int) -> None:
        if index == MIDDLE:
            raise RuntimeError(uuid4().hex)

    with pytest.raises(UserError, match=r"cannot describe itself; the reason is in .*client\.log"):
        run_in_process(begin(tmp_path / "run"), describing(raising))

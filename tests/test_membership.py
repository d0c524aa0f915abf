"""Clients that come late, leave, move, fail or are somebody else: who takes part, and that every
bit is right.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faulty_clients import Faults, Tensors, app_with, fail, set_field
from tiny_run import all_bits, begin, records, round_lines, server_bits, tiny_config

from srfed.deployment.certificates import make_certificates
from srfed.deployment.sites import rebind, sites_in_words
from srfed.errors import UserError
from srfed.federation.flower.client_app import app as real_app
from srfed.federation.flower.identity import ROSTER_FILE, kept_roster, read_roster
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import array_record, read_tensors
from srfed.federation.flower.roster import Expected, Roster
from srfed.federation.flower.server_app import begin_or_go_on, run_federation
from srfed.federation.messages import DESCRIBE, EVALUATE, FAILED, REPLY, SHARED, TRAIN
from srfed.files import write_json
from srfed.keys import key_fingerprint, read_key
from srfed.storage.checkpoint import read_manifest
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "data.images_per_task": 16,
    "federation.rounds": ROUNDS,
    "federation.server_optimizer": "momentum",
    "federation.keep_attempts": 9,
    "federation.join_timeout": 30.0,
    "federation.round_timeout": 30.0,
    "training.local_steps": 1,
    "training.batch_size": 4,
    "sampling.steps": 1,
    "evaluation.every": 0,
    "evaluation.samples": 6,
    "evaluation.ssim_images": 0,
}
WAIT = {"federation.on_missing": "wait"}
SOON = 1.5
"""A join_timeout: long enough for a client that is there, short for one that is not."""
ALL = frozenset({1, 2, 3})
CLIENTS = ["digit-0", "digit-1", "digit-2"]
MIDDLE = 1
"""Position of the client that fails; of those at nodes 1, 2, 3 it is the one at node 2."""


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("srfed.federation.flower.roster.POLL_SECONDS", 0.01)
    monkeypatch.setattr("srfed.federation.flower.exchange.LONGEST_PAUSE", 0.05)


class ChangingGrid(InlineGrid):
    """Nodes that come and go; a message to one that has gone is answered as a SuperLink answers it.

    Args:
        run: the run; its last checkpoint says how far it is.
        app: what every node runs.
        connected: the nodes that are connected after the last finished round, 0 before the first.
    """

    def __init__(
        self,
        run: RunFolder,
        app: ClientApp = real_app,
        connected: Callable[[int], Collection[int]] = lambda _: ALL,
    ) -> None:
        super().__init__(app, 3, run.clients)
        self._server = run.server
        self._connected = connected
        self.requests: list[Message] = []

    def add_node(self, node: int, index: int) -> None:
        """A node that runs the client of a task, whether another one does so or not."""
        config = {**self._contexts[1].node_config, "partition-id": index}
        self._contexts[node] = Context(0, node, config, RecordDict(), {})

    def get_node_ids(self) -> list[int]:
        finished = max(
            (int(path.name.removeprefix("round-")) for path in self._server.glob("round-*")),
            default=0,
        )
        return [node for node in self._contexts if node in self._connected(finished)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        self.requests += listed
        return super().push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted, here = set(message_ids), self.get_node_ids()
        for message_id, message in list(self._waiting.items()):
            if message_id in wanted and message.metadata.dst_node_id not in here:
                del self._waiting[message_id]
                return [
                    Message(
                        Error(ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable"),
                        reply_to=message,
                    )
                ]
        return super().pull_messages(wanted)

    def nodes_asked(self, kind: str, *rounds: int) -> list[int]:
        """The nodes that got requests of this kind, of these rounds or of any."""
        return [
            message.metadata.dst_node_id
            for message in self.requests
            if message.metadata.message_type == kind
            and (not rounds or int(message.metadata.group_id) in rounds)
        ]


class ErrorGrid(ChangingGrid):
    """What the client of node 2 has done is lost: errors, in turn, take the place of its
    replies.
    """

    def __init__(self, run: RunFolder, errors: dict[tuple[str, int], list[int]]) -> None:
        super().__init__(run)
        self._errors = errors

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        left = self._errors.get(
            (message.metadata.message_type, int(message.metadata.group_id or 0)), []
        )
        if message.metadata.dst_node_id == 2 and left:
            return Message(Error(left.pop(0), "Error: something\nwent wrong"), reply_to=message)
        return reply


def away_for(
    looks: int, *, after: int, node: int = 3, back_as: int = 3
) -> Callable[[int], Collection[int]]:
    """A node that leaves after some round, and is back when the server has looked so many times."""
    left = [looks]

    def connected(finished: int) -> Collection[int]:
        if finished < after:
            return ALL
        left[0] -= 1
        return (ALL - {node}) | ({back_as} if left[0] < 0 else set())

    return connected


def start(run: RunFolder, grid: InlineGrid | None = None) -> RunFolder:
    """The whole run on a grid, where further clients may come: nothing is fixed."""
    run_federation(grid or ChangingGrid(run), run)
    return run


def reconfigured(run: RunFolder, changes: dict[str, Any]) -> RunFolder:
    return RunFolder.open(run.path).reconfigure(tiny_config({**SETTINGS, **changes}))


def copy_of(run: RunFolder, path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run.path, path)))


def failure(call: Callable[[], Any]) -> str:
    """The one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keep(reply: Message) -> None:
    """A reply as it is."""


def failing_in(*rounds: int) -> Faults:
    return [fail if number in rounds else keep for number in range(1, ROUNDS + 1)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return start(begin(tmp_path_factory.mktemp("undisturbed") / "run", SETTINGS))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A run in which a client, by its position, is there but fails in some rounds."""

    @cache
    def failed(index: int, *rounds: int) -> RunFolder:
        run = begin(tmp_path_factory.mktemp("without") / "run", SETTINGS)
        return start(run, ChangingGrid(run, app_with(index, train=failing_in(*rounds))))

    return failed


# --- Coming late, and leaving --------------------------------------------------------------------


def test_a_client_that_joins_late_begins_as_one_that_has_failed_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        **SETTINGS,
        "evaluation.every": 2,
        "evaluation.samples_between": 6,
        "federation.join_timeout": SOON,
    }
    late = begin(tmp_path / "late", settings)
    start(late, ChangingGrid(late, connected=lambda finished: ALL if finished else {1, 2}))
    err = capsys.readouterr().err
    assert err.count("digit-2 joins with 16 images") == 1
    absent = begin(tmp_path / "absent", settings)
    start(absent, ChangingGrid(absent, app_with(2, train=failing_in(1))))
    assert "joins" not in capsys.readouterr().err

    assert all_bits(late) == all_bits(absent)
    assert [line["accepted"] for line in round_lines(late)] == [CLIENTS[:2], CLIENTS, CLIENTS]
    assert [line["missing"] for line in round_lines(late)] == [{}, {}, {}]
    kinds = [
        [line for line in records(run) if line["kind"] == "evaluation"] for run in (late, absent)
    ]
    assert kinds[0] == kinds[1]
    assert sorted(kinds[0][0]["score_by_client"]) == CLIENTS
    tasks = [
        [task["client"] for task in line["tasks"]]
        for line in records(late)
        if line["kind"] == "tasks"
    ]
    assert tasks == [CLIENTS[:2], CLIENTS]
    assert MetricsLog(late.metrics).tasks() == MetricsLog(absent.metrics).tasks()
    attempts = [
        read_manifest(path)
        for path in (late.clients / "digit-2" / "lineages" / late.lineage).iterdir()
    ]
    assert {manifest["round"]: manifest["parent"] == NO_PARENT for manifest in attempts} == {
        2: True,
        3: False,
    }


def test_a_client_that_leaves_is_missed_and_the_others_go_on(
    tmp_path: Path, without: Callable[..., RunFolder]
) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    start(run, ChangingGrid(run, connected=lambda finished: {1, 2} if finished else ALL))
    gone = {"digit-2": "not connected"}
    assert [line["missing"] for line in round_lines(run)] == [{}, gone, gone]
    assert [line["accepted"] for line in round_lines(run)] == [CLIENTS, CLIENTS[:2], CLIENTS[:2]]
    assert [line["refused"] for line in round_lines(run)] == [{}, {}, {}]
    (evaluation,) = MetricsLog(run.metrics).evaluations()
    assert evaluation["missing"] == gone
    # Two from each that is there: whoever is away, nobody is asked for more.
    assert (evaluation["samples"], sorted(evaluation["score_by_client"])) == (4, CLIENTS[:2])
    assert all_bits(run) == all_bits(without(2, 2, 3))
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    for client, expected in (("digit-1", {1: 1, 2: 1, 3: 1}), ("digit-2", {1: 1, 2: 0, 3: 0})):
        assert {
            event.step: event.value for event in events.Scalars(f"took_part/{client}")
        } == expected


def test_too_few_clients_before_a_round_are_waited_for(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, "federation.min_clients": 3})
    start(run, ChangingGrid(run, connected=away_for(10, after=1)))
    assert all_bits(run) == all_bits(undisturbed)


def test_too_few_clients_before_a_round_stop_the_run_when_the_time_is_up(tmp_path: Path) -> None:
    run = begin(
        tmp_path / "run", {**SETTINGS, "federation.min_clients": 3, "federation.join_timeout": SOON}
    )
    grid = ChangingGrid(run, connected=lambda finished: {1, 2} if finished else ALL)
    text = failure(lambda: start(run, grid))
    assert "2 of 3 clients can take part after at most 1.5 s" in text
    assert server_bits(run)["round"] == 1
    assert not grid.nodes_asked(TRAIN, 2)


# --- Waiting for those that fail -----------------------------------------------------------------


def same_but_for_traffic(run: RunFolder, reference: RunFolder, last: int = 0) -> bool:
    """Whether two runs' records, all or the last ones, are equal but for the size of the
    messages.
    """
    free = {"bytes_up", "bytes_down"}
    kept = [
        [
            {key: value for key, value in line.items() if key not in free}
            for line in records(one)[-last:]
        ]
        for one in (run, reference)
    ]
    return kept[0] == kept[1]


def test_a_handler_that_raises_is_asked_again_until_it_does_not(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = ChangingGrid(run, app_with(MIDDLE, train=[keep, fail, fail], evaluate=[fail]))
    start(run, grid)
    notices = [line for line in capsys.readouterr().err.splitlines() if "asking it again" in line]
    clients = [notice.split(": it failed")[0] for notice in notices]
    assert clients == ["round 2: digit-1"] * 2 + ["evaluation 3: digit-1"]
    assert grid.nodes_asked(TRAIN, 2) == [1, 2, 3, 2, 2]
    assert all_bits(run) == all_bits(undisturbed)
    assert same_but_for_traffic(run, undisturbed)
    traffic = [[line["bytes_down"] for line in round_lines(one)] for one in (run, undisturbed)]
    assert traffic[0][1] / traffic[1][1] == pytest.approx(5 / 3, rel=0.01), (
        "repeated messages are counted"
    )


def test_a_client_whose_work_is_lost_is_asked_again(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, crashed = ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    start(
        run,
        ErrorGrid(run, {(TRAIN, 1): [gone], (TRAIN, 2): [crashed, gone], (EVALUATE, 3): [crashed]}),
    )
    notices = [line for line in capsys.readouterr().err.splitlines() if "asking it again" in line]
    assert notices == [
        f"{what}: digit-1: it failed: Flower's error {code}, Error: something went wrong; asking "
        "it again"
        for what, code in (
            ("round 1", gone),
            ("round 2", crashed),
            ("round 2", gone),
            ("evaluation 3", crashed),
        )
    ]
    assert all_bits(run) == all_bits(undisturbed)
    assert same_but_for_traffic(run, undisturbed)
    assert len(list((run.clients / "digit-1" / "lineages" / run.lineage).iterdir())) == 6, (
        "attempts that nobody refers to"
    )


class MovingGrid(ChangingGrid):
    """Node 3 disappears with the request of round 2, and its client comes back at node 7."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run, connected=lambda _: self._here)
        self.add_node(7, 2)
        self._here: Collection[int] = ALL
        self._looks = 0

    def get_node_ids(self) -> list[int]:
        if 3 in self.nodes_asked(TRAIN, 2):
            self._looks += 1
            self._here = {1, 2} if self._looks < 10 else {1, 2, 7}
        return super().get_node_ids()


def test_a_client_that_comes_back_at_another_node_goes_on_from_there(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = MovingGrid(run)
    start(run, grid)
    # A busy machine may ask node 3 once more before it looks who is connected.
    assert sorted(set(grid.nodes_asked(TRAIN, 2))) == [1, 2, 3, 7]
    assert sorted(grid.nodes_asked(TRAIN, 3)) == sorted(grid.nodes_asked(EVALUATE)) == [1, 2, 7]
    err = capsys.readouterr().err
    assert "round 2: digit-2: it failed: Flower's error 5, Error: Node Unavailable" in err
    assert "joins" not in err, "it is no new client"
    assert all_bits(run) == all_bits(undisturbed)


def test_a_client_that_is_away_before_a_round_is_asked_when_it_is_back(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = ChangingGrid(run, connected=away_for(10, after=1, back_as=9))
    grid.add_node(9, 2)
    start(run, grid)
    assert grid.nodes_asked(TRAIN, 2) == [1, 2, 9]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.fixture(scope="module")
def given_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run that stopped in round 2, as one client had but failed until the time was up; and what
    it said.
    """
    run = begin(
        tmp_path_factory.mktemp("given_up") / "run",
        {**SETTINGS, **WAIT, "federation.round_timeout": 2.0},
    )
    app = app_with(MIDDLE, train=[keep, *[fail] * 999])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srfed.federation.flower.exchange.LONGEST_PAUSE", 0.2)
        return run, failure(lambda: start(run, ChangingGrid(run, app)))


def test_a_client_that_only_fails_stops_the_run_in_one_line(
    given_up: tuple[RunFolder, str],
) -> None:
    run, text = given_up
    assert text.startswith("round 2 has waited 2 s for digit-1: it failed: Flower's error 2, ")
    assert "digit-0" not in text
    assert "digit-2" not in text
    assert server_bits(run)["round"] == 1
    assert [line["round"] for line in round_lines(run)] == [1]


def test_once_it_is_mended_the_run_goes_on_with_the_bits_of_an_undisturbed_one(
    given_up: tuple[RunFolder, str], undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = start(copy_of(given_up[0], tmp_path / "run"))
    assert all_bits(run) == all_bits(undisturbed)
    assert same_but_for_traffic(run, undisturbed)


def test_under_skip_the_run_goes_on_without_it(
    given_up: tuple[RunFolder, str], without: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = reconfigured(copy_of(given_up[0], tmp_path / "run"), {"federation.on_missing": "skip"})
    start(run, ChangingGrid(run, app_with(MIDDLE, train=[fail] * 9)))
    assert [list(line["refused"]) for line in round_lines(run)] == [[], ["digit-1"], ["digit-1"]]
    assert all_bits(run) == all_bits(without(MIDDLE, 2, 3))


# --- Skipping those that fail --------------------------------------------------------------------

GONE = [
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
]
FAULTY = [
    ErrorCode.UNKNOWN,
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION,
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
    ErrorCode.MOD_FAILED_PRECONDITION,
    ErrorCode.INVALID_FAB,
    FAILED,
]


def test_flowers_errors_tell_a_client_that_is_gone_from_one_that_failed(tmp_path: Path) -> None:
    codes = [*GONE, *FAULTY]
    settings = {**SETTINGS, "federation.rounds": len(codes) + 1, "evaluation.every": 0}
    run = begin(tmp_path / "run", settings)
    errors: dict[tuple[str, int], list[int]] = {
        (TRAIN, number): [code] for number, code in enumerate(codes, 1)
    }
    start(run, ErrorGrid(run, {**errors, (EVALUATE, len(codes) + 1): [ErrorCode.NODE_UNAVAILABLE]}))
    lines = round_lines(run)
    for line, code in zip(lines, codes, strict=False):
        reason = f"it failed: Flower's error {code}, Error: something went wrong"
        if code == FAILED:
            reason = "it failed; the reason is in the client's own log"
        absent = {"digit-1": reason}
        assert (line["missing"], line["refused"]) == (
            (absent, {}) if code in GONE else ({}, absent)
        ), code
        assert line["accepted"] == ["digit-0", "digit-2"]
    assert lines[-1]["accepted"] == CLIENTS
    (evaluation,) = MetricsLog(run.metrics).evaluations()
    assert list(evaluation["missing"]) == ["digit-1"]
    assert evaluation["refused"] == {}


class UntakenGrid(ChangingGrid):
    """A SuperLink that no longer takes messages to node 3 in round 2, though it has just named that
    node.

    Args:
        run: the run.
        answer: what stands in the place of the message's id. A SuperLink answers "", and an error
            when that is asked for; Ray's backend, and a SuperLink to which the message is too
            large, answer nothing.
    """

    def __init__(self, run: RunFolder, answer: list[Any]) -> None:
        super().__init__(run, connected=lambda _: self._here)
        self._here: Collection[int] = ALL
        self._answer = answer

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        if any(m.metadata.dst_node_id == 3 and m.metadata.group_id == "2" for m in listed):
            self._here = {1, 2}
            return self._answer
        return super().push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        if "" in wanted:
            error = Message(
                Error(ErrorCode.MESSAGE_UNAVAILABLE, "Error: Message Unavailable"),
                reply_to=self.requests[0],
            )
            error.metadata.__dict__["_reply_to_message_id"] = ""
            return [error]
        return super().pull_messages(wanted)


@pytest.mark.parametrize("answer", [[""], []], ids=str)
def test_a_client_to_which_no_message_can_be_sent_is_missing_and_nobody_waits_for_it(
    tmp_path: Path, without: Callable[..., RunFolder], answer: list[Any]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, "federation.round_timeout": 3.0})
    start(run, UntakenGrid(run, answer))
    line = round_lines(run)[1]
    assert line["accepted"] == CLIENTS[:2]
    assert list(line["missing"]) == ["digit-2"]
    assert line["seconds"] < 2.5
    assert all_bits(run) == all_bits(without(2, 2, 3))


# --- Resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three clients that ended after its first round."""
    return start(
        begin(tmp_path_factory.mktemp("half") / "run", {**SETTINGS, "federation.rounds": 1})
    )


def resume(half: RunFolder, path: Path, changes: dict[str, Any]) -> RunFolder:
    return reconfigured(copy_of(half, path), changes)


@pytest.mark.parametrize("on_missing", ["wait", "skip"])
def test_a_resumed_run_waits_for_the_clients_that_it_had(
    half: RunFolder, undisturbed: RunFolder, tmp_path: Path, on_missing: str
) -> None:
    run = resume(
        half,
        tmp_path / "run",
        {"federation.on_missing": on_missing, "federation.join_timeout": 60.0},
    )
    start(run, ChangingGrid(run, connected=away_for(10, after=1)))
    assert all_bits(run) == all_bits(undisturbed)
    assert same_but_for_traffic(run, undisturbed, last=1)


def test_under_wait_a_run_does_not_go_on_without_a_client_that_it_had(
    half: RunFolder, tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {**WAIT, "federation.join_timeout": SOON})
    grid = ChangingGrid(run, connected=lambda _: {1, 2})
    assert "2 of 3 clients can take part after at most 1.5 s" in failure(lambda: start(run, grid))
    assert server_bits(run) == server_bits(half)
    assert grid.nodes_asked(TRAIN) == []


def test_under_skip_a_run_goes_on_without_it_when_the_time_is_up(
    half: RunFolder, without: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {"federation.join_timeout": SOON})
    start(run, ChangingGrid(run, connected=lambda _: {1, 2}))
    assert [line["missing"] for line in round_lines(run)[1:]] == [{"digit-2": "not connected"}] * 2
    assert all_bits(run) == all_bits(without(2, 2, 3))
    assert [task.client for task in MetricsLog(run.metrics).tasks()] == CLIENTS


def test_a_resumed_run_does_not_wait_for_a_client_that_it_never_had(tmp_path: Path) -> None:
    changes = {"federation.rounds": 1, "federation.join_timeout": SOON}
    run = begin(tmp_path / "run", {**SETTINGS, **changes})
    start(run, ChangingGrid(run, connected=lambda _: {1, 3}))
    assert [line["accepted"] for line in round_lines(run)] == [["digit-0", "digit-2"]]
    assert round_lines(run)[0]["missing"] == {}
    run = reconfigured(run, {"federation.rounds": 2, "federation.join_timeout": 30.0})
    began = time.monotonic()
    start(run, ChangingGrid(run, connected=lambda _: {1, 3}))
    assert time.monotonic() - began < 25
    assert [line["accepted"] for line in round_lines(run)] == [["digit-0", "digit-2"]] * 2


# --- Impostors and misfits -----------------------------------------------------------------------


def app_describing(change: Callable[[int, Message], None], app: ClientApp = real_app) -> ClientApp:
    """An app that says something else of itself: its reply is changed in place, by its node's
    number.
    """

    class Describing(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = app(message, context)
            if message.metadata.message_type == DESCRIBE:
                change(context.node_id, reply)
            return reply

    return Describing()


def test_a_second_node_of_a_client_is_refused_until_the_first_has_gone(
    tmp_path: Path,
    undisturbed: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.0)
    run = begin(tmp_path / "run", SETTINGS)
    grid = ChangingGrid(
        run, connected=lambda finished: {2, 3, 9} if finished == 2 else {1, 2, 3, 9}
    )
    grid.add_node(9, 0)
    start(run, grid)
    assert (
        capsys.readouterr().err.count("refused node 9: another node is client 'digit-0' already")
        == 1
    )
    assert [sorted(grid.nodes_asked(TRAIN, number)) for number in (1, 2, 3)] == [
        [1, 2, 3],
        [1, 2, 3],
        [2, 3, 9],
    ]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.parametrize("insists", [True, False])
def test_a_node_that_answers_as_another_client_is_refused_and_asked_again_who_it_is(
    tmp_path: Path,
    without: Callable[..., RunFolder],
    capsys: pytest.CaptureFixture[str],
    insists: bool,
) -> None:
    """It may be that two machines have been mixed up for good, or only for a moment."""
    run = begin(tmp_path / "run", SETTINGS)

    def change(node: int, reply: Message) -> None:
        if insists and node == 2 and round_lines(run):
            reply.content.config_records[REPLY]["client"] = "digit-0"

    app = app_with(MIDDLE, train=[keep, set_field("client", "digit-0"), keep])
    grid = ChangingGrid(run, app_describing(change, app))
    start(run, grid)
    second, third = round_lines(run)[1:]
    assert "answers as 'digit-0'" in second["refused"]["digit-1"]
    assert grid.nodes_asked(DESCRIBE).count(2) == 2
    assert grid.nodes_asked(DESCRIBE).count(1) == grid.nodes_asked(DESCRIBE).count(3) == 1
    told = "refused node 2: another node is client 'digit-0' already" in capsys.readouterr().err
    if insists:
        assert told
        assert third["missing"] == {"digit-1": "not connected"}
        assert 2 not in grid.nodes_asked(TRAIN, 3)
        assert all_bits(run) == all_bits(without(MIDDLE, 2, 3))
    else:
        assert not told
        assert third["accepted"] == CLIENTS
        assert all_bits(run) == all_bits(without(MIDDLE, 2))


MISFITS: dict[int, tuple[str, Any, str]] = {
    4: ("version", "0.0.1", "client 'digit-3': it runs srfed '0.0.1'"),
    5: ("height", 9, "client 'digit-4': its images are 9x8x1, this run's are 8x8x1"),
    6: ("partition", "0" * 64, "client 'digit-5': it divides the model differently"),
    7: ("client", "../digit-6", "node 7: '../digit-6' is no name for a store"),
    8: ("images", "many", "node 8: it describes itself in another way"),
    9: ("client", "clinic", "client 'clinic': the server's reference images have no such task"),
}


def test_clients_that_do_not_fit_are_refused_one_by_one_and_the_others_run(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(node: int, reply: Message) -> None:
        if node in MISFITS:
            name, value, _ = MISFITS[node]
            reply.content.config_records[REPLY][name] = value

    run = begin(tmp_path / "run", SETTINGS)
    grid = ChangingGrid(run, app_describing(change), connected=lambda _: [*range(1, 10)])
    for node in MISFITS:
        grid.add_node(node, node - 1)
    start(run, grid)
    err = capsys.readouterr().err
    assert [err.count(f"refused {reason}") for _, _, reason in MISFITS.values()] == [1] * len(
        MISFITS
    )
    assert set(grid.nodes_asked(TRAIN)) | set(grid.nodes_asked(EVALUATE)) == ALL
    assert all_bits(run) == all_bits(undisturbed)
    assert records(run) == records(undisturbed)


def test_a_misfit_that_is_mended_takes_part(
    tmp_path: Path, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.3)
    asked: list[float] = []

    def change(node: int, reply: Message) -> None:
        if node == 2:
            asked.append(time.monotonic())
            if len(asked) < 3:
                reply.content.config_records[REPLY]["version"] = "0.0.1"

    run = begin(tmp_path / "run", SETTINGS)
    start(run, ChangingGrid(run, app_describing(change)))
    assert np.diff(asked).min() >= 0.3
    assert len(asked) == 3
    assert all_bits(run) == all_bits(undisturbed)


# --- Keys ----------------------------------------------------------------------------------------

RIGHTFUL, IMPOSTOR = 1, 9
AT = "2026-01-01T00:00:00+00:00"
LATER = "2026-01-01T00:01:00+00:00"


class KeyedGrid(ChangingGrid):
    """Nodes with public keys, as a SuperLink tells them; node 9 comes as the first client too.

    Args:
        run: the run.
        connected: as for any changing grid.
        activated: when nodes connected; they were registered at ``AT``.
        keys: of the nodes, where not each has its own.
    """

    def __init__(
        self,
        run: RunFolder,
        connected: Callable[[int], Collection[int]] = lambda _: {1, 2, 3, IMPOSTOR},
        activated: str = LATER,
        keys: dict[int, bytes] | None = None,
        app: ClientApp = real_app,
    ) -> None:
        super().__init__(run, app, connected)
        self.add_node(IMPOSTOR, 0)
        self._activated = activated
        self._keys = keys or {}

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(
                node_id=node,
                public_key=self._keys.get(node, b"key %d" % node),
                registered_at=AT,
                last_activated_at=self._activated,
            )
            for node in self.get_node_ids()
        ]


def impostor_while_away(looks: int) -> Callable[[int], Collection[int]]:
    """After round 1 the rightful node is away for some looks, and another one that says it is that
    client is there.
    """
    return away_then_back(looks, {2, 3, IMPOSTOR}, {1, 2, 3, IMPOSTOR})


def away_then_back(
    looks: int, meanwhile: Collection[int], afterwards: Collection[int]
) -> Callable[[int], Any]:
    left = [looks]

    def connected(finished: int) -> Collection[int]:
        if not finished:
            return ALL
        left[0] -= 1
        return meanwhile if left[0] >= 0 else afterwards

    return connected


@pytest.fixture
def asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.0)


@pytest.mark.usefixtures("asked_at_once")
def test_a_client_id_belongs_to_the_key_that_first_held_it(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = KeyedGrid(run, impostor_while_away(20))
    start(run, grid)
    notice = f"refused node {IMPOSTOR}: client 'digit-0' belongs to another SuperNode key, SHA256:"
    assert capsys.readouterr().err.count(notice) == 1
    assert IMPOSTOR not in {*grid.nodes_asked(TRAIN), *grid.nodes_asked(EVALUATE)}
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_where_nodes_make_their_own_keys_a_client_may_come_back_with_another(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    """A SuperNode without authentication has a new key in each process; that must not lock its
    owner out.
    """
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = KeyedGrid(run, impostor_while_away(20), activated=AT)
    start(run, grid)
    assert sorted(grid.nodes_asked(TRAIN, 3)) == [2, 3, IMPOSTOR]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_a_key_keeps_its_id_at_another_node_and_takes_it_back_from_nobody(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    """A SuperLink that has lost its database gives the same key another node."""
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    connected = away_then_back(20, {2, 3}, {2, 3, IMPOSTOR})
    grid = KeyedGrid(run, connected, keys={IMPOSTOR: b"key 1"})
    start(run, grid)
    assert sorted(grid.nodes_asked(TRAIN, 3)) == [2, 3, IMPOSTOR]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_the_key_is_remembered_beyond_the_server_until_the_run_is_told_to_forget_it(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT, "federation.rounds": 1})
    start(run, KeyedGrid(run, lambda _: ALL))
    run = reconfigured(run, {**WAIT, "federation.join_timeout": SOON})
    moved = partial(KeyedGrid, connected=lambda _: {2, 3, IMPOSTOR})
    text = failure(lambda: start(run, moved(run)))
    assert f"node {IMPOSTOR}: client 'digit-0' belongs to another SuperNode key" in text
    shown = sites_in_words(run.path, None)
    assert key_fingerprint(b"key 1") in shown
    assert "evaluation 1" in shown
    with pytest.raises(
        UserError, match="knows no client 'digit-9'; it has digit-0, digit-1, digit-2"
    ):
        rebind(run.path, "digit-9")
    assert key_fingerprint(b"key 1") in rebind(run.path, "digit-0")
    start(run, moved(run))
    assert all_bits(run) == all_bits(undisturbed)
    assert key_fingerprint(b"key %d" % IMPOSTOR) in sites_in_words(run.path, None)


@pytest.mark.usefixtures("asked_at_once")
def test_a_roster_says_whose_the_ids_are(tmp_path: Path, undisturbed: RunFolder) -> None:
    """Also where the impostor is the first to come."""
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    keys = {f"digit-{index}": key_fingerprint(b"key %d" % (index + 1)) for index in range(3)}
    write_json(run.path / ROSTER_FILE, {"keys": keys})
    looks = [0]

    def connected(_: int) -> Collection[int]:
        looks[0] += 1
        return {2, 3, IMPOSTOR} if looks[0] < 20 else {1, 2, 3, IMPOSTOR}

    grid = KeyedGrid(run, connected)
    start(run, grid)
    assert IMPOSTOR not in {*grid.nodes_asked(TRAIN), *grid.nodes_asked(EVALUATE)}
    assert all_bits(run) == all_bits(undisturbed)


def test_who_is_not_in_the_roster_does_not_take_part(tmp_path: Path) -> None:
    run = begin(
        tmp_path / "run", {**SETTINGS, "federation.join_timeout": SOON, "federation.min_clients": 3}
    )
    keys = {f"digit-{index}": key_fingerprint(b"key %d" % (index + 1)) for index in range(2)}
    write_json(run.path / ROSTER_FILE, {"keys": keys})
    text = failure(lambda: start(run, KeyedGrid(run, lambda _: ALL)))
    assert "2 of 3 clients can take part" in text
    assert "client 'digit-2' is not in the run's roster" in text


def test_a_roster_file_is_read_as_public_keys_or_refused_in_one_line(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["a", "b"])
    lines = {site: (tmp_path / f"site-{site}.pub").read_text().strip() for site in "ab"}
    file = tmp_path / "roster.yaml"
    file.write_text(f"clinic-a: {lines['a']}\nclinic-b: {lines['b']}\n")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "site-a.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert read_roster(file)["clinic-a"] in printed
    for text, expected in (
        ("clinic-a: nothing", "clinic-a: this is no public key"),
        (f"a: {lines['a']}\nb: {lines['a']}", "has the key of another client"),
        ("just words", "is no roster"),
        ("a: [", "is not valid YAML"),
    ):
        file.write_text(text)
        assert expected in failure(lambda: read_roster(file))
    assert "cannot read" in failure(lambda: read_roster(tmp_path / "none.yaml"))


def test_a_run_keeps_the_roster_that_it_is_given(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["a"])
    file = tmp_path / "roster.yaml"
    file.write_text(f"clinic-a: {(tmp_path / 'site-a.pub').read_text()}")
    values = {"run-dir": str(tmp_path / "run"), "config": "", "set": ""}
    for roster in (str(file), ""):  # named once
        context = Context(0, 0, {}, RecordDict(), {**values, "roster": roster})
        assert kept_roster(begin_or_go_on(context).path) == {
            "clinic-a": read_key(tmp_path / "site-a.pub")
        }


def test_a_client_that_was_refused_meanwhile_can_be_doubted(tmp_path: Path) -> None:
    """It was asked to train, asked who it is, refused, and only then answered as somebody else."""
    run = begin(tmp_path / "run", SETTINGS)
    expected = Expected((8, 8, 1), "", None)
    roster = Roster(
        ChangingGrid(run),
        run.config,
        run.lineage,
        expected,
        lambda _member: None,
        lambda _text: None,
    )
    roster.recheck("digit-0")
    assert roster.present == []


def test_a_client_that_comes_back_with_other_images_is_refused_until_the_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of its images is its weight, and the length of its round: nobody changes it in
    between.
    """
    run = begin(tmp_path / "run", {**SETTINGS, "federation.rounds": 1})
    start(run)

    def change(node: int, reply: Message) -> None:
        if node == 2:
            reply.content.config_records[REPLY]["images"] = 10**9

    run = reconfigured(run, {"federation.rounds": 2, "federation.join_timeout": SOON})
    start(run, ChangingGrid(run, app_describing(change)))
    assert "client 'digit-1': it has 1000000000 training and" in capsys.readouterr().err
    assert round_lines(run)[1]["accepted"] == ["digit-0", "digit-2"]


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(
    half: RunFolder, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {})
    file = run.server / "round-00001" / "manifest.json"
    manifest = {
        name: value
        for name, value in json.loads(file.read_text()).items()
        if name not in NEW_IN_MANIFEST
    }
    file.write_text(json.dumps({**manifest, "usual_norm": 0.5}))
    start(run)
    assert all_bits(run) == all_bits(undisturbed)


def test_a_manifest_without_a_key_is_a_sentence(half: RunFolder, tmp_path: Path) -> None:
    run = resume(half, tmp_path / "run", {})
    file = run.server / "round-00001" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["attempts"]
    file.write_text(json.dumps(manifest))
    assert "round-00001/manifest.json is damaged: it has no 'attempts'" in failure(
        lambda: start(run)
    )


NEW_IN_MANIFEST = {"known", "minibatches"}

# --- Updates of an implausible size --------------------------------------------------------------


def answering(change: Callable[[int, Tensors, Tensors], Tensors], index: int = MIDDLE) -> ClientApp:
    """A client that answers another φ than it has trained: of the round, the φ received, and the φ
    trained.
    """

    class Answering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = real_app(message, context)
            if (
                message.metadata.message_type == TRAIN
                and context.node_config["partition-id"] == index
            ):
                before, after = (read_tensors(one.content, SHARED) for one in (message, reply))
                reply.content[SHARED] = array_record(
                    change(int(message.metadata.group_id), before, after)
                )
            return reply

    return Answering()


def enlarging(factors: dict[int, float]) -> ClientApp:
    """The middle client's updates, in some rounds, are so many times as large as they should be."""

    def change(number: int, before: Tensors, after: Tensors) -> Tensors:
        factor = factors.get(number, 1.0)
        return (
            {name: before[name] + factor * (after[name] - before[name]) for name in before}
            if factor != 1
            else after
        )

    return answering(change)


def norm(before: Tensors, after: Tensors) -> float:
    return (
        sum(float((after[name] - before[name]).double().square().sum()) for name in before) ** 0.5
    )


def test_an_update_beyond_what_adam_can_move_is_refused_and_leaves_no_trace(
    tmp_path: Path, without: Callable[..., RunFolder]
) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    start(run, ChangingGrid(run, enlarging({2: 1000.0})))
    refused = round_lines(run)[1]["refused"]
    assert list(refused) == ["digit-1"]
    assert "is the most that a round can move φ" in refused["digit-1"]
    assert all_bits(run) == all_bits(without(MIDDLE, 2))


def test_a_client_that_is_alone_in_its_round_is_held_to_the_same(
    half: RunFolder, tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {"federation.join_timeout": SOON})
    text = failure(
        lambda: start(run, ChangingGrid(run, enlarging({2: 1000.0}), connected=lambda _: {2}))
    )
    assert "digit-1: its update has norm" in text
    assert "round 2 has 0 accepted updates" in text
    assert server_bits(run)["round"] == 1


def test_an_update_longer_than_one_rate_a_step_is_shortened_to_that_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[float] = []
    values: list[int] = []

    def change(number: int, before: Tensors, after: Tensors) -> Tensors:
        longer = {name: before[name] + 8 * (after[name] - before[name]) for name in before}
        sent.append(norm(before, longer))
        values.append(sum(tensor.numel() for tensor in before.values()))
        return longer

    alone = {
        "federation.clients": 1,
        "federation.rounds": 1,
        "federation.server_optimizer": "average",
    }
    run = begin(tmp_path / "run", {**SETTINGS, **alone})
    start(run, InlineGrid(answering(change, 0), 1, run.clients))
    line = round_lines(run)[0]
    limit = run.config.training.learning_rate * values[0] ** 0.5
    assert sent[0] > 2 * limit
    assert line["update_norm"] == pytest.approx(limit, rel=2e-3)
    assert line["shortened"]["digit-0"] == pytest.approx(limit / sent[0], rel=2e-3)
    assert "round 1: digit-0: its update is" in capsys.readouterr().err


def test_beside_an_owner_who_returns_what_it_got_the_other_is_accepted_every_round(
    tmp_path: Path,
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, "federation.clients": 2})
    start(run, InlineGrid(answering(lambda _number, before, _after: before), 2, run.clients))
    assert [line["accepted"] for line in round_lines(run)] == [CLIENTS[:2]] * ROUNDS
    assert [line["shortened"] for line in round_lines(run)] == [{}] * ROUNDS


@pytest.mark.parametrize(("clip", "accepted"), [(1.0, ["digit-0", "digit-2"]), (None, CLIENTS)])
def test_plain_sgd_is_bounded_by_its_clipping_alone(
    tmp_path: Path, clip: float | None, accepted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "training.optimizer": "sgd",
        "training.learning_rate": 0.1,
        "training.gradient_clip": clip,
    }
    run = begin(tmp_path / "run", {**SETTINGS, **changes, "federation.rounds": 1})
    start(run, ChangingGrid(run, enlarging({1: 1000.0})))
    assert round_lines(run)[0]["accepted"] == accepted
    assert ("updates have no bound" in capsys.readouterr().err) == (clip is None)


# --- Locks ---------------------------------------------------------------------------------------


def test_a_run_in_use_is_left_alone_until_its_process_ends(tiny_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "srfed",
        "simulate",
        "--config",
        str(tiny_yaml),
        "--run-dir",
        str(path),
    ]
    command += ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("round") for line in process.stdout)
            text = failure(lambda: start(RunFolder.open(path)))
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    assert text == f"{path} is in use by another process"
    run = RunFolder.open(path)
    done = len(round_lines(run))
    config = run.config
    last = config.model_copy(
        update={"federation": config.federation.model_copy(update={"rounds": done + 1})}
    )
    start(run.reconfigure(last))
    assert [line["round"] for line in round_lines(run)] == list(range(1, done + 2))


SAVER = """
import sys, time
from pathlib import Path
import torch
from srfed.storage.client_store import ClientStore
from srfed.training.local import ClientState
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = ClientStore(folder / "state", "client", "lineage", 2 * count)
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.001)
for number in range(1, count + 1):
    tensors = {"head.weight": torch.full((64, 64), float(number))}
    store.save(f"{name}-{number}", "none", number, ClientState(tensors, {}, {}, {}, number, number))
"""


def test_two_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    count = 40
    commands = [
        [sys.executable, "-c", SAVER, str(tmp_path), name, str(count)] for name in ("one", "two")
    ]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    store = ClientStore(tmp_path / "state", "client", "lineage", 2 * count)
    for name in ("one", "two"):
        for number in range(1, count + 1):
            assert store.load(f"{name}-{number}").steps == number
    assert len(list(store.folder.iterdir())) == 2 * count

"""Clients that fail, or are gone when they are asked, are waited for or skipped, and every bit is
right.
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from srfed.errors import UserError
from srfed.federation.messages import DESCRIBE, DIED, EVALUATE, FAILED, TRAIN
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.faults import app_with, fail
from support.membership import (
    ALL,
    MIDDLE,
    SETTINGS,
    WAIT,
    ChangingGrid,
    away_for,
    copy_of,
    failure,
    keep,
    reconfigured,
    same_but_for_traffic,
    start,
)
from support.tiny_run import CLIENTS, all_bits, begin, round_lines, server_bits

pytestmark = pytest.mark.usefixtures("without_pauses")


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


# --- Simulated clients whose process dies ---------------------------------------------------------


def test_a_client_whose_process_dies_is_asked_again(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    dead = {(DESCRIBE, 0): [DIED, DIED], (TRAIN, 2): [DIED, DIED], (EVALUATE, 3): [DIED]}
    start(run, ErrorGrid(run, dead))
    notices = [line for line in capsys.readouterr().err.splitlines() if "asking it again" in line]
    assert notices == [
        f"{what}: digit-1: its process died: Error: something went wrong; asking it again"
        for what in ("round 2", "round 2", "evaluation 3")
    ]
    assert all_bits(run) == all_bits(undisturbed)
    assert same_but_for_traffic(run, undisturbed)


def test_a_client_whose_process_dies_three_times_is_missing_or_ends_a_run_that_waits(
    tmp_path: Path,
) -> None:
    reason = "3 times its process died: Error: something went wrong"
    run = begin(tmp_path / "run", SETTINGS)
    start(run, ErrorGrid(run, {(TRAIN, 2): [DIED] * 3}))
    assert [line["missing"] for line in round_lines(run)] == [{}, {"digit-1": reason}, {}]
    waiting = begin(tmp_path / "waiting", {**SETTINGS, **WAIT})
    with pytest.raises(UserError, match=f"round 2: digit-1: {reason}"):
        start(waiting, ErrorGrid(waiting, {(TRAIN, 2): [DIED] * 3}))
    assert len(round_lines(waiting)) == 1


# --- Waiting for those that fail -----------------------------------------------------------------


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
    assert len(list((run.clients / "digit-1" / "lineages" / run.lineage).iterdir())) == 3, (
        "a question that is asked again leaves no attempt more"
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
    run = reconfigured(copy_of(given_up[0], tmp_path / "run"), {"federation.round_timeout": 60.0})
    start(run)
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

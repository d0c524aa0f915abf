"""Clients that come late, or leave, and runs that go on: who takes part, and that every bit is
right.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srfed.federation.messages import TRAIN
from srfed.storage.client_store import NO_PARENT
from srfed.storage.manifest import STATE_FILE, read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.faults import app_with
from support.membership import (
    ALL,
    SETTINGS,
    SOON,
    WAIT,
    ChangingGrid,
    away_for,
    failing_in,
    failure,
    reconfigured,
    resume,
    same_but_for_traffic,
    start,
)
from support.stores import edit_manifest, write_as_before
from support.tiny_run import CLIENTS, all_bits, begin, records, round_lines, server_bits

pytestmark = pytest.mark.usefixtures("without_pauses")


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


# --- Resuming ------------------------------------------------------------------------------------


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


NEW_IN_MANIFEST = {"known", "minibatches"}


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(
    half: RunFolder, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {})
    folder = run.server / "round-00001"
    edit_manifest(folder, lambda manifest: manifest.update(usual_norm=0.5))
    write_as_before(folder, 1, without=NEW_IN_MANIFEST)
    start(run)
    assert all_bits(run) == all_bits(undisturbed)


def test_a_manifest_without_a_key_is_a_sentence(half: RunFolder, tmp_path: Path) -> None:
    run = resume(half, tmp_path / "run", {})
    edit_manifest(run.server / "round-00001", lambda manifest: manifest.pop("attempts"))
    assert f"round-00001/{STATE_FILE} is damaged: it has no 'attempts'" in failure(
        lambda: start(run)
    )

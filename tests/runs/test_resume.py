"""Stopping, crashing and going on: the same bits as never having stopped."""

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from srfed import simulate
from srfed.errors import UserError
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.messages import Request
from srfed.federation.site import Site
from srfed.federation.worker import Worker
from srfed.reporting.curves import Curves
from srfed.storage.manifest import STATE_FILE, read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.errors import one_error_line
from support.tiny_run import (
    StoppingGrid,
    all_bits,
    begin,
    records,
    round_lines,
    run_in_process,
    run_on_grid,
    server_bits,
    stop_after_a_round,
)

ROUNDS = {
    "federation.rounds": 4,
    "federation.keep_attempts": 9,
    "evaluation.samples": 6,
    "evaluation.samples_between": 6,
}


def reopen(run: RunFolder) -> RunFolder:
    stop_requested.clear()
    return RunFolder.open(run.path)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.shared_moments": "keep", "federation.server_optimizer": "adam"},
        {"training.shared_moments": "reset", "federation.server_optimizer": "momentum"},
        {
            "federation.clients_per_round": 2,
            "training.update": "alternating",
            "federation.keep_attempts": 2,
        },
    ],
    ids=["keep-adam", "reset-momentum", "two-of-three-alternating"],
)
def test_a_stopped_and_resumed_run_ends_in_the_bits_of_an_unbroken_one(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**ROUNDS, **settings}
    whole = run_in_process(begin(tmp_path / "whole", settings))
    stopped = begin(tmp_path / "stopped", settings)
    with pytest.raises(StoppedError):
        run_on_grid(stopped, StoppingGrid)
    assert server_bits(stopped)["round"] == 2
    run_in_process(reopen(stopped))
    assert all_bits(stopped) == all_bits(whole)
    assert records(stopped) == records(whole)
    assert [line["round"] for line in round_lines(stopped)] == [1, 2, 3, 4]

    # The server crashed after the clients had stored round 4, and before that had not stored round
    # 3.
    for path in sorted(stopped.server.glob("round-*"))[-2:]:
        shutil.rmtree(path)
    run_in_process(reopen(stopped))
    assert all_bits(stopped) == all_bits(whole)
    assert records(stopped) == records(whole)


def test_a_killed_command_goes_on_with_the_same_bits(tiny_yaml: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "srfed",
        "simulate",
        "--config",
        str(tiny_yaml),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    command += ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]
    stop_after_a_round(command, signal.SIGKILL)
    run = RunFolder.open(tmp_path / "run")
    done = len(round_lines(run))
    assert simulate.main(["--resume", str(run.path), "--set", f"federation.rounds={done + 1}"]) == 0
    whole = run_in_process(
        begin(tmp_path / "whole", {"federation.rounds": done + 1, "evaluation.every": 0})
    )
    assert all_bits(run) == all_bits(whole)


def test_two_rounds_then_two_more_equal_four_at_once(tmp_path: Path) -> None:
    settings = {**ROUNDS, "evaluation.every": 0}
    whole = run_in_process(begin(tmp_path / "whole", settings))
    run = run_in_process(begin(tmp_path / "run", {**settings, "federation.rounds": 2}))
    assert [line["final"] for line in MetricsLog(run.metrics).evaluations()] == [True]
    run_in_process(reopen(run).reconfigure(whole.config))
    assert all_bits(run) == all_bits(whole)
    assert [line["round"] for line in round_lines(run)] == [1, 2, 3, 4]
    assert records(run)[-1] == records(whole)[-1]


def test_an_evaluation_lost_to_a_crash_is_made_up_for(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "evaluation"
    log.write_text("".join(lines[:-1]) + lines[-1][:40])
    run_in_process(RunFolder.open(folder))
    assert records(RunFolder.open(folder)) == records(finished_run)
    before = log.read_bytes()
    run_in_process(RunFolder.open(folder))
    assert log.read_bytes() == before, "a finished run has nothing to do"


# --- The commands' words about it ----------------------------------------------------------------


def test_a_truncated_checkpoint_is_named_with_what_to_do(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = copy / "server" / "round-00003"
    whole = (last / STATE_FILE).read_bytes()
    (last / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    go_on = ["--resume", str(copy), "--set", "federation.rounds=4"]
    text = one_error_line(capsys, go_on)
    assert f"remove {last} to go back to round 2" in text
    shutil.rmtree(last)
    assert simulate.main(go_on) == 0
    whole = run_in_process(begin(tmp_path / "whole", {"federation.rounds": 4}))
    assert all_bits(RunFolder.open(copy)) == all_bits(whole)
    assert [line["round"] for line in round_lines(RunFolder.open(copy))] == [1, 2, 3, 4]


@pytest.mark.parametrize("spoil", ["manifest", "bit"])
def test_a_checkpoint_damaged_in_another_way_is_refused_too(
    copy: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    last = copy / "server" / "round-00003"
    if spoil == "manifest":
        (last / STATE_FILE).write_bytes((last / STATE_FILE).read_bytes()[:99])
    else:
        data = bytearray((last / STATE_FILE).read_bytes())
        data[len(data) // 2] ^= 1
        (last / STATE_FILE).write_bytes(data)
    go_on = ["--resume", str(copy), "--set", "federation.rounds=4"]
    assert "go back to round 2" in one_error_line(capsys, go_on)


def test_a_lost_client_state_is_refused_by_the_client_and_never_started_afresh(copy: Path) -> None:
    run = RunFolder.open(copy)
    attempt = read_manifest(run.server / "round-00003")["attempts"]["digit-1"]
    shutil.rmtree(run.clients / "digit-1" / "lineages" / run.lineage / attempt)
    config = run.config
    longer = config.model_copy(
        update={"federation": config.federation.model_copy(update={"rounds": 4})}
    )
    run_in_process(run.reconfigure(longer))
    line = round_lines(run)[-1]
    assert list(line["refused"]) == ["digit-1"]
    assert attempt in (run.clients / "digit-1" / "client.log").read_text()


@pytest.mark.parametrize("missing", ["skip", "wait"])
def test_a_client_that_has_lost_its_store_holds_nobody_and_may_begin_anew(
    copy: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run = RunFolder.open(copy)
    shutil.rmtree(run.clients / "digit-1" / "lineages")

    def go_on(rounds: int, what: str) -> list[dict[str, Any]]:
        changes = {"rounds": rounds, "on_missing": missing, "on_lost_store": what}
        federation = run.config.federation.model_copy(update={**changes, "round_timeout": 60.0})
        longer = run.config.model_copy(update={"federation": federation})
        return round_lines(run_in_process(RunFolder.open(copy).reconfigure(longer)))

    *_, fourth, fifth = go_on(5, "refuse")
    for line in (fourth, fifth):
        assert line["accepted"] == ["digit-0", "digit-2"]
        assert "federation.on_lost_store=restart" in line["refused"]["digit-1"]
    output = capsys.readouterr()
    assert output.out.count("refused digit-1") == 1, "the server says it once"
    log = run.clients / "digit-1" / "client.log"
    assert log.read_text().count("refused: the attempt to go on from is lost") <= 2, "so does it"
    *_, sixth, seventh = go_on(7, "restart")
    assert sixth["restarted"] == ["digit-1"], "on record"
    assert "begins with fresh" in capsys.readouterr().err
    assert seventh["restarted"] == []
    assert sixth["accepted"] == seventh["accepted"] == ["digit-0", "digit-1", "digit-2"]
    bits = all_bits(RunFolder.open(copy))
    assert bits["digit-1"]["steps"] < bits["digit-0"]["steps"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.learning_rate=0.5", "training.learning_rate: 0.002 -> 0.5"),
        ("seed=7", "seed: 0 -> 7"),
        ("federation.clients=2", "federation.clients: 3 -> 2"),
        ("model.exclusive_stages=1", "model.exclusive_stages: 2 -> 1"),
        ("evaluation.samples=60", "evaluation.samples: 30 -> 60"),
    ],
)
def test_a_resumption_under_another_configuration_names_key_and_both_values(
    finished_run: RunFolder, capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    before = (finished_run.path / "config.yaml").read_bytes()
    assert expected in one_error_line(
        capsys, ["--resume", str(finished_run.path), "--set", setting]
    )
    assert (finished_run.path / "config.yaml").read_bytes() == before


def test_a_run_that_goes_on_may_look_otherwise(two_rounds: RunFolder, tmp_path: Path) -> None:
    """What decides nothing does not stand in the way, and its new value is shown."""
    run = run_in_process(begin(tmp_path / "run", {"federation.rounds": 1}))
    changes = ["federation.rounds=2", "evaluation.grid_columns=3", "evaluation.strip_steps=4"]
    arguments = [word for change in changes for word in ("--set", change)]
    assert simulate.main(["--resume", str(run.path), *arguments]) == 0
    evaluation = RunFolder.open(run.path).config.evaluation
    assert (evaluation.grid_columns, evaluation.strip_steps) == (3, 4)
    assert all_bits(RunFolder.open(run.path)) == all_bits(two_rounds)


def test_a_linear_fall_of_its_own_length_can_be_prolonged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        **ROUNDS,
        "evaluation.every": 0,
        "training.learning_rate_schedule": "linear",
        "model.exclusive_stages": "none",
        "model.owned": ["vector", "film"],
        "training.owned_learning_rate": 2e-2,
    }
    fall = {"training.decay_rounds": 4}
    straight = run_in_process(begin(tmp_path / "straight", {**settings, **fall}))
    run = run_in_process(begin(tmp_path / "run", {**settings, **fall, "federation.rounds": 2}))
    assert simulate.main(["--resume", str(run.path), "--set", "federation.rounds=4"]) == 0
    assert all_bits(RunFolder.open(run.path)) == all_bits(straight)
    # Without a length it is the run's, which decides the rounds that there have been.
    follows = run_in_process(begin(tmp_path / "follows", settings))
    assert all_bits(follows) == all_bits(straight)
    capsys.readouterr()
    text = one_error_line(capsys, ["--resume", str(follows.path), "--set", "federation.rounds=5"])
    assert "federation.rounds: 4 -> 5" in text


def test_under_a_cosine_rate_the_number_of_rounds_decides_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(
        tmp_path / "run", {"training.learning_rate_schedule": "cosine", "federation.rounds": 1}
    )
    text = one_error_line(capsys, ["--resume", str(run.path), "--set", "federation.rounds=2"])
    assert "federation.rounds: 1 -> 2" in text


def test_a_message_that_is_no_successor_is_refused_at_the_site_before_any_training(
    copy: Path,
) -> None:
    run = RunFolder.open(copy)
    attempt = read_manifest(run.server / "round-00003")["attempts"]["digit-1"]
    site, worker = Site("digit-1", run.clients, index=1), Worker(run.config, 1)
    request = Request(run.config.to_json(), run.lineage, "digit-1", 3, "new", attempt)
    with pytest.raises(UserError, match="training round 3 is impossible after"):
        worker.state(site, request, training=True)
    assert worker.state(site, request, training=False).minibatches == 6


# --- Check, lock, then write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    ["data.dataset=folder", "federation.rounds=1", "resources.client_cpus=9999", "seed=7"],
)
def test_a_refused_resumption_has_written_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    one_error_line(capsys, ["--resume", str(copy), "--data-dir", "/absent", "--set", setting])
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_rounds_that_are_there_already_cannot_be_taken_back(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=2"])
    assert text == f"error: federation.rounds = 2, and {copy} has 3 already; allowed: 3 or more"


def test_a_resumption_that_trains_nothing_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "metrics.jsonl").unlink()
    before = all_bits(RunFolder.open(copy))
    assert simulate.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr()
    assert "going on after round 3, the last: nothing is trained" in said.out
    assert f"{copy}/metrics.jsonl has nothing of rounds 1 to 3; it begins anew" in said.err
    assert all_bits(RunFolder.open(copy)) == before
    assert [line["final"] for line in MetricsLog(copy / "metrics.jsonl").evaluations()] == [True]
    assert simulate.main(["--resume", str(copy)]) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_resumption_elsewhere_says_what_changes(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run has no record of, as one of before, is not compared."""
    file, run = copy / "run.json", RunFolder.open(copy)
    here, card = {"device": "cpu", "precision": "float32"}, "cuda (NVIDIA H200)"
    begun = json.loads(file.read_text())
    assert {**begun, **here} == begun, "written when the run began"

    def gone_on(identity: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
        file.write_text(json.dumps(identity))
        shutil.rmtree(copy / "server" / "round-00003")
        assert simulate.main(["--resume", str(copy)]) == 0
        said = capsys.readouterr()
        return said.out, said.err, json.loads(file.read_text())

    bits = all_bits(run)
    out, err, now = gone_on({**begun, "device": card})
    assert "\ntrains on cpu, float32\ngoing on after round 2\n" in out
    (line,) = [line for line in err.splitlines() if "trained elsewhere" in line]
    assert f"{card}, float32 -> cpu, float32;" in line
    moved = {"after": 2, "from": {**here, "device": card}, "to": here}
    assert now == {**begun, "moved": [moved]}
    for identity, after in ((now, now), ({k: v for k, v in begun.items() if k not in here}, begun)):
        out, err, found = gone_on(identity)
        assert "trained elsewhere" not in err
        assert found == after
    assert all_bits(run) == bits


def test_a_run_whose_last_checkpoint_was_removed_goes_on(
    copy: Path, finished_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the message about a damaged checkpoint advises; nothing of the round that is gone is shown
    as if it stood.
    """
    shutil.rmtree(copy / "server" / "round-00003")
    for picture in (copy / "samples").glob("*-00003.png"):
        picture.write_bytes(b"of the round that is gone")
    assert simulate.main(["--resume", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "finished already" not in said
    assert "going on after round 2\n" in said
    assert all_bits(RunFolder.open(copy)) == all_bits(finished_run)
    assert records(RunFolder.open(copy)) == records(finished_run)
    for picture in finished_run.samples.iterdir():
        assert (copy / "samples" / picture.name).read_bytes() == picture.read_bytes()


def test_pictures_of_rounds_to_come_are_dropped_at_once(copy: Path) -> None:
    run = RunFolder.open(copy)
    (run.samples / "mine.png").touch()
    curves = Curves(run)
    curves.on_begin(MetricsLog(run.metrics).tasks(), 2)
    curves.on_end()
    assert sorted(path.name for path in run.samples.iterdir()) == [
        "mine.png",
        "reverse-process-00002.png",
        "round-00002.png",
    ]

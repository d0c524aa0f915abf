"""Stopping, crashing and going on: the same bits as never having stopped, and a store that allows
it.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from support.tiny_run import (
    all_bits,
    begin,
    files_of_at_most,
    records,
    round_lines,
    run_in_process,
    run_on_grid,
    server_bits,
    stop_after_a_round,
)

import srfed
from srfed import simulate
from srfed.commands import adapt, evaluate, sample
from srfed.config.run import fingerprint_of
from srfed.errors import UserError
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.messages import TRAIN, Request
from srfed.federation.site import Site
from srfed.federation.worker import Worker
from srfed.files import held, list_folder
from srfed.reporting.curves import Curves
from srfed.runs.run import TrainedRun
from srfed.storage import client_store
from srfed.storage.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    Checkpoint,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from srfed.storage.client_store import LONGEST_NAME, NO_PARENT, ClientStore, StoreBounds
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import RunState, ServerCheckpoints
from srfed.training.local import ClientState

PACKAGE = str(Path(srfed.__file__).parent.parent)
ROUNDS = {
    "federation.rounds": 4,
    "federation.keep_attempts": 9,
    "evaluation.samples": 6,
    "evaluation.samples_between": 6,
}


class StoppingGrid(InlineGrid):
    """Somebody presses Ctrl-C when the first client of round 3 has answered."""

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "3":
            stop_requested.set()
        return reply


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


# --- The commands' words about it
# ------------------------------------------------------------------


@pytest.fixture
def copy(finished_run: RunFolder, tmp_path: Path) -> Path:
    """A finished run's folder, to be spoilt."""
    return Path(shutil.copytree(finished_run.path, tmp_path / "copy"))


def one_error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert simulate.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


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


@pytest.mark.parametrize("spoil", ["manifest", "bit", "missing"])
def test_a_checkpoint_damaged_in_another_way_is_refused_too(
    copy: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    last = copy / "server" / "round-00003"
    if spoil == "manifest":
        (last / MANIFEST_FILE).write_text('{"round": 3')
    elif spoil == "bit":
        data = bytearray((last / STATE_FILE).read_bytes())
        data[len(data) // 2] ^= 1
        (last / STATE_FILE).write_bytes(data)
    else:
        (last / STATE_FILE).unlink()
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


def test_a_run_that_goes_on_may_look_otherwise(tmp_path: Path) -> None:
    """What decides nothing does not stand in the way, and its new value is shown."""
    run = run_in_process(begin(tmp_path / "run", {"federation.rounds": 1}))
    changes = ["federation.rounds=2", "evaluation.grid_columns=3", "evaluation.strip_steps=4"]
    arguments = [word for change in changes for word in ("--set", change)]
    assert simulate.main(["--resume", str(run.path), *arguments]) == 0
    evaluation = RunFolder.open(run.path).config.evaluation
    assert (evaluation.grid_columns, evaluation.strip_steps) == (3, 4)
    straight = run_in_process(begin(tmp_path / "straight", {"federation.rounds": 2}))
    assert all_bits(RunFolder.open(run.path)) == all_bits(straight)


def test_under_a_cosine_rate_the_number_of_rounds_decides_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(
        tmp_path / "run", {"training.learning_rate_schedule": "cosine", "federation.rounds": 1}
    )
    text = one_error_line(capsys, ["--resume", str(run.path), "--set", "federation.rounds=2"])
    assert "federation.rounds: 1 -> 2" in text


# --- Stores --------------------------------------------------------------------------------------


def client_state(value: float) -> ClientState:
    tensors = {"head.weight": torch.full((64, 64), value)}
    average = {"head.weight": tensors["head.weight"].clone()}
    return ClientState(
        tensors, average, {"step.head.weight": torch.tensor(value)}, {}, int(value), 1
    )


def attempts_of(store: ClientStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def test_a_stored_state_comes_back_whole(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 3)
    store.save("a-1", NO_PARENT, 1, client_state(3.0))
    state = store.load("a-1")
    assert (state.steps, state.exclusive_steps, state.shared_moments) == (3, 1, {})
    assert torch.equal(state.exclusive["head.weight"], torch.full((64, 64), 3.0))
    assert state.exclusive_moments["step.head.weight"].shape == ()


@pytest.mark.parametrize("keep", [2, 3])
@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=6)), ids=str)
def test_pruning_leaves_what_every_kept_checkpoint_refers_to(
    tmp_path: Path, keep: int, present: tuple[bool, ...]
) -> None:
    """A client that takes part in some rounds only; the server keeps its last checkpoints and can
    go back.
    """
    store = ClientStore(tmp_path, "client", "lineage", keep)
    parent = NO_PARENT
    parents = [parent]
    for number, takes_part in enumerate(present, 1):
        if takes_part:
            attempt = f"round-{number}"
            store.save(f"{attempt}-lost", parent, number, client_state(0))
            store.save(attempt, parent, number, client_state(number))
            # The server has not stored this round yet; it may crash and go back to any checkpoint
            # it has.
            for named in parents[-keep:]:
                assert named == NO_PARENT or store.load(named)
            parent = attempt
        parents.append(parent)
    if any(present):
        assert len(attempts_of(store)) <= 2 * keep + 1


def test_a_rolled_back_client_prunes_what_was_stored_in_the_abandoned_future(
    tmp_path: Path,
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    for number in range(1, 6):
        store.save(
            f"first-{number}",
            f"first-{number - 1}" if number > 1 else NO_PARENT,
            number,
            client_state(1),
        )
    store.save("second-4", "first-3", 4, client_state(2))
    assert {"first-3", "second-4"} <= attempts_of(store)
    for number in range(5, 9):
        store.save(f"second-{number}", f"second-{number - 1}", number, client_state(2))
    assert attempts_of(store) == {"second-6", "second-7", "second-8"}


def test_a_crash_in_the_middle_of_pruning_does_not_lock_the_client_out(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    store.save("a-1", NO_PARENT, 1, client_state(1))
    store.save("a-2", "a-1", 2, client_state(2))
    (store.folder / "a-0").mkdir()  # its files were removed, then the power failed
    store.save("a-3", "a-2", 3, client_state(3))
    store.save("a-4", "a-3", 4, client_state(4))
    assert attempts_of(store) == {"a-2", "a-3", "a-4"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/etc", ".hidden", "a b", "a\n", "ü", "a\x00"]
)
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    for attempt in (
        lambda: ClientStore(tmp_path, name, "lineage", 2),
        lambda: ClientStore(tmp_path, "client", name, 2),
        lambda: store.load(name),
        lambda: store.save(name, NO_PARENT, 1, client_state(1)),
    ):
        with pytest.raises(UserError, match="is no name for a store"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_client_store_as_it_was(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    store.save("a-1", NO_PARENT, 1, client_state(1))
    with files_of_at_most(1000), pytest.raises(UserError, match="cannot write"):
        store.save("a-2", "a-1", 2, client_state(2))
    assert attempts_of(store) == {"a-1"}
    assert torch.equal(store.load("a-1").exclusive["head.weight"], torch.full((64, 64), 1.0))
    with pytest.raises(UserError):
        store.load("a-2")


def test_a_store_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "client").write_text("in the way")
    store = ClientStore(tmp_path, "client", "lineage", 2)
    with pytest.raises(UserError, match="cannot write"):
        store.save("a-1", NO_PARENT, 1, client_state(1))
    assert (tmp_path / "client").read_text() == "in the way"


def server_state(number: int) -> RunState:
    shared, average = ({"w": torch.full((64, 64), float(number))} for _ in range(2))
    return RunState(
        "lineage", number, shared, average, attempts={"a": f"a-{number}"}, shape=(8, 8, 1)
    )


def test_the_server_keeps_its_last_checkpoints_and_survives_a_full_disk(tmp_path: Path) -> None:
    checkpoints = ServerCheckpoints(tmp_path / "server", 2)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.load_last()
    for number in range(4):
        checkpoints.save(server_state(number))
    assert checkpoints.rounds() == [2, 3]
    with files_of_at_most(1000), pytest.raises(UserError, match="cannot write"):
        checkpoints.save(server_state(4))
    state = checkpoints.load_last()
    assert (state.round, state.parent("a"), state.parent("b")) == (3, "a-3", NO_PARENT)
    assert state.shape == (8, 8, 1)
    assert torch.equal(state.shared["w"], torch.full((64, 64), 3.0))


def test_a_checkpoint_that_somebody_set_aside_is_not_taken_for_one(tmp_path: Path) -> None:
    checkpoints = ServerCheckpoints(tmp_path / "server", 9)
    for number in range(2):
        checkpoints.save(server_state(number))
    (tmp_path / "server" / "round-00001").rename(tmp_path / "server" / "round-00001.damaged")
    assert checkpoints.load_last().round == 0


# --- Nothing is removed but what nobody refers to
# ------------------------------------------------------


def lines_of(store: ClientStore, names: str, parent: str, first: int) -> None:
    """Attempts one after the other, each named by its letter and its round."""
    for number in range(first, first + int(names[1:])):
        store.save(f"{names[0]}-{number}", parent, number, client_state(float(number)))
        parent = f"{names[0]}-{number}"


def test_foreign_files_do_not_stop_the_pruning(tmp_path: Path) -> None:
    store, checkpoints = (
        ClientStore(tmp_path, "client", "lineage", 2),
        ServerCheckpoints(tmp_path / "server", 2),
    )
    for number in range(1, 7):
        store.save(
            f"a-{number}",
            f"a-{number - 1}" if number > 1 else NO_PARENT,
            number,
            client_state(number),
        )
        checkpoints.save(server_state(number))
        for folder in (store.folder / f"a-{number}", tmp_path / "server" / f"round-{number:05d}"):
            for name in (".DS_Store", ".nfs0000000001", "Thumbs.db"):
                (folder / name).touch()
                (folder.parent / name).touch()
        (tmp_path / "server" / f"round-{number:05d}" / "notes.txt").write_text("mine")
    assert list_folder(store.folder) == ["a-4", "a-5", "a-6"]
    assert checkpoints.rounds() == [5, 6]
    assert checkpoints.load_last().round == 6
    assert len(list((tmp_path / "server").rglob("notes.txt"))) == 6, (
        "what is not ours is not removed"
    )


def test_a_folder_with_nothing_but_foreign_files_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = ServerCheckpoints(tmp_path / "server", 2)
    checkpoints.save(server_state(3))
    (tmp_path / "server" / "round-00007").mkdir()
    (tmp_path / "server" / "round-00007" / ".DS_Store").touch()
    assert checkpoints.load_last().round == 3


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_attempt_that_cannot_be_read_now_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a6", NO_PARENT, 1)
    kept = attempts_of(store)
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        # The store reads the parent first; all that it reads for the pruning fails.
        if path.name == MANIFEST_FILE and path.parent.parent == store.folder and pruning:
            raise OSError(number, os.strerror(number))
        return read(path)

    pruning: list[bool] = []
    write = client_store.write_checkpoint

    def write_then_fail(folder: Path, checkpoint: Checkpoint) -> None:
        write(folder, checkpoint)
        pruning.append(True)

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(client_store, "write_checkpoint", write_then_fail)
    store.save("a-7", "a-6", 7, client_state(7))
    monkeypatch.undo()
    assert attempts_of(store) == {*kept, "a-7"}
    for name in attempts_of(store):
        store.load(name)


@pytest.mark.parametrize("damage", ["", '{"format": 1, "parent": 3}', "half"])
def test_a_damaged_attempt_is_left_for_somebody_to_look_at(tmp_path: Path, damage: str) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a4", NO_PARENT, 1)
    manifest = store.folder / "a-4" / MANIFEST_FILE
    manifest.write_text(damage if damage != "half" else manifest.read_text()[:40])
    store.save("b-4", "a-3", 4, client_state(4))
    for number in range(5, 9):
        store.save(f"b-{number}", f"b-{number - 1}", number, client_state(number))
    assert attempts_of(store) == {"a-4", "b-6", "b-7", "b-8"}
    with pytest.raises(UserError, match="is damaged"):
        store.load("a-4")


def test_a_checkpoint_that_cannot_be_read_now_is_not_advised_to_be_removed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == STATE_FILE and path.parent.name == "round-00003":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=4"])
    assert f"cannot read {copy}/server/round-00003/{STATE_FILE}: Stale file handle" in text
    assert "remove" not in text


def test_a_server_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = os.listdir

    def fail(path: Any) -> list[str]:
        if Path(path).name == "server":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return listed(path)

    monkeypatch.setattr(os, "listdir", fail)
    assert f"cannot read {copy}/server: Permission" in one_error_line(
        capsys, ["--resume", str(copy)]
    )


@pytest.mark.parametrize("name", ["resume", "sample", "evaluate", "adapt"])
def test_a_run_that_cannot_be_looked_into_is_a_sentence(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    looked = os.stat

    def fail(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{copy}/"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return looked(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert line == f"error: cannot read {copy}/run.json: Permission denied"


@pytest.mark.parametrize("parent", [NO_PARENT, "a-9"])
def test_a_round_from_the_future_does_not_empty_a_store(tmp_path: Path, parent: str) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a9", NO_PARENT, 1)
    assert attempts_of(store) == {"a-7", "a-8", "a-9"}
    store.save("hostile-1", parent, 10**6 - 1, client_state(1))
    store.save("hostile-2", "hostile-1", 10**6, client_state(1))
    expected = {"a-7", "a-8", "a-9"} if parent == NO_PARENT else {"a-9"}
    assert attempts_of(store) == {*expected, "hostile-1", "hostile-2"}
    lines_of(store, "b3", "a-9", 10)
    assert {"b-10", "b-11", "b-12"} <= attempts_of(store)


def test_the_first_attempt_of_all_survives_others_that_have_no_parent_either(
    tmp_path: Path,
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 1)
    store.save("a-1", NO_PARENT, 1, client_state(1))
    store.save("b-500", NO_PARENT, 500, client_state(1))
    assert attempts_of(store) == {"a-1", "b-500"}
    store.save("a-2", "a-1", 2, client_state(1))
    store.save("b-501", "b-500", 501, client_state(1))
    store.save("b-502", "b-501", 502, client_state(1))
    assert {"a-1", "a-2"} <= attempts_of(store)


def test_retries_of_the_same_parent_go_with_it(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 1)
    store.save("a-1", NO_PARENT, 1, client_state(1))
    for retry in ("a-2-lost", "a-2-lost-again", "a-2"):
        store.save(retry, "a-1", 2, client_state(2))
    store.save("a-3", "a-2", 3, client_state(3))
    assert attempts_of(store) == {"a-2", "a-3"}


@pytest.mark.parametrize(
    ("parent", "number", "training", "allowed"),
    [
        ("a-3", 4, True, True),
        ("a-3", 9, True, True),
        ("a-3", 3, True, False),
        ("a-3", 2, True, False),
        ("a-3", 3, False, True),
        ("a-3", 2, False, False),
        (NO_PARENT, 1, True, True),
        (NO_PARENT, 0, True, False),
        (NO_PARENT, 0, False, True),
        (NO_PARENT, -1, False, False),
        (NO_PARENT, 2**63, True, False),
    ],
)
def test_a_round_follows_its_parents(
    tmp_path: Path, parent: str, number: int, training: bool, allowed: bool
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 3)
    lines_of(store, "a3", NO_PARENT, 1)
    if allowed:
        store.check_descent(parent, number, training=training)
        return
    with pytest.raises(
        UserError, match=f"round {number} is impossible after attempt '{parent}'; allowed: "
    ):
        store.check_descent(parent, number, training=training)
    if training:
        with pytest.raises(UserError, match="is impossible after"):
            store.save("b", parent, number, client_state(1))
        assert attempts_of(store) == {"a-1", "a-2", "a-3"}


def test_a_message_that_is_no_successor_is_refused_at_the_site_before_any_training(
    copy: Path,
) -> None:
    run = RunFolder.open(copy)
    attempt = read_manifest(run.server / "round-00003")["attempts"]["digit-1"]
    site, worker = Site("digit-1", run.clients, index=1), Worker(run.config, 1)
    request = Request(run.config.to_json(), run.lineage, "digit-1", 3, "new", attempt)
    with pytest.raises(UserError, match="training round 3 is impossible after"):
        worker.state(site, request, training=True)
    assert worker.state(site, request, training=False).steps == 6


@pytest.mark.parametrize("name", ["a" * (LONGEST_NAME + 1), "a..b", "a/../../b"])
def test_names_are_bounded(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"is no name for a store; .* no '\.\.', at most {LONGEST_NAME} characters"
    ):
        ClientStore(tmp_path, "client", name, 2)
    ClientStore(tmp_path, "client", "a" * LONGEST_NAME, 2)


def test_a_lineage_may_be_called_as_it_likes_without_meeting_other_files_of_the_client(
    tmp_path: Path,
) -> None:
    for name in ("models", "samples", "memorisation", "lineages", "lock", "client.log"):
        (tmp_path / "client" / "models" / "a" / "round-00003").mkdir(parents=True, exist_ok=True)
        store = ClientStore(tmp_path, "client", name, 1)
        lines_of(store, "a3", NO_PARENT, 1)
        assert store.load("a-3").steps == 3
    assert (tmp_path / "client" / "models" / "a" / "round-00003").is_dir()
    assert sorted(path.name for path in (tmp_path / "client").iterdir()) == [
        "lineages",
        "lock",
        "models",
    ]


def test_a_store_has_bounds_and_says_what_to_remove(tmp_path: Path) -> None:
    size = 2 * 64 * 64 * 4
    for lineage in ("one", "two"):
        lines_of(
            ClientStore(tmp_path, "client", lineage, 2, StoreBounds(2, 10 * size)),
            "a2",
            NO_PARENT,
            1,
        )
    lineages = tmp_path / "client" / "lineages"
    more = ClientStore(tmp_path, "client", "three", 2, StoreBounds(2, 10 * size))
    with pytest.raises(
        UserError, match=f"{lineages} holds 2 runs, and 2 are the most: remove folders of runs"
    ):
        more.save("a-1", NO_PARENT, 1, client_state(1))
    full = ClientStore(tmp_path, "client", "two", 2, StoreBounds(2, 5 * size))
    with pytest.raises(
        UserError, match=rf"{lineages} holds .* kB; 32\.8 kB more exceed the 163\.8 kB .*: remove"
    ):
        full.save("a-3", "a-2", 3, client_state(3.0))
    assert attempts_of(full) == {"a-1", "a-2"}
    shutil.rmtree(lineages / "one")
    full.save("a-3", "a-2", 3, client_state(3.0))


def test_a_store_of_before_is_read_where_it_lies_and_moved_when_it_is_written(
    tmp_path: Path,
) -> None:
    lineage = "0123456789ab"
    lines_of(ClientStore(tmp_path, "client", lineage, 2), "a2", NO_PARENT, 1)
    (tmp_path / "client" / "lineages" / lineage).rename(tmp_path / "client" / lineage)
    for manifest in (tmp_path / "client" / lineage).rglob(MANIFEST_FILE):
        content = json.loads(manifest.read_text())
        manifest.write_text(
            json.dumps({key: content[key] for key in content if key not in ("format", "line")})
        )
    store = ClientStore(tmp_path, "client", lineage, 2)
    assert store.load("a-2").steps == 2
    assert store.has("a-2")
    assert not store.folder.exists(), "reading changes nothing"
    store.save("a-3", "a-2", 3, client_state(3))
    assert attempts_of(store) == {"a-1", "a-2", "a-3"}
    assert store.line("a-3") == "a-2"
    assert not (tmp_path / "client" / lineage).exists()


def test_a_line_of_descent_is_known_by_its_first_attempt(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a6", NO_PARENT, 1)
    lines_of(store, "b2", NO_PARENT, 3)
    assert [store.line(name) for name in (NO_PARENT, "a-6", "b-4")] == [NO_PARENT, "a-1", "b-3"]


# --- Check, lock, then write
# ----------------------------------------------------------------------------


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


def test_a_run_in_use_keeps_its_configuration(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True)"
    )
    command = [sys.executable, "-c", f"{holder}; sys.stdin.read()", str(copy / "lock")]
    (copy / "images.json").write_text('{"format": 1, "records": {}}')
    before = [(copy / name).read_bytes() for name in ("config.yaml", "images.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        options = ["--allow-changed-images", "--set", "federation.rounds=5"]
        text = one_error_line(capsys, ["--resume", str(copy), *options])
        process.communicate()
    assert text.startswith(f"error: {copy} is in use by another process")
    assert [(copy / name).read_bytes() for name in ("config.yaml", "images.json")] == before


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


# --- What was edited, damaged or made by another srfed
# --------------------------------------------------


COMMANDS = {
    "resume": (simulate.main, ["--resume", "RUN"]),
    "sample": (sample.main, ["--run", "RUN", "--out", "OUT.png"]),
    "evaluate": (evaluate.main, ["--run", "RUN"]),
    "adapt": (adapt.main, ["--run", "RUN", "--task", "digit-5", "--out", "OUT"]),
}


def error_of(name: str, run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says of a run."""
    command, options = COMMANDS[name]
    capsys.readouterr()
    values = [option.replace("RUN", str(run)).replace("OUT", str(out)) for option in options]
    assert command(values) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not list(out.parent.glob(f"{out.name}*")), "nothing was begun"
    return line


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed: 0", "seed: 7", "seed: 0 -> 7"),
        ("timesteps: 500", "timesteps: 400", "diffusion.timesteps: 500 -> 400"),
        ("exclusive_stages: 2", "exclusive_stages: 1", "model.exclusive_stages: 2 -> 1"),
        ("groups: 4", "groups: 2", "model.groups: 4 -> 2"),
    ],
)
def test_a_configuration_edited_by_hand_is_refused(
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    versioned: bool,
    old: str,
    new: str,
    expected: str,
) -> None:
    text = (copy / "config.yaml").read_text()
    assert text.count(old) == 1
    (copy / "config.yaml").write_text(text.replace(old, new))
    if not versioned:
        identity = json.loads((copy / "run.json").read_text())
        del identity["settings"], identity["format"]
        (copy / "run.json").write_text(json.dumps(identity))
        expected = "the fingerprint in run.json is another"
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert line.startswith(
        f"error: {copy}/config.yaml is not what the run was begun with ({expected}): put it back"
    )


@pytest.mark.parametrize("left_out", [False, True], ids=["as it was", "left out as advised"])
def test_a_run_of_before_is_read_and_gets_what_its_run_json_lacked(
    copy: Path, finished_run: RunFolder, capsys: pytest.CaptureFixture[str], left_out: bool
) -> None:
    """Written before formats had versions, before a setting that there is now, and with one that is
    no more.
    """
    config = (copy / "config.yaml").read_text()
    assert config.count("  proximal: 0.0\n") == config.count("  clients: 3\n") == 1
    config = config.replace("  proximal: 0.0\n", "")
    if not left_out:
        config = config.replace("  clients: 3\n", "  clients: 3\n  largest_update: 100.0\n")
    (copy / "config.yaml").write_text(config)
    identity = json.loads((copy / "run.json").read_text())
    settings = {**identity["settings"], "federation.largest_update": 100.0}
    del settings["training.proximal"]
    old = {"lineage": identity["lineage"], "fingerprint": fingerprint_of(settings)}
    (copy / "run.json").write_text(json.dumps(old))
    for manifest in copy.rglob(MANIFEST_FILE):
        content = json.loads(manifest.read_text())
        del content["format"]
        manifest.write_text(json.dumps(content))
    for lineage in copy.glob("clients/*/lineages/*"):
        lineage.rename(lineage.parent.parent / lineage.name)
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    del lines[0]["format"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    run = RunFolder.open(copy)
    assert run.config == finished_run.config
    trained = TrainedRun(copy, run.config.resources)
    assert trained.exclusive_of(trained.tasks[1])
    go_on = ["--resume", str(copy), "--set", "federation.rounds=4"]
    if not left_out:
        assert "federation.largest_update is no setting any more" in one_error_line(capsys, go_on)
        return
    assert simulate.main(go_on) == 0
    assert RunFolder.open(copy).config.federation.rounds == 4
    assert round_lines(run)[-1]["accepted"] == ["digit-0", "digit-1", "digit-2"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_tensors_that_do_not_fit_the_configuration_are_a_sentence(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = copy / "server" / "round-00003"
    checkpoint = read_checkpoint(folder)
    first = sorted(checkpoint.groups["shared"])[0]
    for group in ("shared", "shared_average"):
        checkpoint.groups[group][first] = torch.zeros(7)
    shutil.rmtree(folder)
    write_checkpoint(folder, checkpoint)
    if name == "resume":
        MetricsLog(copy / "metrics.jsonl").begin(2, [])
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert f"{folder} has {first} with shape (7,), and the configuration says (" in line


@pytest.mark.parametrize("file", ["run.json", f"server/round-00003/{MANIFEST_FILE}"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_run_of_a_newer_srfed_is_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str
) -> None:
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, "format": 99}))
    if name == "resume":
        MetricsLog(copy / "metrics.jsonl").begin(2, [])
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert f"{copy / file} has format 99, which a newer srfed wrote" in line
    assert "remove" not in line


@pytest.mark.parametrize("key", ["lineage", "round", "attempts", "shape"])
def test_a_checkpoint_without_a_key_is_a_sentence(
    copy: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    manifest = copy / "server" / "round-00003" / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=4"])
    assert (
        f"{manifest} is damaged: it has no '{key}'; remove {manifest.parent} to go back to round 2"
        in text
    )
    manifest.write_text(
        json.dumps({name: value for name, value in content.items() if name not in (key, "format")})
    )
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=4"])
    assert f"{manifest} is of an older srfed (format 0) and has no '{key}'" in text


@pytest.mark.parametrize("name", ["sample", "evaluate", "adapt"])
@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\n", b"\x00" * 100 + b"\n", b"[]\n", b'{"kind": "round"}\n']
)
def test_a_log_that_is_missing_or_damaged_is_a_sentence(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    log = copy / "metrics.jsonl"
    log.unlink()
    if content is not None:
        log.write_bytes(content)
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert (
        f"{log} names no task" if not content else f"{log} is damaged in line 1; remove that line"
    ) in line


def test_samples_that_are_damaged_are_a_sentence_and_made_again(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", str(copy), "--samples", "6", "--ssim-images", "0"]
    assert evaluate.main(options) == 0
    (file,) = copy.rglob("samples.safetensors")
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:9], b"", whole.replace(b"digit-1", b"digit-7")):
        (file.parent / "scores.json").unlink(missing_ok=True)
        file.write_bytes(content)
        capsys.readouterr()
        assert evaluate.main(options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"remove {file.parent}, and it is made again" in line
    shutil.rmtree(file.parent)
    assert evaluate.main(options) == 0
    assert file.read_bytes() == whole


def test_outputs_are_tried_before_any_sampling(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run = str(finished_run.path)
    for options in (
        ["--out", "."],
        ["--out", str(tmp_path)],
        ["--npz", str(tmp_path / "file" / "x.npz")],
    ):
        # More images than any machine samples while a test waits.
        assert sample.main(["--run", run, "--n", "99999999", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: cannot write ")


# --- Whose it is
# ------------------------------------------------------------------------------------------


def test_a_runs_folder_is_its_owners_alone_and_says_what_is_in_it(
    finished_run: RunFolder,
) -> None:
    paths = [finished_run.path, *finished_run.path.rglob("*")]
    assert {path.parent.name for path in paths} >= {
        "tensorboard",
        "memorisation",
        "lineages",
        "server",
        "samples",
    }
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    readme = (finished_run.path / "README.txt").read_text()
    assert "memorisation/ crops of real training images" in " ".join(readme.split())


def test_a_client_whose_folder_others_can_read_says_so_in_its_own_log(tmp_path: Path) -> None:
    run = begin(
        tmp_path / "run",
        {"federation.rounds": 1, "evaluation.samples": 6, "evaluation.ssim_images": 0},
    )
    (run.clients / "digit-1").mkdir(parents=True)
    run.clients.chmod(0o700)
    (run.clients / "digit-1").chmod(0o755)
    run_in_process(run)
    log = (run.clients / "digit-1" / "client.log").read_text()
    assert (
        f"{run.clients / 'digit-1'} can be read by others on this machine (mode 0755); close it: "
        "chmod" in log
    )
    assert log.count("can be read by others") == 1
    assert not (run.clients / "digit-0" / "client.log").exists()


def test_an_adaptation_in_use_is_left_alone(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "out" / "lock", wait=False):
        assert (
            adapt.main(
                [
                    "--run",
                    str(finished_run.path),
                    "--task",
                    "digit-5",
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
    assert f"{tmp_path / 'out'} is in use by another process" in capsys.readouterr().err
    assert list_folder(tmp_path / "out") == ["lock"]


CREATOR = """
import sys, time
from pathlib import Path
from srfed.errors import UserError
from srfed.config import load_config
from srfed.storage.run_folder import RunFolder
folder, name = Path(sys.argv[1]), sys.argv[2]
path = Path(sys.argv[3]) if len(sys.argv) > 3 else None
config = load_config()
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 4:
    time.sleep(0.0001)
try:
    print(RunFolder.create(path, config).path)
except UserError as error:
    print(f"refused: {error}")
"""


@pytest.mark.parametrize("named", [True, False])
def test_of_processes_that_begin_a_run_at_once_each_has_its_own_or_is_refused(
    tmp_path: Path, named: bool
) -> None:
    options = [str(tmp_path / "run")] if named else []
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, str(tmp_path), str(number), *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )
        for number in range(4)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    won = [text for text in said if not text.startswith("refused")]
    assert len(won) == len(set(won)) == (1 if named else 4)
    for text in set(said) - set(won):
        # By the moment at which it looked: before, while or after the winner wrote.
        assert any(
            words in text
            for words in ("is in use by another process", "is not an empty folder", "holds a run")
        )
    assert len({RunFolder.open(Path(path)).lineage for path in won}) == len(won)

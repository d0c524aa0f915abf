"""Stopping, crashing and going on: the same bits as never having stopped, and a store that allows it."""

import itertools
import json
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from tiny_run import all_bits, begin, records, round_lines, run_in_process, run_on_grid, server_bits, stop_after_a_round

from srfed import simulate
from srfed.checkpoints.client_store import NO_PARENT, ClientStore
from srfed.checkpoints.server_state import ServerCheckpoints, ServerState
from srfed.errors import UserError
from srfed.federation.exchange import StoppedError, stop_requested
from srfed.federation.inline_grid import InlineGrid
from srfed.federation.messages import TRAIN
from srfed.reporting.metrics_log import MetricsLog
from srfed.reporting.run_directory import RunDirectory
from srfed.tensors import MANIFEST_FILE, STATE_FILE, read_manifest
from srfed.training.local import ClientState

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


def reopen(run: RunDirectory) -> RunDirectory:
    stop_requested.clear()
    return RunDirectory.open(run.path)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.shared_moments": "keep", "federation.server_optimizer": "adam"},
        {"training.shared_moments": "average", "federation.server_optimizer": "momentum"},
        {"federation.clients_per_round": 2, "training.update": "alternating", "federation.keep_attempts": 2},
    ],
    ids=["keep-adam", "average-momentum", "two-of-three-alternating"],
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

    # The server crashed after the clients had stored round 4, and before that had not stored round 3.
    for path in sorted(stopped.server.glob("round-*"))[-2:]:
        shutil.rmtree(path)
    run_in_process(reopen(stopped))
    assert all_bits(stopped) == all_bits(whole)
    assert records(stopped) == records(whole)


def test_a_killed_command_goes_on_with_the_same_bits(tiny_yaml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srfed.simulate", "--config", str(tiny_yaml), "--run-dir", str(tmp_path / "run")]
    command += ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]
    stop_after_a_round(command, signal.SIGKILL)
    run = RunDirectory.open(tmp_path / "run")
    done = len(round_lines(run))
    assert simulate.main(["--resume", str(run.path), "--set", f"federation.rounds={done + 1}"]) == 0
    whole = run_in_process(begin(tmp_path / "whole", {"federation.rounds": done + 1, "evaluation.every": 0}))
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


def test_an_evaluation_lost_to_a_crash_is_made_up_for(finished_run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run.path, folder)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "evaluation"
    log.write_text("".join(lines[:-1]) + lines[-1][:40])
    run_in_process(RunDirectory.open(folder))
    assert records(RunDirectory.open(folder)) == records(finished_run)
    before = log.read_bytes()
    run_in_process(RunDirectory.open(folder))
    assert log.read_bytes() == before, "a finished run has nothing to do"


# --- The commands' words about it ------------------------------------------------------------------


@pytest.fixture
def copy(finished_run: RunDirectory, tmp_path: Path) -> Path:
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
    assert all_bits(RunDirectory.open(copy)) == all_bits(whole)
    assert [line["round"] for line in round_lines(RunDirectory.open(copy))] == [1, 2, 3, 4]


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
    run = RunDirectory.open(copy)
    attempt = read_manifest(run.server / "round-00003")["attempts"]["digit-1"]
    shutil.rmtree(run.clients / "digit-1" / "lineages" / run.lineage / attempt)
    config = run.config
    longer = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 4})})
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
    finished_run: RunDirectory, capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    before = (finished_run.path / "config.yaml").read_bytes()
    assert expected in one_error_line(capsys, ["--resume", str(finished_run.path), "--set", setting])
    assert (finished_run.path / "config.yaml").read_bytes() == before


def test_under_a_cosine_rate_the_number_of_rounds_decides_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {"training.learning_rate_schedule": "cosine", "federation.rounds": 1})
    text = one_error_line(capsys, ["--resume", str(run.path), "--set", "federation.rounds=2"])
    assert "federation.rounds: 1 -> 2" in text


# --- Stores --------------------------------------------------------------------------------------


def client_state(value: float) -> ClientState:
    tensors = {"head.weight": torch.full((64, 64), value)}
    average = {"head.weight": tensors["head.weight"].clone()}
    return ClientState(tensors, average, {"step.head.weight": torch.tensor(value)}, {}, int(value), 1)


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
    """A client that takes part in some rounds only; the server keeps its last checkpoints and can go back."""
    store = ClientStore(tmp_path, "client", "lineage", keep)
    parent = NO_PARENT
    parents = [parent]
    for number, takes_part in enumerate(present, 1):
        if takes_part:
            attempt = f"round-{number}"
            store.save(f"{attempt}-lost", parent, number, client_state(0))
            store.save(attempt, parent, number, client_state(number))
            # The server has not stored this round yet; it may crash and go back to any checkpoint it has.
            for named in parents[-keep:]:
                assert named == NO_PARENT or store.load(named)
            parent = attempt
        parents.append(parent)
    if any(present):
        assert len(attempts_of(store)) <= 2 * keep + 1


def test_a_rolled_back_client_prunes_what_was_stored_in_the_abandoned_future(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    for number in range(1, 6):
        store.save(f"first-{number}", f"first-{number - 1}" if number > 1 else NO_PARENT, number, client_state(1))
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


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/etc", ".hidden", "a b", "a\n", "ü", "a\x00"])
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


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing stops in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


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


def server_state(number: int) -> ServerState:
    shared, average = ({"w": torch.full((64, 64), float(number))} for _ in range(2))
    return ServerState("lineage", number, shared, average, attempts={"a": f"a-{number}"}, shape=(8, 8, 1))


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

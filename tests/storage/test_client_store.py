"""A client's store: what is kept, what is pruned, what is refused."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from srfed.errors import UserError
from srfed.storage import client_store
from srfed.storage.checkpoint import Checkpoint
from srfed.storage.client_store import LONGEST_NAME, NO_PARENT, ClientStore, StoreBounds
from srfed.storage.manifest import STATE_FILE
from support.stores import client_state, edit_manifest, write_as_before
from support.tiny_run import files_of_at_most

# --- Stores --------------------------------------------------------------------------------------


def attempts_of(store: ClientStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def test_a_stored_state_comes_back_whole(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 3)
    store.save("a-1", NO_PARENT, 1, client_state(3.0))
    state = store.load("a-1")
    assert (state.minibatches, state.exclusive.steps, state.shared_moments) == (3, 1, {})
    assert torch.equal(state.exclusive.weights["head.weight"], torch.full((64, 64), 3.0))
    assert state.exclusive.moments["step.head.weight"].shape == ()


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
    assert torch.equal(
        store.load("a-1").exclusive.weights["head.weight"], torch.full((64, 64), 1.0)
    )
    with pytest.raises(UserError):
        store.load("a-2")


def test_a_store_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "client").write_text("in the way")
    store = ClientStore(tmp_path, "client", "lineage", 2)
    with pytest.raises(UserError, match="cannot write"):
        store.save("a-1", NO_PARENT, 1, client_state(1))
    assert (tmp_path / "client").read_text() == "in the way"


# --- Nothing is removed but what nobody refers to ------------------------------------------------


def lines_of(store: ClientStore, names: str, parent: str, first: int) -> None:
    """Attempts one after the other, each named by its letter and its round."""
    for number in range(first, first + int(names[1:])):
        store.save(f"{names[0]}-{number}", parent, number, client_state(float(number)))
        parent = f"{names[0]}-{number}"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_attempt_that_cannot_be_read_now_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a6", NO_PARENT, 1)
    kept = attempts_of(store)
    opened = Path.open

    def fail(path: Path, *arguments: Any) -> Any:
        # The store reads the parent first; all that it reads for the pruning fails.
        if path.name == STATE_FILE and path.parent.parent == store.folder and pruning:
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments)

    pruning: list[bool] = []
    write = client_store.write_checkpoint

    def write_then_fail(folder: Path, checkpoint: Checkpoint) -> None:
        write(folder, checkpoint)
        pruning.append(True)

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(client_store, "write_checkpoint", write_then_fail)
    store.save("a-7", "a-6", 7, client_state(7))
    monkeypatch.undo()
    assert attempts_of(store) == {*kept, "a-7"}
    for name in attempts_of(store):
        store.load(name)


@pytest.mark.parametrize("damage", ["empty", "another kind", "half"])
def test_a_damaged_attempt_is_left_for_somebody_to_look_at(tmp_path: Path, damage: str) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a4", NO_PARENT, 1)
    if damage == "another kind":
        edit_manifest(store.folder / "a-4", lambda manifest: manifest.update(parent=3))
    else:
        state = store.folder / "a-4" / STATE_FILE
        state.write_bytes(state.read_bytes()[: 40 if damage == "half" else 0])
    store.save("b-4", "a-3", 4, client_state(4))
    for number in range(5, 9):
        store.save(f"b-{number}", f"b-{number - 1}", number, client_state(number))
    assert attempts_of(store) == {"a-4", "b-6", "b-7", "b-8"}
    with pytest.raises(UserError, match="is damaged"):
        store.load("a-4")


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
        assert store.load("a-3").minibatches == 3
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


@pytest.mark.parametrize("accepted", [False, True])
def test_a_client_whose_answers_all_come_too_late_is_not_refused_for_them(
    tmp_path: Path, accepted: bool
) -> None:
    """Whether it has ever been in time, or joined late and never was."""
    store = ClientStore(tmp_path, "client", "lineage", 3, StoreBounds(attempts=8))
    parent = NO_PARENT
    if accepted:
        parent = "accepted"
        store.save(parent, NO_PARENT, 300, client_state(0))
    for number in range(301, 331):
        store.check_question(f"late-{number}", parent, number, "question")
        store.save(f"late-{number}", parent, number, client_state(0), question="question")
        assert len(attempts_of(store)) <= 8
        latest = {f"late-{k}" for k in range(max(301, number - 3), number + 1)}
        assert latest | ({parent} if accepted else set()) <= attempts_of(store)
    # At last one is in time.
    store.save("in-time", "late-330", 331, client_state(0))
    assert store.load("late-330")


def test_what_was_gone_on_with_or_is_the_best_or_of_this_round_does_not_go_for_what_was_not(
    tmp_path: Path,
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 3, StoreBounds(attempts=4))
    store.save("a", NO_PARENT, 1, client_state(0))
    store.save("b", NO_PARENT, 2, client_state(0))
    store.save("of-a", "a", 3, client_state(0), best="b")
    store.save("c", NO_PARENT, 4, client_state(0))
    before = attempts_of(store)
    # Of attempts that nobody went on with there is but one, which is of this round.
    with pytest.raises(UserError, match="holds 4 attempts, and 4 are the most"):
        store.check_question("d", NO_PARENT, 4, "question")
    with pytest.raises(UserError, match="holds 4 attempts, and 4 are the most"):
        store.check_question("d", "a", 900, "question")
    assert attempts_of(store) == before


def test_a_store_of_before_is_read_where_it_lies_and_moved_when_it_is_written(
    tmp_path: Path,
) -> None:
    lineage = "0123456789ab"
    lines_of(ClientStore(tmp_path, "client", lineage, 2), "a2", NO_PARENT, 1)
    (tmp_path / "client" / "lineages" / lineage).rename(tmp_path / "client" / lineage)
    for attempt in (tmp_path / "client" / lineage).iterdir():
        write_as_before(attempt, None, without=["line"])
    store = ClientStore(tmp_path, "client", lineage, 2)
    assert store.load("a-2").minibatches == 2
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


SAVER = """
import sys, time
from pathlib import Path
import torch
from srfed.storage.client_store import ClientStore
from srfed.training.part import ClientState, Part
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = ClientStore(folder / "state", "client", "lineage", 2 * count)
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.001)
for number in range(1, count + 1):
    tensors = {"head.weight": torch.full((64, 64), float(number))}
    state = ClientState(Part(tensors, {}, {}, number), {}, number)
    store.save(f"{name}-{number}", "none", number, state)
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
            assert store.load(f"{name}-{number}").minibatches == number
    assert len(list(store.folder.iterdir())) == 2 * count


# --- The best round ------------------------------------------------------------------------------


def test_the_attempt_of_the_best_round_stays_and_goes_when_another_is_the_best(
    tmp_path: Path,
) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    parent, best = NO_PARENT, NO_PARENT
    for number in range(1, 16):
        attempt = f"a-{number}"
        for name in (f"{attempt}-lost", attempt):
            store.save(name, parent, number, client_state(number), best=best)
        # The server may go back to any of its two last checkpoints, and needs their best rounds.
        kept = {store.load(f"a-{one}").minibatches for one in range(max(1, number - 2), number)}
        assert kept == set(range(max(1, number - 2), number))
        if best != NO_PARENT:
            store.load(best)
        if number > 4:
            assert len([name for name in attempts_of(store) if not name.endswith("lost")]) <= 4
        parent, best = attempt, {3: "a-3", 9: "a-9"}.get(number, best)
    lost = {"a-14-lost", "a-15-lost"}
    assert attempts_of(store) == {"a-9", "a-13", "a-14", "a-15", *lost}


def test_going_back_finds_the_best_round_of_that_time(tmp_path: Path) -> None:
    """The best became another one in the last round, of which the server loses its checkpoint."""
    store = ClientStore(tmp_path, "client", "lineage", 2)
    for number in range(1, 9):
        best = NO_PARENT if number < 3 else "a-2" if number < 8 else "a-7"
        parent = f"a-{number - 1}" if number > 1 else NO_PARENT
        store.save(f"a-{number}", parent, number, client_state(number), best=best)
    assert attempts_of(store) == {"a-2", "a-6", "a-7", "a-8"}
    store.save("b-7", "a-6", 7, client_state(7), best="a-2")
    store.load("a-2")


def test_a_server_that_names_another_best_each_time_fills_no_store(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a6", NO_PARENT, 1)
    lines_of(ClientStore(tmp_path, "client", "lineage", 99), "c1", NO_PARENT, 1)
    for number in range(7, 40):
        named = ["c-1", "a-1", f"a-{number - 3}", f"a-{number - 1}", "absent"][number % 5]
        store.save(f"a-{number}", f"a-{number - 1}", number, client_state(1), best=named)
        assert {"c-1", f"a-{number}"} <= attempts_of(store), "another line is not its to remove"
        assert len(attempts_of(store)) <= 1 + 3 + 1
    with pytest.raises(UserError, match="is no name for a store"):
        store.save("a-40", "a-39", 40, client_state(1), best="../a")
    assert "a-40" not in attempts_of(store)


def test_a_store_from_before_there_was_a_best_round_goes_on(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 2)
    lines_of(store, "a4", NO_PARENT, 1)
    for attempt in store.folder.iterdir():
        write_as_before(attempt, 2, without=["best"])
    store.save("a-5", "a-4", 5, client_state(5), best="a-4")
    assert attempts_of(store) == {"a-3", "a-4", "a-5"}

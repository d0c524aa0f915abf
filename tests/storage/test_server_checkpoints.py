"""The server's checkpoints: which are kept, and what is not taken for one."""

from pathlib import Path

import pytest
import torch

from srfed.errors import UserError
from srfed.files import list_folder
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.server_checkpoints import ServerCheckpoints
from support.stores import client_state, server_state
from support.tiny_run import files_of_at_most


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
    assert state.shapes == {"a": (8, 8, 1)}
    assert torch.equal(state.shared.weights["w"], torch.full((64, 64), 3.0))


def test_a_checkpoint_that_somebody_set_aside_is_not_taken_for_one(tmp_path: Path) -> None:
    checkpoints = ServerCheckpoints(tmp_path / "server", 9)
    for number in range(2):
        checkpoints.save(server_state(number))
    (tmp_path / "server" / "round-00001").rename(tmp_path / "server" / "round-00001.damaged")
    assert checkpoints.load_last().round == 0


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

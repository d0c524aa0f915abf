"""Atomic files and stateless randomness."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srfed.errors import DamagedError, UserError
from srfed.files import (
    append_text,
    close_to_others,
    held,
    list_folder,
    make_folder,
    open_to_others,
    private,
    read_bytes,
    read_json,
    remove_folder,
    remove_leftovers,
    try_output,
    write_bytes,
    write_folder,
    write_json,
)
from srfed.randomness import derive_generator, derive_seed

# Files


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_write_bytes_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["state.bin"]


def test_write_json_is_readable_and_reads_back(tmp_path: Path) -> None:
    content = {"φ": [1, 2.5, None], "name": "größe"}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"format": 1, **content}
    assert "größe" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "state.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(UserError, match=r"^cannot write .*state\.bin: No space left on device$"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_write_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "client" / "7"
    write_folder(path, {"weights.safetensors": b"w", "manifest.json": b"m"})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        "weights.safetensors": b"w",
        "manifest.json": b"m",
    }
    assert os.listdir(path.parent) == ["7"]


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_a_failed_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(UserError, match=r"^cannot write .*attempt: No space left on device$"):
        write_folder(tmp_path / "attempt", {"a": b"1", "b": b"2"})
    assert os.listdir(tmp_path) == []


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "attempt"
    write_folder(path, {"a": b"old"})
    with pytest.raises(UserError, match="cannot write"):
        write_folder(path, {"a": b"new"})
    assert (path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["attempt"]


@pytest.mark.parametrize(
    "write", [lambda path: write_bytes(path, b"x"), lambda path: write_folder(path, {"a": b"x"})]
)
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot write .*file/below: "):
        write(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "write", [lambda path: write_bytes(path, b"x"), lambda path: write_folder(path, {"a": b"x"})]
)
def test_content_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """A rename may reach the disk before the bytes it names; only the fsync before it prevents
    that.
    """
    events: list[str] = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def note(*arguments: Any, name: str = name, real: Callable[..., None] = real) -> None:
            events.append(name)
            real(*arguments)

        monkeypatch.setattr(os, name, note)
    write(tmp_path / "target")
    renamed = next(i for i, event in enumerate(events) if event != "fsync")
    assert "fsync" in events[:renamed]
    assert events[renamed + 1 :] == ["fsync"]


STREWN = (".DS_Store", "._state.safetensors", ".nfs00000000000a", "Thumbs.db")


def test_a_folder_of_ours_goes_with_what_systems_strew_in_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "attempt", {"a": b"1"})
    for name in STREWN:
        (tmp_path / "attempt" / name).touch()
        (tmp_path / name).touch()
    assert list_folder(tmp_path) == ["attempt"]
    remove_folder(tmp_path / "attempt", ["a"])
    remove_folder(tmp_path / "attempt", ["a"])
    assert sorted(os.listdir(tmp_path)) == sorted(STREWN)


def test_what_somebody_has_put_into_a_folder_of_ours_is_not_removed_with_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "attempt", {"a": b"1"})
    (tmp_path / "attempt" / "notes.txt").write_text("mine")
    (tmp_path / "attempt" / "@eaDir").mkdir()
    remove_folder(tmp_path / "attempt", ["a"])
    remove_leftovers(tmp_path, ["a"])
    assert list_folder(tmp_path) == []
    (left,) = tmp_path.glob(".attempt.*.tmp")
    assert sorted(os.listdir(left)) == ["@eaDir", "notes.txt"]


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".round-1.0123abcd.tmp", "round-2", ".hidden", ".round-3.0123abcd.tmp.gz"):
        write_folder(tmp_path / name, {"a": b"1"})
    remove_leftovers(tmp_path, ["a"])
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".round-3.0123abcd.tmp.gz", "round-2"]
    remove_leftovers(tmp_path / "absent", ["a"])


READER = """
import resource, sys
from pathlib import Path
from srfed.files import list_folder, read_bytes
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
for read in (read_bytes, lambda path: list_folder(path.parent)):
    try:
        read(path)
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
"""


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    write_bytes(tmp_path / "state", b"x")
    there = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "state")],
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "Too many open files"
    assert there.stdout.splitlines() == [
        f"UserError: cannot read {tmp_path / 'state'}: {reason}",
        f"UserError: cannot read {tmp_path}: {reason}",
    ]
    with pytest.raises(DamagedError, match=r"cannot read .*absent: No such file"):
        read_bytes(tmp_path / "absent")
    assert list_folder(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ('{"format": 1, "round": 3}', None, ""),
        ('{"round": 3}', None, ""),
        ('{"format": 2, "round": 3}', UserError, "has format 2, which a newer srfed wrote"),
        ('{"steps": 3}', UserError, "is of an older srfed (format 0) and has no 'round'"),
        ('{"format": 1, "steps": 3}', DamagedError, "is damaged: it has no 'round'"),
        ('{"format": 1, "round": "3"}', DamagedError, "is damaged: 'round' is '3'"),
        ('{"format": 1, "round": true}', DamagedError, "is damaged: 'round' is True"),
        ('{"format": "new", "round": 3}', DamagedError, "is damaged: format is 'new'"),
        ('{"format": null, "round": 3}', DamagedError, "is damaged: format is None"),
        ('{"round": 3', DamagedError, "is damaged: "),
        ("[3]", DamagedError, "is damaged: it is no mapping"),
        ("\xe9", DamagedError, "is damaged: "),
    ],
)
def test_a_file_of_another_format_is_a_sentence(
    tmp_path: Path, text: str, kind: type[UserError] | None, expected: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    if kind is None:
        assert read_json(path, kinds={"round": int})["round"] == 3
        return
    with pytest.raises(UserError) as caught:
        read_json(path, kinds={"round": int})
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path} {expected}")


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_files_are_their_owners_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    close_to_others(tmp_path)
    previous = os.umask(mask)
    try:
        write_bytes(tmp_path / "state" / "a", b"x")
        write_json(tmp_path / "state" / "deep" / "b", {})
        append_text(tmp_path / "logs" / "c", "x")
        write_folder(tmp_path / "state" / "attempt", {"d": b"x"})
        with held(tmp_path / "state" / "lock", wait=False):
            pass
        append_text(tmp_path / "logs" / "c", "y")
    finally:
        os.umask(previous)
    with private():
        (tmp_path / "library").touch()
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    folders = {"state", "deep", "logs", "attempt"}
    assert modes == {name: "0o700" if name in folders else "0o600" for name in modes}
    assert len(modes) == 10
    assert (tmp_path / "logs" / "c").read_text() == "xy"
    assert os.umask(previous) == previous


def test_what_is_handed_out_goes_by_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new" / "a", b"x", private=False)
    finally:
        os.umask(previous)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "new/a")] == [0o750, 0o640]


def test_a_folder_that_others_can_read_is_said(tmp_path: Path) -> None:
    make_folder(tmp_path / "closed")
    assert open_to_others(tmp_path / "closed") is None
    assert open_to_others(tmp_path / "absent") is None
    (tmp_path / "closed").chmod(0o750)
    said = open_to_others(tmp_path / "closed")
    assert said is not None
    assert said.endswith(f"(mode 0750); close it: chmod -R go= {tmp_path / 'closed'}")


def failing_sync_of_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing_sync_of_folders(monkeypatch, number)
    write_bytes(tmp_path / "a", b"x")
    write_folder(tmp_path / "b", {"c": b"x"})
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_file_that_is_there_is_not_said_to_be_impossible_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_sync_of_folders(monkeypatch, errno.EIO)
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/a is written, but whether it is on disk is not known: Input/",
    ):
        write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once_and_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for wait in (False, True):
        with held(tmp_path / "lock", wait=wait):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path} is on a file system without locks ({os.strerror(number)})")


def test_a_lock_that_fails_for_another_reason_is_not_called_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"cannot lock .*lock: Input/output error"),
        held(tmp_path / "lock", wait=False),
    ):
        pass


MAKER = """
import sys, time
from pathlib import Path
from srfed.files import new_folder
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 4:
    time.sleep(0.001)
print(new_folder(folder / "new" / "run").name)
"""


def test_processes_that_want_the_same_new_folder_get_one_each(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, str(tmp_path), str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    names = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(names) == ["run", "run-2", "run-3", "run-4"]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(names)


def test_an_output_is_tried_and_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    try_output(None)
    try_output(tmp_path / "new" / "grid.png")
    (tmp_path / "file").write_text("old")
    try_output(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new"]
    assert (tmp_path / "file").read_text() == "old"
    for path in (tmp_path, Path(), Path("/"), tmp_path / "file" / "below"):
        for attempt in (lambda path: try_output(path), lambda path: write_bytes(path, b"x")):
            with pytest.raises(UserError, match=f"^cannot write {path}: "):
                attempt(path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new"]


# Randomness


def test_seeds_are_pinned() -> None:
    """Checkpoints written by an older version continue with the same draws only while these
    stand.
    """
    assert derive_seed(0, "noise") == 7207491209231784873
    assert derive_seed(0, "noise", "digit-3", 12) == 6875758049331118814


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from srfed.randomness import derive_seed; print(derive_seed(5, 'noise', 'digit-3', 12))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == derive_seed(5, "noise", "digit-3", 12)


def test_every_part_of_the_name_counts() -> None:
    names: list[tuple[Any, ...]] = [
        (0, "noise"),
        (1, "noise"),
        (0, "batch order"),
        (0, "noise", 1),
        (0, "noise", "1"),
        (0, "noise", 1, 2),
        (0, "noise", 12),
        (0, "noise", 2, 1),
        (0, "noise", "1, 2"),
        (0, "noise", "1', '2"),
        (0, "noise", "1", "2"),
    ]
    for one, other in combinations(names, 2):
        assert derive_seed(*one) != derive_seed(*other)


@given(st.integers(), st.text(), st.lists(st.text() | st.integers()))
def test_any_name_gives_a_seed_that_a_generator_takes(
    seed: int, purpose: str, parts: list[str | int]
) -> None:
    derived = derive_seed(seed, purpose, *parts)
    assert 0 <= derived < 2**63
    assert derive_generator(seed, purpose, *parts).initial_seed() == derived


def test_a_generator_repeats_its_draws_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (
        torch.randn(64, generator=derive_generator(0, "noise", step)) for step in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_neighbouring_steps_are_independent() -> None:
    draws = torch.stack(
        [torch.randn(2000, generator=derive_generator(0, "noise", step)) for step in range(20)]
    )
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 5 / 2000**0.5

"""Atomic files and stateless randomness."""

import json
import os
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

from srfed.errors import UserError
from srfed.files import write_bytes, write_folder, write_json
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
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
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
def test_a_failed_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
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


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b"x"), lambda path: write_folder(path, {"a": b"x"})])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot write .*file/below: "):
        write(tmp_path / "file" / "below")


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b"x"), lambda path: write_folder(path, {"a": b"x"})])
def test_content_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """A rename may reach the disk before the bytes it names; only the fsync before it prevents that."""
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


# Randomness


def test_seeds_are_pinned() -> None:
    """Checkpoints written by an older version continue with the same draws only while these stand."""
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
def test_any_name_gives_a_seed_that_a_generator_takes(seed: int, purpose: str, parts: list[str | int]) -> None:
    derived = derive_seed(seed, purpose, *parts)
    assert 0 <= derived < 2**63
    assert derive_generator(seed, purpose, *parts).initial_seed() == derived


def test_a_generator_repeats_its_draws_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (torch.randn(64, generator=derive_generator(0, "noise", step)) for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_neighbouring_steps_are_independent() -> None:
    draws = torch.stack([torch.randn(2000, generator=derive_generator(0, "noise", step)) for step in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 5 / 2000**0.5

"""Tensors on disk, against what safetensors itself reads and writes."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from srfed.errors import DamagedError
from srfed.storage.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from srfed.storage.manifest import MANIFEST_FILE, STATE_FILE, read_manifest, rewrite_manifest

GROUPS = {
    "b": {"z": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7.0)},
    "a": {"codes": torch.tensor([[-1], [3]], dtype=torch.int8), "none": torch.zeros(0, 4)},
    "c": {"exact": torch.rand(5, dtype=torch.float64), "half": torch.ones(3, dtype=torch.bfloat16)},
    "without": {},
}


def test_what_is_written_is_read_by_name_and_whatever_its_memory_was(tmp_path: Path) -> None:
    strided = torch.arange(12.0).reshape(3, 4).T
    groups = {**GROUPS, "d": {"strided": strided, "part": torch.arange(9.0)[2:5]}}
    write_checkpoint(tmp_path / "c", Checkpoint(groups, {"round": 3}))
    read = read_checkpoint(tmp_path / "c", {"round": int})
    assert read.manifest["round"] == 3
    assert list(read.groups) == ["a", "b", "c", "d"]
    assert read.group("without") == {}
    assert [list(members) for members in read.groups.values()] == [
        sorted(groups[group]) for group in read.groups
    ]
    for group, members in read.groups.items():
        for name, tensor in members.items():
            assert tensor.dtype == groups[group][name].dtype
            assert torch.equal(tensor, groups[group][name])


def test_a_file_has_one_array_a_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", Checkpoint(GROUPS, {}))
    stored = safetensors.torch.load_file(tmp_path / "c" / STATE_FILE)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        "float32": (7,),
        "int8": (2,),
        "float64": (5,),
        "bfloat16": (3,),
    }
    # By name, in each group.
    assert torch.equal(stored["float32"], torch.tensor([7.0, 0, 1, 2, 3, 4, 5]))


def test_equal_bits_make_an_equal_file_in_whatever_order_they_are_at_hand(tmp_path: Path) -> None:
    """Straight on they are in the partition's order, after a checkpoint in that of their names."""
    turned = {group: dict(reversed(members.items())) for group, members in GROUPS.items()}
    for name, groups in (("here", GROUPS), ("there", turned)):
        write_checkpoint(tmp_path / name, Checkpoint(groups, {}))
    first, second = (read_checkpoint(tmp_path / name) for name in ("here", "there"))
    assert first.manifest["sha256"] == second.manifest["sha256"]


def write_as_told(
    folder: Path, tensors: dict[str, torch.Tensor], version: int, layout: str = ""
) -> None:
    """A checkpoint's folder by hand, with the hash that belongs to it."""
    folder.mkdir()
    state = safetensors.torch.save(tensors, metadata={"layout": layout} if layout else None)
    (folder / STATE_FILE).write_bytes(state)
    manifest = {"format": version, "round": 1, "sha256": hashlib.sha256(state).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def test_a_checkpoint_of_the_format_before_is_read(tmp_path: Path) -> None:
    tensors = {
        f"{group}:{name}": tensor
        for group, members in GROUPS.items()
        for name, tensor in members.items()
    }
    write_as_told(tmp_path / "old", tensors, 1)
    write_checkpoint(tmp_path / "new", Checkpoint(GROUPS, {}))
    old, new = (read_checkpoint(tmp_path / name).groups for name in ("old", "new"))
    assert [list(members) for members in old.values()] == [list(m) for m in new.values()]
    assert all(
        torch.equal(old[group][name], new[group][name]) for group in new for name in new[group]
    )


@pytest.mark.parametrize(
    "layout",
    [
        [["a", "x", "float32", [2]]],
        [["a", "x", "float32", [4]]],
        [["a", "x", "int8", [3]]],
        [["a", "x", "float32", "3"]],
        [3],
    ],
)
def test_a_layout_that_does_not_fit_is_damage(tmp_path: Path, layout: list[object]) -> None:
    write_as_told(tmp_path / "c", {"float32": torch.ones(3)}, 2, json.dumps(layout))
    with pytest.raises(DamagedError, match="is damaged"):
        read_checkpoint(tmp_path / "c")
    values = torch.ones(3).numpy().tobytes()
    digest = hashlib.sha256(json.dumps(layout).encode() + values).hexdigest()
    about = {"format": "3", "sha256": digest, "manifest": "{}", "layout": json.dumps(layout)}
    (tmp_path / "d").mkdir()
    state = safetensors.torch.save({"float32": torch.ones(3)}, about)
    (tmp_path / "d" / STATE_FILE).write_bytes(state)
    with pytest.raises(DamagedError, match="is damaged"):
        read_checkpoint(tmp_path / "d")


def test_the_hash_is_of_layout_and_values_and_the_manifest_is_in_the_header(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", Checkpoint(GROUPS, {"round": 3, "name": "ä"}))
    assert [file.name for file in (tmp_path / "c").iterdir()] == [STATE_FILE]
    with safe_open(tmp_path / "c" / STATE_FILE, "numpy") as file:
        about = file.metadata()
    content = (tmp_path / "c" / STATE_FILE).read_bytes()
    values = content[8 + int.from_bytes(content[:8], "little") :]
    digest = hashlib.sha256(about["layout"].encode() + values).hexdigest()
    assert digest == about["sha256"] == read_manifest(tmp_path / "c")["sha256"]
    assert json.loads(about["manifest"]) == {"round": 3, "name": "ä"}


def test_a_manifest_that_is_rewritten_leaves_the_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", Checkpoint(GROUPS, {"round": 3}))
    before = read_checkpoint(tmp_path / "c")
    rewrite_manifest(tmp_path / "c", {**before.manifest, "round": 4, "more": "x" * 1000})
    after = read_checkpoint(tmp_path / "c", {"more": str})
    assert after.manifest == {**before.manifest, "round": 4, "more": "x" * 1000}
    assert torch.equal(after.groups["b"]["z"], GROUPS["b"]["z"])


@pytest.mark.parametrize("place", [-1, 200])
def test_a_file_that_changed_after_it_was_found_sound_is_looked_at_again(
    tmp_path: Path, place: int
) -> None:
    state = tmp_path / "c" / STATE_FILE
    write_checkpoint(tmp_path / "c", Checkpoint(GROUPS, {}))
    read_checkpoint(tmp_path / "c")
    written = state.stat().st_ctime_ns
    content = bytearray(state.read_bytes())
    content[place] ^= 1
    while state.stat().st_ctime_ns == written:  # a clock may be coarse
        state.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged"):
        read_checkpoint(tmp_path / "c")
    state.write_bytes(content[:-3])
    with pytest.raises(DamagedError, match="is damaged"):
        read_checkpoint(tmp_path / "c")

"""A run that was edited, damaged, made by another srfed or cannot be read: one sentence of every
command.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from srfed import simulate
from srfed.commands import adapt, evaluate, sample
from srfed.config.run import fingerprint_of
from srfed.runs.run import TrainedRun
from srfed.storage.checkpoint import read_checkpoint, write_checkpoint
from srfed.storage.manifest import MANIFEST_FILE, STATE_FILE
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.errors import one_error_line
from support.stores import edit_manifest, write_as_before
from support.tiny_run import round_lines

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


def test_a_checkpoint_that_cannot_be_read_now_is_not_advised_to_be_removed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == STATE_FILE and path.parent.name == "round-00003":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
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
    for state in copy.rglob(STATE_FILE):
        write_as_before(state.parent, None)
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


@pytest.mark.parametrize("file", ["run.json", f"server/round-00003/{STATE_FILE}"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_run_of_a_newer_srfed_is_refused(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str
) -> None:
    content = (copy / file).read_bytes()
    newer, count = re.subn(rb'("format": ?"?)\d', rb"\g<1>9", content, count=1)
    assert count == 1
    (copy / file).write_bytes(newer)
    if name == "resume":
        MetricsLog(copy / "metrics.jsonl").begin(2, [])
    line = error_of(name, copy, tmp_path / "out", capsys)
    assert f"{copy / file} has format 9, which a newer srfed wrote" in line
    assert "remove" not in line


@pytest.mark.parametrize("key", ["lineage", "round", "attempts"])
def test_a_checkpoint_without_a_key_is_a_sentence(
    copy: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = copy / "server" / "round-00003"
    whole = Path(shutil.copytree(folder, copy / "whole"))
    edit_manifest(folder, lambda manifest: manifest.pop(key))
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=4"])
    assert (
        f"{folder / STATE_FILE} is damaged: it has no '{key}'; remove {folder} to go back to round "
        "2" in text
    )
    shutil.rmtree(folder)
    whole.rename(folder)
    write_as_before(folder, None, without=[key])
    text = one_error_line(capsys, ["--resume", str(copy), "--set", "federation.rounds=4"])
    assert f"{folder / MANIFEST_FILE} is of an older srfed (format 0) and has no '{key}'" in text


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

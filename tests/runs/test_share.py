"""A copy of a run holds no real image and no θ but those that were asked for: all of it is
searched.
"""

import base64
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from srfed.data import load_tasks
from srfed.data.stored import store_tasks
from srfed.data.tasks import Task
from srfed.runs.share import share_run
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.errors import message_of
from support.tiny_run import accepted_attempts

SIDE, ENLARGED = 8, 7
"""A digit, and how many times it is enlarged in a picture."""


@pytest.fixture
def run(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A run as rich as there are: with a report, scores, pairs, and its images beside it."""
    run = RunFolder.open(Path(shutil.copytree(finished_run.path, tmp_path / "run")))
    assert run_here("report", run.path).returncode == 0
    store_tasks(run.path / "tasks.npz", load_tasks(run.config.data, 3))
    evaluation = run.path / "evaluations" / "key"
    evaluation.mkdir(parents=True)
    (evaluation / "scores.json").write_text(
        f'{{"format": 1, "scores": [1.5], "run": "{run.path}"}}'
    )
    (run.path / "notes.txt").write_text("ours")
    return run


def pictures(path: Path) -> Iterator[np.ndarray]:
    """Every picture in a file, whatever holds it."""
    content = path.read_bytes()
    found = [content] if content.startswith(b"\x89PNG") else []
    found += map(base64.b64decode, re.findall(rb"image/png;base64,([A-Za-z0-9+/=]+)", content))
    yield from (np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in found)


def real_images_in(folder: Path, tasks: list[Task]) -> dict[str, int]:
    """How many real images each file of a folder shows as a picture, or holds as it is."""
    images = np.concatenate([side for task in tasks for side in (task.train, task.test)])
    wanted = {image.tobytes() for image in images}
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        seen = set()
        for picture in pictures(path):
            windows = sliding_window_view(picture, (ENLARGED * (SIDE - 1) + 1,) * 2)
            small = np.ascontiguousarray(windows[..., ::ENLARGED, ::ENLARGED])
            seen |= set(small.reshape(-1, SIDE * SIDE).view(f"V{SIDE * SIDE}")[:, 0].tolist())
        contents = [path.read_bytes()]
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                contents += [arrays[name].tobytes() for name in arrays]
        seen |= {image for image in wanted for content in contents if image in content}
        if seen & wanted:
            found[str(path.relative_to(folder))] = len(seen & wanted)
    return found


def own_tensors(run: RunFolder, client: str) -> dict[str, bytes]:
    """All that a client's store has, by group and name, but for what has hardly any values."""
    return {
        f"{group}:{name}": tensor.numpy().tobytes()
        for group, members in read_checkpoint(accepted_attempts(run)[client]).groups.items()
        for name, tensor in members.items()
        if tensor.unique().numel() > 8
    }


def found_in(folder: Path, tensors: Mapping[str, bytes]) -> set[str]:
    """Which of these tensors there are in a folder's files, wherever in them."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {name for name, tensor in tensors.items() if any(tensor in file for file in files)}


def test_a_copy_has_no_real_image_and_no_theta(run: RunFolder, tmp_path: Path) -> None:
    tasks = load_tasks(run.config.data, 3)
    found = real_images_in(run.path, tasks)
    pairs = [f"clients/{task.name}/memorisation/round-00003.png" for task in tasks]
    assert {*found} == {"report.html", "tasks.npz", *pairs}
    assert found["report.html"] == 3 * run.config.evaluation.grid_columns
    assert found["tasks.npz"] == sum(len(task.train) + len(task.test) for task in tasks)
    done = run_here("share", "run", "copy", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copy"
    assert real_images_in(copy, tasks) == {}
    for task in tasks:
        own = own_tensors(run, task.name)
        assert found_in(run.path / "clients" / task.name, own) == {*own} != set()
        assert not found_in(copy, own)
    for what in ("θ of digit-0, digit-1, digit-2", "memorisation/", "tasks.npz", "notes.txt"):
        assert what in done.stdout
        assert what in (copy / "README.txt").read_text()
    assert {path.name for path in copy.iterdir()} == {
        *("README.txt", "config.yaml", "evaluations", "metrics.jsonl", "report.html", "run.json"),
        *("samples", "server", "share.json"),
    }
    # And no way back to where it was made.
    assert not [
        path
        for path in copy.rglob("*")
        if path.is_file() and str(tmp_path).encode() in path.read_bytes()
    ]
    page = (copy / "report.html").read_text()
    assert "Real images are not shown" in page
    assert "3 owners, a federation, a copy to pass on" in page
    assert f"<h1>{copy.name}</h1>" in page
    pngs = {path.name for path in (run.path / "samples").iterdir()}
    assert {path.name for path in (copy / "samples").iterdir()} == pngs != set()
    assert MetricsLog(copy / "metrics.jsonl").path.read_bytes() == run.metrics.read_bytes()


def test_the_owner_who_is_named_can_be_sampled_and_nobody_else(
    run: RunFolder, tmp_path: Path
) -> None:
    assert run_here("share", "run", "copy", "--task", "digit-1", folder=tmp_path).returncode == 0
    copy = tmp_path / "copy"
    assert real_images_in(copy, load_tasks(run.config.data, 3)) == {}
    own = own_tensors(run, "digit-1")
    # Weights and moments say more of the images than a model needs.
    averages = {name for name in own if name.startswith("exclusive_average:")}
    assert found_in(copy, own) == averages != set()
    for other in ("digit-0", "digit-2"):
        assert not found_in(copy, own_tensors(run, other))
    images = []
    for where, task in (("run", ["--task", "digit-1"]), ("copy", [])):
        asked = ("--run", where, *task, "--n", 2, "--npz", f"{where}.npz")
        done = run_here("sample", *asked, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{where}.npz") as arrays:
            images.append(arrays["images"])
    assert (images[0] == images[1]).all()
    done = run_here("sample", "--run", "copy", "--task", "digit-0", folder=tmp_path)
    assert done.returncode == 2
    assert "is a copy without θ of 'digit-0'" in done.stderr
    assert "srfed sample --run copy --task digit-1" in (copy / "report.html").read_text()
    resumed = run_here("simulate", "--resume", "copy", folder=tmp_path)
    assert resumed.returncode == 2
    assert "cannot go on" in resumed.stderr


def test_a_copying_owner_is_named_before_the_copy_is_passed_on(
    run: RunFolder, tmp_path: Path
) -> None:
    text = run.metrics.read_text()
    run.metrics.write_text(text.replace('"fires": false', '"fires": true', 1))
    assert "fires" in text
    (warning,) = share_run(run.path, tmp_path / "copy").warnings
    assert "memorisation audit fires for digit-0" in warning
    assert warning in (tmp_path / "copy" / "README.txt").read_text()


def test_what_cannot_be_shared_leaves_nothing(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    assert "is not an empty folder" in message_of(share_run, run.path, run.path)
    assert "lies in" in message_of(share_run, run.path, run.path / "copy")
    assert "'digit-7' is not in this run" in message_of(share_run, run.path, out, ["digit-7"])
    with run.in_use():
        assert "is in use by another process" in message_of(share_run, run.path, out)

    def full(_: RunFolder) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("srfed.runs.share.write_report", full)
    assert "No space left on device" in message_of(share_run, run.path, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

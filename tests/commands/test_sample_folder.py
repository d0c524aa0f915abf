"""``srfed sample --folder``: images as files, which another library reads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from srfed.reporting.pictures import folder_names
from srfed.storage.run_folder import RunFolder
from support.commands import run_here


def test_the_folder_has_for_torchvision_the_images_that_the_arrays_have(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    asked = ("--task", "digit-2", "0", "--n", 3, "--folder", "out", "--npz", "out.npz")
    done = run_here("sample", "--run", finished_run.path, *asked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as files: out" in done.stdout
    with np.load(tmp_path / "out.npz") as arrays:
        expected = {
            task: arrays["images"][arrays["tasks"] == task] for task in ("digit-0", "digit-2")
        }
    found = ImageFolder(
        str(tmp_path / "out"), loader=lambda path: np.asarray(Image.open(path))[..., None]
    )
    assert found.classes == [*expected], "and no task that nobody has asked for"
    assert (np.stack([image for image, _ in found]) == np.concatenate([*expected.values()])).all()
    assert [label for _, label in found] == [0, 0, 0, 1, 1, 1]

    again = run_here("sample", "--run", finished_run.path, *asked, folder=tmp_path)
    assert again.returncode == 2
    assert again.stderr == ("error: out is not an empty folder; name another one, new or empty\n")


def test_half_a_folder_is_none(
    finished_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, number = Image.Image.save, iter(range(9))

    def full(self: Image.Image, where: object, *more: object, **named: object) -> None:
        if isinstance(where, Path) and next(number) == 3:
            raise OSError(28, "No space left on device")
        whole(self, where, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", full)
    done = run_here(
        "sample", "--run", finished_run.path, "--n", 2, "--folder", "out", folder=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write out: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


def test_no_file_system_takes_two_tasks_for_one() -> None:
    titles = ["a/b", "A", "a", "a_b", "con", "..", "Zürich 1", "x" * 300, "nul.png"]
    names = folder_names(titles)
    assert names[:4] == ["a_b-2", "A", "a-2", "a_b"], "who has a plain name keeps it"
    assert names[4:7] == ["_con", "_", "Z_rich_1"]
    assert len({name.casefold() for name in names}) == len(titles)
    assert all(len(name) <= 110 for name in names)

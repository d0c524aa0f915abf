"""The examples run, small, and print what they promise."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import srfed
from srfed.data import load_tasks
from support.tiny_run import CHEAP, TINY, tiny_config

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = [
    f"{name}={value}"
    for name, value in (
        *((f"model.{key}", value) for key, value in TINY["model"].items()),
        *((f"resources.{key}", value) for key, value in TINY["resources"].items()),
        *CHEAP.items(),
        ("evaluation.ssim_timestep", 5),
        ("evaluation.ssim_curve", []),
        ("evaluation.samples_between", 6),
        ("training.local_steps", 1),
        ("federation.rounds", 1),
        ("federation.clients", 3),
    )
]


def cells(text: str) -> list[str]:
    """Of a notebook in percent format."""
    return re.split(r"^# %%.*$", text, flags=re.MULTILINE)


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in cells((EXAMPLES / "notebook.py").read_text()):
        exec(cell, names)
        if "run" not in names and "settings" in names:
            names |= {"settings": SMALL, "count": 12}
    run, second = names["run"], names["second"]
    assert (run.round, second.round) == (1, 1)
    assert second.tasks == ["digit-4", "digit-9"]
    assert (second.path / "start").is_dir()
    assert names["sheet"].shape == (3 * 8, 8 * 8, 1)
    owners = {f"digit-{label}" for label in (0, 1, 7)}
    assert set(names["gaps"]) == {"all", *owners}
    assert "loss by round" in capsys.readouterr().out


def test_a_folder_of_ones_own_trains_through_torch_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for owner in ("east", "west"):
        (tmp_path / "photos" / owner).mkdir(parents=True)
        for number in range(9):
            Image.fromarray(rng.integers(0, 256, (20, 18, 3), np.uint8)).save(
                tmp_path / "photos" / owner / f"{number}.png"
            )
    program = EXAMPLES / "own_folder.py"
    words = [str(program), str(tmp_path / "photos"), str(tmp_path / "run"), *SMALL]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^round 1: loss \d", said, re.MULTILINE)
    assert "east, west; (4, 16, 16, 3) uint8" in said


def test_the_downstream_classifier_prints_its_score_beside_that_of_real_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config({**CHEAP, "federation.rounds": 1, "training.local_steps": 1})
    run = srfed.train(config, run_dir=tmp_path / "run")
    example = runpy.run_path(str(EXAMPLES / "downstream_classifier.py"))
    example["main"]([str(run.path), "6"])
    said = capsys.readouterr().out
    scores = [float(found) for found in re.findall(r": +(\d\.\d{3})$", said, re.MULTILINE)]
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
    # Another classifier on the same images comes to about the same: zeros, ones and twos are easy.
    tasks = load_tasks(config.data, 3)
    train, test = ([getattr(task, side) for task in tasks] for side in ("train", "test"))
    labels = np.repeat(np.arange(3), [len(own) for own in test])
    nearest = KNeighborsClassifier(1).fit(
        np.concatenate([own[:6] for own in train]).reshape(18, -1), np.repeat(np.arange(3), 6)
    )
    other = nearest.score(np.concatenate(test).reshape(len(labels), -1), labels)
    assert scores[0] == pytest.approx(other, abs=0.1)
    assert example["accuracy"](train, test) > 0.9
    assert example["accuracy"]([own[::-1] for own in reversed(train)], test) < 0.5

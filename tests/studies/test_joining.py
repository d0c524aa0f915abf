"""The study of joining: best rounds, a kill anywhere, the sets of owners, tables, bad input."""

import csv
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simulations import joining as command
from srfed.config import RunConfig, load_config
from srfed.config.presets import preset_file
from srfed.data import Task, load_tasks
from srfed.errors import UserError
from srfed.evaluation.metrics.denoising_loss import MOMENTS, mean_loss, paired_ratio
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.runs.run import TrainedRun
from srfed.storage.checkpoint import read_arrays
from srfed.storage.run_folder import RunFolder
from srfed.studies import best_rounds as keeping
from srfed.studies import judged
from srfed.studies.best_rounds import (
    BestRounds,
    best_file,
    best_rounds,
    groups_of,
    has_passed,
    read_history,
)
from srfed.studies.cases import change
from srfed.studies.gains import (
    add_row,
    describe_worth,
    gap_closed,
    report,
    row_of,
    worth_of_images,
)
from srfed.studies.joining import COMMON, OWN_RATES, SIDES, Cell, alone_with, cells
from srfed.studies.judged import recognised, train_judged
from srfed.studies.owners import LAB_TEST_IMAGES, SETS, kinds_of
from support.images import random_images, save
from support.tiny_study import tiny_base

OWNERS = ("digit-0", "digit-1", "digit-2")
ASKED = {"every": 1, "samples": 4, "test_images": 6}
CLOCK = {"core_seconds"}


HOW_LONG = "training.decay_rounds"


def tiny_cells(rounds: int = 2) -> dict[str, Cell]:
    return {cell.side: cell for cell in cells("digits", tiny_base(rounds), ASKED, [0], OWN_RATES)}


def without_clock(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key not in CLOCK}


# --- The sides ---


def test_the_sides_differ_in_what_is_shared_and_in_nothing_else() -> None:
    found = {side: cell.config.settings() for side, cell in tiny_cells().items()}
    assert tuple(found) == SIDES
    differing = {
        name for name in found["alone"] if len({str(found[side][name]) for side in SIDES}) > 1
    }
    allowed = {
        "model.exclusive_stages",
        "model.owned",
        "training.method",
        "training.centralised_batch_size",
        "training.exclusive_learning_rate",
        "training.control_variates",
        "federation.server_optimizer",
        "federation.server_momentum",
    }
    assert differing <= allowed
    rates = {side: found[side]["training.exclusive_learning_rate"] for side in SIDES}
    assert rates == pytest.approx({"alone": 3e-3, "paper": 3e-3, "together": 3e-2, "pooled": 3e-2})
    assert found["pooled"]["training.centralised_batch_size"] == 3 * 8
    assert found["together"]["training.learning_rate"] == 3e-3
    assert [side for side in SIDES if found[side]["training.control_variates"]] == ["together"]
    served = {side: found[side]["federation.server_optimizer"] for side in SIDES}
    assert served == {side: "momentum" if side == "together" else "average" for side in SIDES}


def test_the_preset_is_the_side_that_the_study_calls_together() -> None:
    """But for the images, how long it takes, and what decides nothing."""
    base = change(RunConfig(), **COMMON)
    (cell,) = cells("digits", base, ASKED, [0], OWN_RATES, ["together"])
    there = cell.config.settings()
    here = load_config(preset_file("few_images")).settings()
    for name in here:
        section = name.split(".")[0]
        if section in ("model", "diffusion", "training", "updates") and name != HOW_LONG:
            assert here[name] == there[name], name
    for name in ("optimizer", "momentum", "learning_rate"):
        assert here[f"federation.server_{name}"] == there[f"federation.server_{name}"]


# --- Best rounds ---


def test_each_group_has_the_first_of_its_best_rounds() -> None:
    nan, inf = float("nan"), float("inf")
    history = {
        2: {"a": 0.5, "b": 0.1},
        4: {"a": 0.2, "b": 0.4},
        6: {"a": 0.2, "b": nan},
        8: {"a": inf, "b": 0.1},
    }
    tasks = [Task(name, random_images(2, 8, 8, 1), random_images(2, 8, 8, 1)) for name in "ab"]
    assert best_rounds(history, groups_of(tasks, apart=True)) == {"a": 4, "b": 2}
    # Means .3, .3, not finite, not finite.
    assert best_rounds(history, groups_of(tasks, apart=False)) == {"all": 2}
    with pytest.raises(UserError, match="the validation loss of b was finite in no round"):
        best_rounds({2: {"a": 0.1, "b": nan}}, groups_of(tasks, apart=True))


def test_patience_is_over_when_no_group_has_been_better_for_so_long() -> None:
    history = {2: {"a": 0.5, "b": 0.5}, 4: {"a": 0.75, "b": 0.25}, 6: {"a": 0.75, "b": 0.25}}
    apart, together = {"a": ["a"], "b": ["b"]}, {"all": ["a", "b"]}
    # The best rounds: a 2, b the first of 4 and 6, both together 2, as all have a mean of .5.
    assert has_passed(history, apart, 2)
    assert not has_passed(history, apart, 3)
    assert has_passed(history, together, 4)
    assert not has_passed(history, together, 0)
    assert not has_passed({}, together, 1)


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_ends_when_patience_does_and_is_judged_as_if_that_were_all(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made up: every owner's are least after round 1."""
    real, folder = keeping.denoising_losses, tmp_path / "run"

    def losses(*arguments: Any, task: str, seed: int) -> np.ndarray:
        found = real(*arguments, task=task, seed=seed)
        return np.full_like(found, TrainedRun(folder, cell.config.resources).round)

    monkeypatch.setattr(keeping, "denoising_losses", losses)
    cell = tiny_cells(4)["together"]
    judging = replace(cell.judging, patience=2)
    if killed:
        with pytest.raises(KilledError):
            train_judged(folder, cell.config, judging, [Recorder(folder, kill_after=3)])
    outcome = train_judged(folder, cell.config, judging)
    assert outcome["rounds"] == 3
    assert outcome["asked_rounds"] == 4
    assert {owner["round"] for owner in outcome["owners"].values()} == {1}


class KilledError(Exception):
    pass


class Recorder(Observer):
    """Notes every round's averages, and kills the run after some round."""

    def __init__(self, run: Path, kill_after: int | None = None) -> None:
        self.run, self.kill_after = run, kill_after
        self.seen: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def on_round(self, record: RoundRecord) -> None:
        trained = TrainedRun(self.run, RunFolder.open(self.run).config.resources)
        for info in trained.tasks:
            own = trained.exclusive_of(info)
            self.seen[record.round, info.task] = {**trained.shared, **own}
        if record.round == self.kill_after:
            raise KilledError


@pytest.mark.parametrize("side", ["alone", "together"])
def test_the_weights_of_the_best_rounds_are_kept_each_owners_own_where_it_is_alone(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made up: owner k's is least after round k + 1, the mean after round 2."""
    real, folder = keeping.denoising_losses, tmp_path / "run"
    made_up = {
        "digit-0": {1: 0.1, 2: 0.2, 3: 0.5},
        "digit-1": {1: 0.5, 2: 0.1, 3: 0.4},
        "digit-2": {1: 0.6, 2: 0.5, 3: 0.3},
    }

    def losses(*arguments: Any, task: str, seed: int) -> np.ndarray:
        found = real(*arguments, task=task, seed=seed)
        number = TrainedRun(folder, cell.config.resources).round
        return np.full_like(found, made_up[task][number])

    cell = tiny_cells(3)[side]
    monkeypatch.setattr(keeping, "denoising_losses", losses)
    recorder = Recorder(folder)
    outcome = train_judged(folder, cell.config, cell.judging, [recorder])
    rounds = {name: owner["round"] for name, owner in outcome["owners"].items()}
    expected = dict(zip(OWNERS, (1, 2, 3) if side == "alone" else (2, 2, 2), strict=True))
    assert rounds == expected
    for name, number in expected.items():
        group = name if side == "alone" else "all"
        kept, about = read_arrays(best_file(RunFolder.open(folder), group))
        assert about["round"] == str(number)
        for tensor_name, tensor in recorder.seen[number, name].items():
            found = kept.get(f"shared:{tensor_name}", kept.get(f"{name}:{tensor_name}"))
            np.testing.assert_array_equal(found, tensor.numpy())
    assert [outcome["history"][str(n)] for n in (1, 2, 3)] == pytest.approx([0.4, 0.8 / 3, 0.4])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        side: train_judged(folder / side, cell.config, cell.judging)
        for side, cell in tiny_cells().items()
    }


@pytest.mark.parametrize(
    ("side", "where"),
    [
        *((side, "before the round is judged") for side in ("alone", "together", "pooled")),
        ("alone", "after it"),
        ("alone", "in its history"),
    ],
)
def test_a_killed_run_ends_with_the_same_figures(
    undisturbed: dict[str, dict[str, Any]],
    side: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell, folder = tiny_cells()[side], tmp_path / "run"
    with monkeypatch.context() as patch:

        def kill(*arguments: Any, **options: Any) -> None:
            raise KilledError

        if where == "before the round is judged":
            patch.setattr(BestRounds, "on_round", kill)
        elif where == "in its history":
            # The weights are written, the history is not.
            patch.setattr(keeping, "write_json", kill)
        with pytest.raises(KilledError):
            train_judged(folder, cell.config, cell.judging, [Recorder(folder, kill_after=1)])
    assert not (folder / judged.OUTCOME_FILE).exists()
    outcome = train_judged(folder, cell.config, cell.judging)
    assert without_clock(outcome) == without_clock(undisturbed[side])
    again = train_judged(folder, cell.config, cell.judging)
    assert without_clock(again) == without_clock(outcome), "nothing is trained anew"
    assert sorted(read_history(RunFolder.open(folder))) == [1, 2]


def test_an_outcome_says_everything_of_every_owner(
    undisturbed: dict[str, dict[str, Any]],
) -> None:
    for side, outcome in undisturbed.items():
        assert tuple(outcome["owners"]) == OWNERS
        for owner in outcome["owners"].values():
            losses = np.array(owner["losses"])
            assert losses.shape == (6, MOMENTS)
            assert owner["loss"] == mean_loss(losses)
            assert owner["low"] > owner["high"] > 0
            assert 0 <= owner["recognised"] <= 1
            assert owner["frechet"] > 0
            assert -1 <= owner["ssim"] <= 1
            assert owner["copies"] > 0
        assert outcome["images_per_owner"] == 12
        assert (outcome["bytes"] > 100_000) is (side in ("paper", "together"))
        assert (outcome["parameters"]["shared"] == 0) is (side == "alone")
    losses = [outcome["owners"]["digit-0"]["loss"] for outcome in undisturbed.values()]
    assert len({*losses}) == 4


# --- Rows and tables ---


def made_up_outcome(base: dict[str, Any], factor: float) -> dict[str, Any]:
    """An outcome whose losses are others'."""
    content = json.loads(json.dumps(base))
    for owner in content["owners"].values():
        owner["losses"] = (factor * np.array(owner["losses"])).tolist()
        owner["loss"] *= factor
    return content


def test_the_report_says_what_joining_is_worth(
    undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    asked = [cell for cell in cells("digits", tiny_base(), ASKED, range(2), OWN_RATES)]
    factors = {"alone": 1.0, "paper": 0.95, "together": 0.85, "pooled": 0.8}
    outcomes = [made_up_outcome(undisturbed["alone"], factors[cell.side]) for cell in asked]
    outcomes[0]["owners"]["digit-1"]["copies"] = None
    text = report(asked, outcomes, tmp_path)
    assert (tmp_path / "sides.md").read_text() == text
    rows = read_rows(tmp_path / "sides.csv")
    assert [(row["seed"], row["side"]) for row in rows] == [(s, n) for s in "01" for n in SIDES]
    assert [float(row["gap_closed"]) for row in rows[:4]] == pytest.approx([0, 0.25, 0.75, 1])
    assert [float(row["alone_over_it"]) for row in rows[:4]] == pytest.approx(
        [1, 1 / 0.95, 1 / 0.85, 1 / 0.8]
    )
    owners = read_rows(tmp_path / "owners.csv")
    assert len(owners) == 2 * 4 * 3
    assert owners[1]["copies"] == ""
    ratio = paired_ratio(
        [np.array(outcomes[0]["owners"]["digit-0"]["losses"])],
        [np.array(outcomes[2]["owners"]["digit-0"]["losses"])],
        seed=0,
    )
    row = next(r for r in owners if (r["owner"], r["side"]) == ("digit-0", "together"))
    assert float(row["ratio_low"]) == ratio.low
    assert "| together | " in text
    assert "1.176 (1.176 to 1.176)" in text
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > 300


def test_there_is_no_gap_where_pooling_does_not_pay(
    undisturbed: dict[str, dict[str, Any]],
) -> None:
    sides = {side: made_up_outcome(undisturbed["alone"], 1.0) for side in SIDES}
    assert gap_closed(sides, "together") is None


def test_a_side_without_pooled_has_no_gap(undisturbed: dict[str, dict[str, Any]]) -> None:
    assert gap_closed({"alone": undisturbed["alone"]}, "alone") is None


def test_images_are_worth_what_lies_between_two_numbers_of_them() -> None:
    points = [(40.0, 0.04), (10.0, 0.16), (20.0, 0.08)]  # loss 1.6 / images
    assert worth_of_images(points, 0.05) == pytest.approx((32, 32))
    assert worth_of_images(points, 0.04) == pytest.approx((40, 40))
    assert worth_of_images(points, 0.03) == (40, math.inf)
    assert worth_of_images(points, 0.2) == (0, 10)


def test_together_is_as_good_as_alone_with_more_images(
    undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    base = tiny_base()
    asked = cells("digits", base, ASKED, [0], OWN_RATES, ("alone", "together"))
    others = alone_with([24, 48], base, asked)
    assert [cell.config.data.images_per_task for cell in others] == [28, 52]
    assert {cell.side for cell in others} == {"alone"}
    outcomes = [made_up_outcome(undisturbed["alone"], factor) for factor in (1, 0.375, 0.5, 0.25)]
    for outcome, count in zip(outcomes, (12, 12, 24, 48), strict=True):
        outcome["images_per_owner"] = count
    text = describe_worth(asked, outcomes[:2], others, outcomes[2:], tmp_path)
    assert [float(row["images_per_owner"]) for row in read_rows(tmp_path / "images.csv")] == [
        12,
        24,
        48,
    ]
    assert "| 32 images |" in text
    assert "| alone with | held-out loss |" in text
    with Image.open(tmp_path / "images.png") as picture:
        assert picture.width > 300


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_line_is_added_once_and_in_the_place_of_the_same_cells(
    undisturbed: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    path, asked = tmp_path / "cells.csv", tiny_cells()
    rows = {side: row_of(asked[side], undisturbed[side]) for side in SIDES}
    for side in SIDES:
        add_row(path, rows[side])
    add_row(path, {**rows["paper"], "core_seconds": 123.0})
    found = read_rows(path)
    assert [row["side"] for row in found] == ["alone", "together", "pooled", "paper"]
    assert found[-1]["core_seconds"] == "123.0"
    add_row(path, {**rows["paper"], "seed": 1, "new column": 7})
    found = read_rows(path)
    assert (len(found), found[0]["new column"], found[-1]["new column"]) == (5, "", "7")


# --- The sets of owners ---


def write_characters(folder: Path) -> Path:
    """Two alphabets of two characters, five drawings each."""
    labels, characters = np.repeat([0, 1], 10), np.tile(np.repeat([1, 2], 5), 2)
    arrays: dict[str, Any] = {"label_names": np.array(["greek", "latin"])}
    for split, seed in (("train", 0), ("test", 1)):
        arrays |= {
            f"{split}_images": random_images(20, 28, 28, seed=seed),
            f"{split}_labels": labels,
            f"{split}_characters": characters,
        }
    folder.mkdir(exist_ok=True)
    np.savez(folder / "omniglot_8_alphabets.npz", **arrays)
    return folder


def test_characters_are_owners(tmp_path: Path) -> None:
    data = write_characters(tmp_path / "data")
    settings = SETS["characters"].settings(data, tmp_path / "pool", 3)
    config = change(RunConfig(), data__image_size=14, data__validation_images=2, **settings)
    tasks = load_tasks(config.data, 3)
    assert [task.name for task in tasks] == ["greek-01", "greek-02", "latin-01"]
    for task in tasks:
        assert (len(task.train), len(task.validation), len(task.test)) == (3, 2, 5)
        assert task.shape == (14, 14, 1)
    whole = change(RunConfig(), **settings)
    drawings = np.load(data / "omniglot_8_alphabets.npz")["test_images"]
    np.testing.assert_array_equal(load_tasks(whole.data, 3)[2].test[..., 0], drawings[10:15])


def test_alphabets_are_owners_and_their_first_images_are_of_all_characters(tmp_path: Path) -> None:
    data = write_characters(tmp_path / "data")
    settings = SETS["alphabets"].settings(data, tmp_path / "pool", 2)
    tasks = load_tasks(change(RunConfig(), **settings).data, 2)
    assert [task.name for task in tasks] == ["greek", "latin"]
    drawings = np.load(data / "omniglot_8_alphabets.npz")["train_images"]
    for task, own in zip(tasks, (drawings[:10], drawings[10:]), strict=True):
        assert {bytes(image) for image in task.train} == {bytes(image) for image in own}
        assert not np.array_equal(task.train[..., 0], own)


def test_blood_cells_are_a_folder(tmp_path: Path) -> None:
    for kind in ("platelet", "red", "white"):
        for number in range(8):
            pixels = random_images(12, 12, 3, seed=number + len(kind))
            save(tmp_path / "blood_cells" / kind / f"{number}.png", pixels)
    settings = SETS["blood_cells"].settings(tmp_path, tmp_path / "pool", 3)
    config = change(RunConfig(), data__image_size=8, **settings)
    tasks = load_tasks(config.data, 3)
    assert [task.name for task in tasks] == ["platelet", "red", "white"]
    assert {task.shape for task in tasks} == {(8, 8, 3)}, "their colours are what they are dyed for"


def test_each_lab_has_blood_cells_that_no_other_has(tmp_path: Path) -> None:
    kinds = ("platelets", "red", "white")
    for place, kind in enumerate(kinds):
        for number in range(LAB_TEST_IMAGES + 20):
            pixels = random_images(6, 6, 3, seed=1000 * place + number)
            pixels[..., 0] = place
            save(tmp_path / "blood_cells" / kind / f"{number}.png", pixels)
    settings = SETS["blood_labs"].settings(tmp_path, tmp_path / "pool", 5)
    tasks = load_tasks(change(RunConfig(), **settings).data, 5)
    assert [task.name for task in tasks] == [
        *(f"{kind}-lab0" for kind in kinds),
        "platelets-lab1",
        "red-lab1",
    ]
    shown = set()
    for task, kind in zip(tasks, (0, 1, 2, 0, 1), strict=True):
        assert (len(task.train), len(task.test)) == (5, 25)
        assert (np.concatenate([task.train, task.test])[..., 0] == kind).all()
        shown |= {image.tobytes() for image in (*task.train, *task.test)}
    assert len(shown) == 5 * 30


def test_samples_are_recognised_by_their_kind_not_by_whose_of_the_kind_they_are() -> None:
    def owner(name: str, level: int) -> Task:
        return Task(name, train=np.full((4, 6, 6, 1), level, np.uint8), test=some(level + 1))

    def some(level: int) -> np.ndarray:
        return np.full((3, 6, 6, 1), level, np.uint8)

    tasks = [owner("red-lab0", 10), owner("white-lab0", 200)]
    tasks += [owner("red-lab1", 60), owner("white-lab1", 250)]
    kinds = kinds_of(tasks)
    assert [(kind.name, len(kind.train), len(kind.test)) for kind in kinds] == [
        ("red", 8, 6),
        ("white", 8, 6),
    ]
    samples = {"red-lab0": some(60), "white-lab0": some(250), "white-lab1": some(10)}
    assert recognised(kinds, samples) == {"red-lab0": 1, "white-lab0": 1, "white-lab1": 0}
    single = [owner("red", 10), owner("white", 200)]
    assert [kind.name for kind in kinds_of(single)] == ["red", "white"]


@pytest.mark.parametrize(
    ("asked", "found"), [((None, None), (14, 3)), ((32, None), (32, 3)), ((None, 1), (14, 1))]
)
def test_size_and_channels_are_the_sets_where_nobody_says_otherwise(
    asked: tuple[int | None, int | None], found: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "blood_cells").mkdir()
    given = {"owners": None, "images": None, "validation": None, "rounds": 1, "stack": None}
    options = Namespace(
        **given,
        owner_set="blood_cells",
        data_dir=str(tmp_path),
        pool=tmp_path,
        device="cpu",
        size=asked[0],
        channels=asked[1],
    )
    data = command.configuration(options).data
    assert (data.image_size, data.channels) == found


# --- The command ---

WRONG: dict[str, tuple[list[str], str]] = {
    "no data": ([], "--data-dir is needed: the folder that holds omniglot_8_alphabets.npz"),
    "other data": (["--data-dir", "."], "--data-dir"),
    "data that mean nothing": (["--set", "digits", "--data-dir", "."], "means nothing"),
    "too many owners": (["--set", "digits", "--owners", "11"], "allowed: 2 to 10"),
    "one owner": (["--set", "digits", "--owners", "1"], "allowed: 2 to 10"),
    "one validation image": (["--set", "digits", "--validation", "1"], "allowed: 2 or more"),
    "no image": (["--set", "digits", "--images", "0"], "--images 0 is impossible"),
    "too many images": (["--set", "digits", "--images", "500"], "data.images_per_task = 532"),
    "no pixel": (["--set", "digits", "--size", "0"], "data.image_size = 0 is not allowed"),
    "no round": (["--set", "digits", "--rounds", "0"], "--rounds 0 is impossible"),
    "never": (["--set", "digits", "--every", "0"], "--every 0 is impossible"),
    "one sample": (["--set", "digits", "--samples", "1"], "--samples 1 is impossible"),
    "one test image": (["--set", "digits", "--test-images", "1"], "--test-images 1"),
    "no job": (["--set", "digits", "--jobs", "0"], "--jobs 0 is impossible"),
    "no side": (["--set", "digits", "--own-rate", "all=2"], "--own-rate all=2 is impossible"),
    "no factor": (["--set", "digits", "--own-rate", "paper=fast"], "a FACTOR above 0"),
    "no seed": (["--set", "digits", "--seeds", "0"], "--seeds 0 is impossible"),
    "a seed below 0": (
        ["--set", "digits", "--first-seed", "-1"],
        "--first-seed -1 is impossible; allowed: 0 or more",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_impossible_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = WRONG[name]
    where = ["--pool", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, *where]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_trains_all_sides_and_a_second_call_finds_what_the_first_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "digits", "--owners", "2", "--images", "8", "--validation", "4"]
    arguments += ["--rounds", "2", "--every", "1", "--samples", "4", "--test-images", "6"]
    arguments += ["--pool", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--jobs", "2", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert "| together | " in first
    rows = read_rows(tmp_path / "out" / "cells.csv")
    assert sorted(row["side"] for row in rows) == sorted(SIDES)
    assert {row["images_per_owner"] for row in rows} == {"8"}
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.json*")}
    assert command.main([*arguments, "--jobs", "1", "--device", "cpu"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.json*")} == left
    assert capsys.readouterr().out == first
    assert len(read_rows(tmp_path / "out" / "cells.csv")) == 4

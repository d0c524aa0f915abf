"""The study of new owners: what is fitted to what, the best step, tables, bad input."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simulations import new_owner as command
from srfed.data import load_task
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.metrics.denoising_loss import MOMENTS, denoising_losses, mean_loss
from srfed.model import build_model, build_objective
from srfed.storage.checkpoint import read_arrays
from srfed.storage.run_folder import RunFolder
from srfed.studies import adapted as fitting
from srfed.studies import joining, judged, new_owner_gains
from srfed.studies.best_rounds import best_file
from srfed.studies.cases import Job, change, run_jobs
from srfed.studies.judged import train_judged
from srfed.studies.new_owner import (
    CORES,
    PLANS,
    SIDES,
    NewOwnerCell,
    cores,
    new_owner_cells,
)
from srfed.studies.new_owner_gains import report, row_of
from srfed.studies.owners import SETS
from srfed.training.adaptation import adapt
from srfed.training.part import load_tensors
from support.tiny_study import tiny_base

CLOCK = {"core_seconds", "core_seconds_to_best"}
JUDGING = {"every": 1, "samples": 4, "test_images": 6, "patience": 0}
ADAPTING = {"steps": 6, "between": 2, "patience": 0, "samples": 4, "test_images": 6}


def tiny_cells(counts: Sequence[int] = (5, 8), seeds: int = 1) -> list[NewOwnerCell]:
    base = tiny_base(1)
    everybody = change(
        base, federation__clients=4, evaluation__samples=8, evaluation__samples_between=8
    )
    return new_owner_cells(
        cores("digits", base, JUDGING, range(seeds)), everybody, 3, counts, ADAPTING
    )


def find(side: str, images: int = 5) -> NewOwnerCell:
    return next(c for c in tiny_cells() if (c.side, c.adapting.images) == (side, images))


def do(job: Job, pool: Path) -> dict[str, Any]:
    """What the job's process does, in this one."""
    if (left := job.left()) is not None:
        return left
    module = {"srfed.studies.judged": judged, "srfed.studies.adapted": fitting}[job.command[0]]
    module._do(Path(job.command[1]), json.loads(job.given))
    left = job.left()
    assert left is not None
    return left


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the core of `together`, and that of k = 1 begun by nobody."""
    pool = tmp_path_factory.mktemp("pool")
    core = find("together").core
    train_judged(core.folder(pool), core.config, core.judging)
    return pool


def without_clock(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in outcome.items() if key not in CLOCK}


# --- The cells ---


def test_there_is_a_cell_for_each_new_owner_number_side_and_seed(tmp_path: Path) -> None:
    found = tiny_cells(seeds=2)
    told = [(c.name, c.adapting.images, c.side, c.core.config.seed) for c in found]
    assert len({*told}) == len(told) == 1 * 2 * 4 * 2
    assert {name for name, *_ in told} == {"digit-3"}
    assert len({c.folder(tmp_path) for c in found}) == len(found)
    for cell in found:
        assert cell.core.side == ("paper" if cell.side == "scratch" else cell.side)
        assert cell.mode == ("scratch" if cell.side == "scratch" else "frozen")
        assert cell.job(tmp_path).niceness == 10
    # The runs are those of the study of joining.
    same = joining.cells("digits", tiny_base(1), JUDGING, range(2), joining.OWN_RATES)
    assert {c.core.folder(tmp_path) for c in found} == {
        c.folder(tmp_path) for c in same if c.side != joining.ALONE
    }


def test_what_decides_the_figures_names_the_folder(tmp_path: Path) -> None:
    cell = find("together")
    others = [
        replace(cell, adapting=replace(cell.adapting, steps=8)),
        replace(cell, side="pooled"),
        replace(cell, everybody=change(cell.everybody, data__validation_images=2)),
        replace(cell, core=replace(cell.core, config=change(cell.core.config, seed=7))),
    ]
    assert len({c.folder(tmp_path) for c in [cell, *others]}) == 5
    moved = replace(cell, everybody=change(cell.everybody, data__dir="elsewhere"))
    assert moved.folder(tmp_path) == cell.folder(tmp_path)


def test_every_set_has_a_plan() -> None:
    assert PLANS.keys() == SETS.keys()
    for name, plan in PLANS.items():
        assert plan.known + plan.new <= SETS[name].owners


# --- One cell ---


def test_theta_is_fitted_to_a_core_that_stays(pool: Path) -> None:
    """The figures are those of the same steps by hand."""
    cell = find("together")
    outcome = do(cell.job(pool), pool)
    config = cell.core.config
    arrays, about = read_arrays(best_file(RunFolder.open(cell.core.folder(pool)), "all"))
    assert str(outcome["core_round"]) == about["round"]
    shared = {n[7:]: fitting.torch.from_numpy(a) for n, a in arrays.items() if n[:7] == "shared:"}
    task = load_task(cell.everybody.data, 3)
    assert len(task.train) == 12
    network = build_model(config, 1).eval()
    objective = build_objective(config, resolve_device(config.resources))
    denoiser, history, tested = objective.denoiser(network), {}, {}
    for one in adapt(
        config, shared, task.train[:5], task=task.name, mode="frozen", steps=6, every=2
    ):
        load_tensors(network, one.shared, one.exclusive)
        for found, images, noise in (
            (history, task.validation, 1),
            (tested, task.test[:6], judged.TEST_NOISE),
        ):
            found[one.steps] = denoising_losses(
                denoiser, objective.process, images, task=task.name, seed=noise
            )
    assert {int(k): v for k, v in outcome["history"].items()} == {
        steps: mean_loss(losses) for steps, losses in history.items()
    }
    assert outcome["step"] == min(history, key=lambda steps: mean_loss(history[steps]))
    np.testing.assert_array_equal(outcome["losses"], tested[outcome["step"]])
    assert np.shape(outcome["losses"]) == (6, MOMENTS)
    assert outcome["bytes"] == sum(4 * tensor.numel() for tensor in shared.values())
    sizes = [sum(t.numel() for t in part.values()) for part in (one.exclusive, one.shared)]
    assert (outcome["trained_values"], outcome["values"]) == (sizes[0], sum(sizes))
    assert outcome["core_seconds"] >= outcome["core_seconds_to_best"] > 0
    assert 0 <= outcome["recognised"] <= 1
    samples, _ = read_arrays(cell.folder(pool) / "adapted.safetensors")
    assert samples["digit-3"].shape == (4, 8, 8, 1)


def test_from_scratch_nothing_travels_and_everything_is_trained(pool: Path) -> None:
    cell = find("scratch", 8)
    assert not cell.core.folder(pool).exists()
    outcome = do(cell.job(pool), pool)
    assert (outcome["bytes"], outcome["core_round"]) == (0, 0)
    assert outcome["trained_values"] == outcome["values"]


def test_the_first_of_the_best_steps_counts_and_a_second_call_does_nothing(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = find("scratch")
    made_up = {4: [0.3, 0.2, 0.2], 6: [float("nan"), 0.5, 0.4]}

    for number, (expected, losses) in enumerate({4: made_up[4], 6: made_up[6]}.items()):
        told = iter(losses)
        with monkeypatch.context() as patch:
            patch.setattr(
                fitting, "denoising_losses", lambda *_, told=told, **__: np.full((2, 8), next(told))
            )
            assert do(cell.job(tmp_path / str(number)), tmp_path)["step"] == expected
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "denoising_losses", lambda *_, **__: np.full((2, 8), np.inf))
        with pytest.raises(UserError, match="of digit-3 was finite at no step"):
            do(cell.job(tmp_path / "never"), tmp_path)
    assert cell.left(tmp_path / "never") is None
    hasty = replace(cell, adapting=replace(cell.adapting, patience=2))
    with monkeypatch.context() as patch:
        told = iter([0.3, 0.3])
        patch.setattr(fitting, "denoising_losses", lambda *_, **__: np.full((2, 8), next(told)))
        outcome = do(hasty.job(tmp_path / "0"), tmp_path)
    assert (outcome["step"], outcome["steps_taken"]) == (2, 4)
    first = cell.left(tmp_path / "0")
    monkeypatch.setattr(fitting, "adapt_and_judge", None)
    assert do(cell.job(tmp_path / "0"), tmp_path) == first


def test_an_owner_with_fewer_images_than_asked_for_is_an_error(tmp_path: Path) -> None:
    (cell, *_) = [cell for cell in tiny_cells([13]) if cell.side == "scratch"]
    with pytest.raises(UserError, match="has 12 training images, and 13 are asked for"):
        do(cell.job(tmp_path), tmp_path)


def test_a_study_lets_others_go_first(tmp_path: Path) -> None:
    told = tmp_path / "told"
    write = f"import os; open({str(told)!r}, 'w').write(str(os.nice(0)))"
    job = Job(
        "a job",
        tmp_path / "job",
        ["timeit", "-n", "1", "-r", "1", write],
        b"",
        1,
        lambda: {"nice": int(told.read_text())} if told.exists() else None,
        niceness=3,
    )
    assert run_jobs([job], tmp_path, 1) == [{"nice": min(19, os.nice(0) + 3)}]


# --- Tables ---


def test_the_report_says_what_a_new_owner_gains(pool: Path, tmp_path: Path) -> None:
    asked = tiny_cells(seeds=2)
    base = do(find("scratch", 8).job(pool), pool)
    factors = dict(zip(SIDES, (0.5, 0.8, 0.4, 1.0), strict=True))
    outcomes = []
    for cell in asked:
        factor = factors[cell.side] * (1 if cell.adapting.images == 5 else 0.9)
        outcomes.append(
            {
                **base,
                "losses": (factor * np.array(base["losses"])).tolist(),
                "loss": factor * base["loss"],
                "copies": None if cell.side == "paper" else 1.0,
                "bytes": 0 if cell.side == "scratch" else 3_000_000,
            }
        )
    text = report(asked, outcomes, tmp_path)
    assert (tmp_path / "curve.md").read_text() == text
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["side"]) for row in rows] == [(n, s) for n in "58" for s in SIDES]
    assert [float(row["scratch_over_it"]) for row in rows[:4]] == pytest.approx([2, 1.25, 2.5, 1])
    assert float(rows[4]["loss"]) == pytest.approx(0.45 * base["loss"], rel=1e-4)
    assert [row["copies"] for row in rows[:2]] == ["1.0", ""]
    with (tmp_path / "owners.csv").open() as file:
        assert {row["owner"] for row in csv.DictReader(file)} == {"digit-3"}
    assert "| 5 | together | " in text
    assert "2.000 (2.000 to 2.000)" in text
    assert " | 3.0 MB | " in text
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 300
    row = row_of(asked[0], outcomes[0])
    assert {*new_owner_gains.KEY} < {*row}


# --- The command ---

WRONG: dict[str, tuple[list[str], str]] = {
    "no data": (["--set", "characters"], "--data-dir is needed"),
    "all train": (["--owners", "10"], "--owners 10 is impossible; allowed: 2 to 9"),
    "too many new": (["--new", "3"], "--new 3 is impossible; allowed: 1 to 2"),
    "one image": (["--images", "5", "1"], "--images 1 is impossible; allowed: 2 or more"),
    "too many images": (["--images", "500"], "data.images_per_task = 503"),
    "one validation image": (["--validation", "1"], "--validation 1 is impossible"),
    "no look": (
        ["--steps", "10", "--between", "11"],
        "--between 11 is impossible; allowed: 1 to 10",
    ),
    "no patience": (["--patience-steps", "-1"], "--patience-steps -1 is impossible"),
    "no step": (["--steps", "0"], "--steps 0 is impossible; allowed: 1 or more"),
    "one test image": (["--test-images", "1"], "--test-images 1 is impossible"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_impossible_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = WRONG[name]
    where = ["--pool", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    assert command.main(["--set", "digits", *arguments, *where]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_the_command_trains_cores_and_fits_new_owners_and_finds_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run_here(
        jobs: Sequence[Job], pool: Path, count: int, on_outcome: Any = lambda *_: None
    ) -> list[dict[str, Any]]:
        started.extend(job.name for job in jobs if job.left() is None)
        outcomes = [do(job, pool) for job in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            on_outcome(job, outcome)
        return outcomes

    tiny = {"model__channels": (8, 16, 16, 16), "model__groups": 4, "data__image_size": 8}
    tiny |= {"training__local_steps": 1, "sampling__steps": 2}
    tiny |= {"evaluation__ssim_timestep": 2, "evaluation__ssim_curve": (2,)}
    monkeypatch.setattr("simulations.joining.COMMON", {**joining.COMMON, **tiny})
    monkeypatch.setattr(command, "run_jobs", run_here)
    monkeypatch.setattr(new_owner_gains, "run_jobs", run_here)
    arguments = "--set digits --owners 2 --new 1 --images 4 --rounds 1 --every 1 --steps 2"
    arguments += " --between 1 --samples 2 --test-images 4 --device cpu"
    where = ["--pool", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    assert command.main([*arguments.split(), *where]) == 0
    first = capsys.readouterr().out
    assert "| 4 | pooled | " in first
    assert len(started) == len(CORES) + len(SIDES)
    with (tmp_path / "out" / "cells.csv").open() as file:
        assert sorted(row["side"] for row in csv.DictReader(file)) == sorted(SIDES)
    started.clear()
    assert command.main([*arguments.split(), *where]) == 0
    assert not started
    # The first call has told its rounds before.
    assert first.endswith(capsys.readouterr().out)

"""Our own studies on the tiniest runs: new tasks, similarity of tasks, and the paper's pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from simulations import figures, new_task, similarity
from srfed.api import train_run
from srfed.config import ResourcesConfig, RunConfig
from srfed.data import Task, load_tasks, to_uint8
from srfed.diffusion.sampler import drawn_from, sample
from srfed.diffusion.samplers.ancestral import Ancestral
from srfed.errors import UserError
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.randomness import derive_generator
from srfed.reporting.pictures import GAP, LABEL_SIZE, SMALLEST_CELL
from srfed.reporting.plots import heat_map, line_plot
from srfed.runs.adapting import read_points
from srfed.runs.run import TrainedRun
from srfed.storage.run_folder import RunFolder
from support.tiny_run import tiny_config

CPU = ResourcesConfig(backend="inline", device="cpu")


@pytest.fixture(scope="module")
def trained(finished_run: RunFolder) -> TrainedRun:
    return TrainedRun(finished_run.path, CPU)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks(tiny_config().data, 3)


@pytest.fixture(scope="module")
def centralised(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A tiny DDPM on the pooled images, of few timesteps, because ancestral sampling takes them
    all.
    """
    config = tiny_config(
        {
            "training.method": "pooled",
            "model.exclusive_stages": "none",
            "federation.rounds": 1,
            "diffusion.timesteps": 50,
            "evaluation.ssim_images": 0,
            "evaluation.samples": 6,
            "evaluation.samples_between": 6,
        }
    )
    run = RunFolder.create(tmp_path_factory.mktemp("centralised") / "run", config)
    train_run(run)
    return run


# --- Similarity ----------------------------------------------------------------------------------


def test_distances_of_layers_by_hand(trained: TrainedRun) -> None:
    exclusive = [trained.exclusive_of(task) for task in trained.tasks]
    initial = trained.initial_exclusive_of(trained.tasks[0])
    found = similarity.layer_distances(exclusive, initial)
    assert list(found) == ["all", "stem", "down", "up", "head"]
    for group, matrix in found.items():
        names = [name for name in initial if group == "all" or name.startswith(f"{group}.")]
        flat = [
            np.concatenate([theta[n].numpy().astype(np.float64).ravel() for n in names])
            for theta in exclusive
        ]
        origin = np.concatenate([initial[n].numpy().astype(np.float64).ravel() for n in names])
        usual = np.mean([np.linalg.norm(theta - origin) for theta in flat])
        for i, j in np.ndindex(3, 3):
            assert matrix[i, j] == pytest.approx(
                np.linalg.norm(flat[i] - flat[j]) / usual, rel=1e-9, abs=1e-12
            )
        assert (np.diag(matrix) == 0).all()
        assert matrix.min() >= 0
        assert matrix.max() > 0, "the layers of the tasks have parted"


def test_the_two_matrices_of_samples_and_the_commands_files(
    finished_run: RunFolder,
    trained: TrainedRun,
    tasks: list[Task],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--run",
        str(finished_run.path),
        "--samples",
        "12",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert similarity.main(arguments) == 0
    said = capsys.readouterr()
    assert said.err == ""
    network = EmbeddedFeatures()
    to_real, judged, layers = (
        read_matrix(tmp_path / f"{name}.csv") for name in ("frechet", "judged", "layers-all")
    )
    for place, (info, task) in enumerate(zip(trained.tasks, tasks, strict=True)):
        samples = generate(
            trained.denoiser(info),
            trained.objective.process,
            trained.config.sampling,
            count=12,
            shape=trained.shapes[0],
            seed=0,
            task=task.name,
        ).images
        own = frechet_distance(
            FeatureStatistics.of(network(samples)), FeatureStatistics.of(network(task.test))
        )
        assert to_real[place, place] == pytest.approx(own, rel=1e-9)
    np.testing.assert_allclose(judged.sum(axis=1), 1)
    exclusive = [trained.exclusive_of(task) for task in trained.tasks]
    np.testing.assert_array_equal(
        layers,
        similarity.layer_distances(exclusive, trained.initial_exclusive_of(trained.tasks[0]))[
            "all"
        ],
    )
    for name in ("layers-all", "layers-stem", "layers-up", "frechet", "judged", "real"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert "n = 3 pairs" in said.out
    assert (tmp_path / "similarity.txt").read_text() in said.out


def read_matrix(path: Path) -> np.ndarray:
    """The numbers of a table that has names in its first row and column."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == rows[0][1:] == ["digit-0", "digit-1", "digit-2"]
    return np.array([row[1:] for row in rows[1:]], dtype=np.float64)


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_correlation_against_scipy_and_its_permutations_know_chance() -> None:
    random = np.random.default_rng(0)
    points = random.standard_normal((7, 2))
    first, other = distances(points), distances(random.standard_normal((7, 2)))
    pairs = np.triu_indices(7, 1)
    same = similarity.correlate(first, first**2)
    assert (same.rho, same.pairs) == (pytest.approx(1.0), 21)
    assert same.p_value < 0.01
    chance = similarity.correlate(first, other)
    assert chance.rho == pytest.approx(spearmanr(first[pairs], other[pairs]).statistic)
    assert chance.p_value > 0.05
    with pytest.raises(UserError, match="at least 3 tasks"):
        similarity.correlate(first[:2, :2], other[:2, :2])


def test_a_run_without_exclusive_layers_has_no_similarity(
    centralised: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert similarity.main(["--run", str(centralised.path)]) == 2
    message = capsys.readouterr().err
    assert "has no exclusive layers" in message
    assert message.count("\n") == 1


# --- The paper's pictures ------------------------------------------------------------------------


def tile(
    picture: np.ndarray, row: int, column: int, rows: int, columns: int, *, header: bool
) -> np.ndarray:
    """One image of a grid of 8 x 8 grey images, at its own size."""
    factor, step, top = (
        SMALLEST_CELL // 8,
        SMALLEST_CELL + GAP,
        LABEL_SIZE + 2 * GAP if header else 0,
    )
    assert picture.shape[0] == top + rows * step
    left = picture.shape[1] - columns * step + column * step
    return picture[top + row * step :, left:][:SMALLEST_CELL:factor, :SMALLEST_CELL:factor, 0]


def test_figure_2_holds_the_states_of_the_ancestral_sampler(
    centralised: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "figure.png"
    assert (
        figures.main(
            ["--run", str(centralised.path), "--figure", "2", "--seed", "4", "--out", str(out)]
        )
        == 0
    )
    with Image.open(out) as file:
        picture = np.asarray(file)
    trained = TrainedRun(centralised.path, CPU)
    # Row 4 is the second sample of digit-1: there are three tasks.
    generator = derive_generator(5, "samples", "digit-1", 0)
    start = torch.randn(1, 1, 8, 8, generator=generator)
    timesteps = list(range(50, -1, -5))
    states = sample(
        Ancestral(),
        trained.denoiser(trained.tasks[1]),
        trained.objective.process,
        start,
        drawn_from(generator),
        steps=1,
        record=timesteps,
    ).states
    for column, timestep in enumerate(timesteps):
        expected = to_uint8(states[timestep])[0, ..., 0]
        np.testing.assert_array_equal(tile(picture, 4, column, 10, 11, header=True), expected)
    assert len({tile(picture, row, 10, 10, 11, header=True).tobytes() for row in range(10)}) == 10


def test_twenty_samples_a_task_of_any_run(
    finished_run: RunFolder,
    trained: TrainedRun,
    centralised: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for run in (finished_run, centralised):
        out = tmp_path / "samples.png"
        assert figures.main(["--run", str(run.path), "--figure", "samples", "--out", str(out)]) == 0
        with Image.open(out) as file:
            picture = np.asarray(file)
        opened = TrainedRun(run.path, CPU)
        for row, task in enumerate(opened.tasks):
            images = generate(
                opened.denoiser(task),
                opened.objective.process,
                opened.config.sampling,
                count=20,
                shape=opened.shape_of(task),
                seed=0,
                task=task.client,
            ).images
            for column in (0, 19):
                np.testing.assert_array_equal(
                    tile(picture, row, column, 3, 20, header=False), images[column, ..., 0]
                )
    assert "pooled, after round 1" in capsys.readouterr().out


# --- A new task ----------------------------------------------------------------------------------


@pytest.fixture
def tiny_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study on the tiny network; everything else is its own."""

    def configuration(*_: object) -> RunConfig:
        evaluation: Mapping[str, Any] = {
            "every": 0,
            "samples_between": 16,
            "ssim_images": 0,
            "memorisation_quantile": 0.0,
        }
        return tiny_config(
            {f"evaluation.{name}": value for name, value in evaluation.items()}
            | {"training.local_steps": 1}
        )

    monkeypatch.setattr(new_task, "configuration", configuration)


@pytest.mark.usefixtures("tiny_study")
def test_new_tasks_in_three_ways_resumed_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(*images: object, steps: int = 2) -> int:
        given = ["--images", *images, "--steps", steps, "--every", 1, "--samples", 4, "--rounds", 1]
        return new_task.main(
            [str(argument) for argument in [*given, "--out", tmp_path / "study", "--device", "cpu"]]
        )

    assert study(20) == 0
    said = capsys.readouterr()
    assert "| 20 | " in said.out
    assert "digit-8, digit-9" in said.out
    points = read_points(tmp_path / "study" / "scores.csv", new_task.NewTaskPoint)
    assert len(points) == 2 * 3 * 2, "tasks, modes, scores"
    assert {point.task for point in points} == {"digit-8", "digit-9"}
    assert {point.images for point in points} == {20}
    assert all(0 <= point.agreement <= 1 and point.score > 0 for point in points)
    assert TrainedRun(tmp_path / "study" / "run-seed-0", CPU).config.federation.clients == 8

    done = []
    real = new_task.score_adaptation
    monkeypatch.setattr(
        new_task,
        "score_adaptation",
        lambda *given, **named: done.append(len(given[2].train)) or real(*given, **named),
    )
    assert study(20, "all") == 0
    assert done == [139] * 6, "what was there is not made again"
    assert (
        read_points(tmp_path / "study" / "scores.csv", new_task.NewTaskPoint)[: len(points)]
        == points
    )
    for name in ("steps.png", "images.png", "table.md"):
        assert (tmp_path / "study" / name).stat().st_size > 0

    capsys.readouterr()
    for images, steps, words in (
        (1_000, 2, "--images 1000 is impossible; allowed: 2 to 139"),
        (20, 3, "steps: 2 -> 3"),
    ):
        assert study(images, steps=steps) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


# --- Plots ---------------------------------------------------------------------------------------


def test_plots_are_pictures_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    words = {"x_label": "x", "y_label": "y", "title": "t"}
    series = {
        "one": ([20.0, 50.0, 100.0], [3.0, 2.0, 1.0]),
        "two": ([20.0, 100.0], [1.0, float("nan")]),
    }
    line_plot(
        tmp_path / "lines.png",
        series,
        **words,
        log_x=True,
        log_y=True,
        spread={"one": [0.1, 9.0, 0.1]},
    )
    heat_map(
        tmp_path / "map.png", np.array([[1.0, np.nan], [0.5, 1e6]]), ["a", "b"], ["c", "d"], **words
    )
    for name in ("lines.png", "map.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, "something is drawn"
    with pytest.raises(ValueError, match="same size"):
        line_plot(tmp_path / "no.png", {"one": ([1, 2, 3], [1, 2])}, **words)
    with pytest.raises(ValueError, match="does not fit 1 rows"):
        heat_map(tmp_path / "no.png", np.zeros((2, 2)), ["a"], ["c", "d"], **words)
    with pytest.raises(UserError, match="cannot write"):
        heat_map(Path("/proc/no.png"), np.zeros((1, 1)), ["a"], ["b"], **words)
    assert not (tmp_path / "no.png").exists()

"""A task that took no part is added to a run: θ alone, or φ too, or from scratch; the run stays as
it is.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import srfed
from srfed.commands import adapt as command
from srfed.commands import sample
from srfed.config import ResourcesConfig, parse_config
from srfed.data import Task, load_task, to_model_range
from srfed.data.record import fingerprints
from srfed.errors import UserError
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import divide
from srfed.runs import adapting
from srfed.runs.adapting import (
    Point,
    computed_here,
    read_points,
    tensors_hash,
    with_validation,
    write_points,
)
from srfed.runs.run import TrainedRun, TrainedSite
from srfed.storage.run_folder import RunFolder
from srfed.storage.site_model import SiteModel
from srfed.training.adaptation import MODES, Adapted, Mode, adapt, adaptation_config
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state, load_tensors
from support.images import save
from support.tiny_run import tiny_config

CPU = ResourcesConfig(backend="inline", device="cpu")
NEW = "digit-7"
FEW = ("--steps", 6, "--every", 4, "--samples", 8, "--device", "cpu")
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(finished_run: RunFolder) -> TrainedRun:
    return TrainedRun(finished_run.path, CPU)


@pytest.fixture(scope="module")
def new_images() -> np.ndarray:
    return load_task(tiny_config().data, 7).train


@pytest.fixture(scope="module")
def adapted(trained: TrainedRun, new_images: np.ndarray) -> dict[str, list[Adapted]]:
    """Every mode's results after 20, 40 and 50 steps."""
    return {
        mode: list(
            adapt(
                trained.config, trained.shared, new_images, task=NEW, mode=mode, steps=50, every=20
            )
        )
        for mode in MODES
    }


def same_bits(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loss_on(run: TrainedRun, shared: Tensors, exclusive: Tensors, images: np.ndarray) -> float:
    """The loss over many timesteps and one noise, of a model in evaluation mode."""
    model = build_model(run.config, images.shape[-1]).eval()
    load_tensors(model, shared, exclusive)
    generator = torch.Generator().manual_seed(5)
    pictures = to_model_range(images).repeat(4, 1, 1, 1)
    timesteps = run.objective.draw_times(len(pictures), generator)
    noise = torch.randn(pictures.shape, generator=generator)
    with torch.no_grad():
        return float(run.objective.loss(model, pictures, timesteps, noise).mean())


# --- The training --------------------------------------------------------------------------------


def test_steps_are_the_same_in_every_mode_and_the_last_chunk_may_be_short(
    adapted: dict[str, list[Adapted]],
) -> None:
    for curve in adapted.values():
        assert [(one.chunk, one.steps) for one in curve] == [(1, 20), (2, 40), (3, 50)]


def test_frozen_leaves_every_bit_of_the_core_and_learns(
    trained: TrainedRun, new_images: np.ndarray, adapted: dict[str, list[Adapted]]
) -> None:
    held_out = load_task(tiny_config().data, 7).test
    for one in adapted["frozen"]:
        assert same_bits(one.shared, trained.shared)
        assert set(one.exclusive) == set(trained.partition.exclusive)
    before = loss_on(
        trained, trained.shared, trained.initial_exclusive_of(trained.tasks[0]), held_out
    )
    after = loss_on(trained, trained.shared, adapted["frozen"][-1].exclusive, held_out)
    assert after < 0.8 * before
    assert adapted["frozen"][-1].loss < adapted["frozen"][0].loss


def test_thawed_and_scratch_move_the_core_from_different_places(
    trained: TrainedRun, new_images: np.ndarray
) -> None:
    first = trained.partition.take_shared(build_model(trained.config, 1).state_dict())
    modes: tuple[Mode, ...] = ("thawed", "scratch")
    for mode, origin in zip(modes, (trained.shared, first), strict=True):
        (one,) = adapt(
            trained.config, trained.shared, new_images, task=NEW, mode=mode, steps=1, every=1
        )
        assert set(one.shared) == set(origin)
        # Adam's first step moves no weight by more than the rate.
        moves = [float((tensor - origin[name]).abs().max()) for name, tensor in one.shared.items()]
        assert 0 < max(moves) <= 1.001 * trained.config.training.learning_rate


def test_frozen_is_a_clients_training_from_the_common_initialisation(
    trained: TrainedRun, new_images: np.ndarray, adapted: dict[str, list[Adapted]]
) -> None:
    own = adaptation_config(trained.config, "frozen", images=len(new_images), steps=50, every=20)
    model = build_model(own, 1)
    partition = build_partition(own, model)
    state = initial_state(model, partition)
    objective = build_objective(own, torch.device("cpu"))
    trainer = LocalTrainer(own, model, partition, objective, NEW, new_images)
    for number in (1, 2):
        state = trainer.train(number, trained.shared, state).state
    assert same_bits(state.exclusive.average, adapted["frozen"][1].exclusive)


def test_where_the_core_moves_it_is_averaged_step_by_step_too(
    trained: TrainedRun, new_images: np.ndarray
) -> None:
    own = adaptation_config(trained.config, "thawed", images=len(new_images), steps=5, every=1)
    model = build_model(own, 1)
    load_tensors(model, trained.shared)
    partition = divide(model, "all")
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = initial_state(model, partition)
    trainer = LocalTrainer(
        own, model, partition, build_objective(own, torch.device("cpu")), NEW, new_images
    )
    results = list(
        adapt(trained.config, trained.shared, new_images, task=NEW, mode="thawed", steps=5, every=1)
    )
    for step, result in enumerate(results):
        state = trainer.train(step + 1, {}, state).state
        decay = min(own.training.ema_decay, (1 + step) / (10 + step))
        for name, tensor in average.items():
            average[name] = decay * tensor + (1 - decay) * state.exclusive.weights[name]
            torch.testing.assert_close({**result.shared, **result.exclusive}[name], average[name])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    trained: TrainedRun, new_images: np.ndarray
) -> None:
    def once(seed: int | None) -> Tensors:
        *_, last = adapt(
            trained.config,
            trained.shared,
            new_images,
            task=NEW,
            mode="frozen",
            steps=4,
            every=2,
            seed=seed,
        )
        return last.exclusive

    assert same_bits(once(None), once(trained.config.seed))
    assert not same_bits(once(0), once(1))


def test_fewer_images_than_a_minibatch_are_repeated(
    trained: TrainedRun, new_images: np.ndarray
) -> None:
    config = adaptation_config(trained.config, "frozen", images=5, steps=2, every=1)
    assert config.training.minibatches == "continued"
    *_, last = adapt(
        trained.config, trained.shared, new_images[:5], task=NEW, mode="frozen", steps=2, every=1
    )
    assert np.isfinite(last.loss)


def test_a_runs_unusual_settings_still_make_an_adaptation(trained: TrainedRun) -> None:
    for changes in (
        {"method": "balanced", "centralised_batch_size": 12},
        {"update": "alternating", "exclusive_steps": 2},
        {"shared_moments": "reset", "proximal": 0.1},
        {"local_steps": None, "local_epochs": 1},
        {"exclusive_learning_rate": 1e-3},
        {"control_variates": True},
    ):
        content = trained.config.model_dump(mode="json")
        content["training"] |= changes
        for mode in MODES:
            own = adaptation_config(parse_config(content), mode, images=100, steps=10, every=4)
            assert parse_config(json.loads(own.to_json())) == own
            assert (own.training.local_steps, own.federation.rounds) == (4, 3)
            assert own.training.update == ("exclusive" if mode == "frozen" else "joint")


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_and_film_of_its_own_are_all_that_a_new_task_takes(
    mode: Mode, new_images: np.ndarray
) -> None:
    """Everything else is the run's: frozen, every bit of it."""
    config = tiny_config(
        {
            "model.exclusive_stages": "none",
            "model.owned": ["vector", "film"],
            "training.exclusive_learning_rate": 2e-2,
            "training.learning_rate_schedule": "linear",
            "training.decay_rounds": 2,
        }
    )
    own = adaptation_config(config, mode, images=50, steps=30, every=15)
    training = own.training
    assert (training.owned_learning_rate or training.exclusive_learning_rate) == 2e-2
    assert (training.learning_rate_schedule, training.decay_rounds) == ("constant", None)
    model = build_model(config, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    parts = build_partition(config, model)
    shared = parts.take_shared(model.state_dict())
    first, last = adapt(config, shared, new_images, task=NEW, mode=mode, steps=30, every=15)
    assert set(last.exclusive) == set(parts.owned)
    assert len(parts.owned) == 11
    assert same_bits(last.shared, shared) == (mode == "frozen")
    assert all(last.exclusive[name].any() for name in parts.owned)
    assert last.loss < first.loss


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.exclusive_stages": "none"}, "no exclusive layers .* its network owns nothing"),
        ({"model.exclusive_stages": "all"}, "no shared core"),
        ({"model.task_embedding": "shared"}, "table of its tasks"),
    ],
)
def test_runs_that_no_task_can_be_added_to(
    changes: dict[str, str], said: str, new_images: np.ndarray
) -> None:
    with pytest.raises(UserError, match=said):
        adapt(tiny_config(changes), {}, new_images, task=NEW, mode="scratch", steps=2, every=1)


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def run_command(finished_run: RunFolder, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    def call(*arguments: object, out: str = "out") -> tuple[int, Path]:
        given = ["--run", finished_run.path, *FEW, "--out", tmp_path / out, *arguments]
        return command.main([str(argument) for argument in given]), tmp_path / out

    return call


def test_the_command_keeps_scores_pictures_and_models(
    finished_run: RunFolder,
    trained: TrainedRun,
    run_command: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = files_in(finished_run.path)
    code, out = run_command("--task", NEW, "--images", 20, "--mode", "all")
    assert code == 0
    assert files_in(finished_run.path) == before, "the run's folder is as it was, byte for byte"
    said = capsys.readouterr()
    assert said.err == ""
    assert "20 training images and 36 held out, of 8 x 8 x 1" in said.out
    assert f"frozen: the core is unchanged (sha256 {tensors_hash(trained.shared)})" in said.out

    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "mode",
        "images",
        "steps",
        "loss",
        "score_name",
        "score",
        "samples",
        "references",
        "floor",
        "network_sha256",
        "seed",
        "validation",
    ]
    assert {row["validation"] for row in rows} == {"inf"}
    assert said.out.count("kept: step 6, the last") == 3
    assert [(row["mode"], row["steps"]) for row in rows] == [
        (mode, steps) for mode in MODES for steps in ("4", "6")
    ]
    network = EmbeddedFeatures()
    assert {row["network_sha256"] for row in rows} == {network.sha256}
    assert {row["score_name"] for row in rows} == {"fd_embedded"}
    with Image.open(out / "scores.png") as picture:
        assert picture.size[0] > 400

    held_out = FeatureStatistics.of(network(load_task(trained.config.data, 7).test))
    for mode, row in zip(MODES, rows[1::2], strict=True):
        assert (out / f"samples-{mode}.png").stat().st_size > 0
        store = out / mode / NEW
        shared, _ = SiteModel(store).tensors
        assert same_bits(shared, trained.shared) == (mode == "frozen")
        # The store samples again: the very images that were scored.
        numbers = tmp_path / f"{mode}.npz"
        arguments = [
            "--store",
            store,
            "--n",
            8,
            "--device",
            "cpu",
            "--out",
            tmp_path / "grid.png",
            "--npz",
            numbers,
        ]
        assert sample.main([str(argument) for argument in arguments]) == 0
        with np.load(numbers) as content:
            assert content["tasks"].tolist() == [NEW] * 8
            distance = frechet_distance(FeatureStatistics.of(network(content["images"])), held_out)
        assert distance == pytest.approx(float(row["score"]), rel=1e-9)


def test_the_step_with_the_least_validation_loss_is_kept(
    run_command: Callable[..., tuple[int, Path]],
    trained: TrainedRun,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, asked = adapting.denoising_losses, []

    def losses(*arguments: Any, **named: Any) -> np.ndarray:
        """Least after the first of three looks."""
        asked.append(arguments[2])
        return real(*arguments, **named) + len(asked)

    monkeypatch.setattr(adapting, "denoising_losses", losses)
    code, out = run_command("--task", NEW, "--images", 20, "--validation", 6, "--every", 2)
    assert code == 0
    said = capsys.readouterr().out
    assert "14 training images and 36 held out" in said
    assert "6 images besides choose the step" in said
    assert "kept: step 2, which has the least validation loss" in said
    points = read_points(out / "scores.csv", Point)
    assert [point.steps for point in points] == [2, 4, 6]
    assert [point.validation > number for number, point in enumerate(points, 1)] == [True] * 3
    first = load_task(trained.config.data, 7).train[:20]
    assert all(len(images) == 6 for images in asked)
    assert {bytes(image) for image in asked[0]} < {bytes(image) for image in first}
    assert SiteModel(out / "frozen" / NEW).round == 1
    trained_on = [image for image in first if bytes(image) not in {*map(bytes, asked[0])}]
    one, *_ = adapt(
        trained.config,
        trained.shared,
        np.stack(trained_on),
        task=NEW,
        mode="frozen",
        steps=6,
        every=2,
        seed=0,
    )
    assert same_bits(SiteModel(out / "frozen" / NEW).tensors[1], one.exclusive)


def test_how_many_images_choose_the_step(new_images: np.ndarray) -> None:
    task = Task(NEW, new_images[:10], new_images[10:12])
    data = tiny_config({"data.validation_images": 5}).data
    for count, left in ((None, 5), (0, 10), (2, 8), (8, 2)):
        found = with_validation(data, task, count)
        assert (len(found.train), len(found.validation)) == (left, 10 - left)
    few = replace(task, train=task.train[:9])
    assert len(with_validation(data, few).validation) == 0, "fewer would be left to train on"
    for impossible in (1, 9, -1):
        with pytest.raises(UserError, match=f"^--validation {impossible} .* allowed: 0, or 2 to 8"):
            with_validation(data, task, impossible, name="--validation")
    order = np.argsort(fingerprints(task.train))
    alike = replace(task, train=task.train[[order[0]] * 9 + [order[1]]])
    with pytest.raises(UserError, match="too many equal images"):
        with_validation(data, alike, 2)


def test_scores_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    point = Point("frozen", 20, 4, 0.5, "fd", 2.0, 8, 36, 1.0, "abc", 0)
    write_points(tmp_path / "scores.csv", [point])
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    (tmp_path / "scores.csv").write_text(
        "\n".join(line.rpartition(",")[0] for line in lines) + "\n"
    )
    assert read_points(tmp_path / "scores.csv", Point) == [point]
    (tmp_path / "scores.csv").write_text("mode,images\nfrozen,20\n")
    with pytest.raises(UserError, match="is damaged"):
        read_points(tmp_path / "scores.csv", Point)


@pytest.mark.parametrize("method", ["federated", "balanced"])
def test_small_parts_are_added_to_a_run_that_shares_everything_else(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        "data.validation_images": 10,
        "model.exclusive_stages": "none",
        "model.owned": ["vector", "film"],
        "training.method": method,
        "training.centralised_batch_size": 12 if method == "balanced" else None,
        "training.exclusive_learning_rate": 2e-2,
        "federation.rounds": 1,
        "evaluation.ssim_images": 0,
    }
    run = srfed.train(tiny_config(small), run_dir=tmp_path / "run")
    arguments = ["--run", run.path, "--task", NEW, "--images", 24, *FEW, "--out", tmp_path / "out"]
    assert command.main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "14 training images" in said
    assert "10 images besides choose the step" in said
    opened = TrainedRun(run.path, CPU)
    assert f"the core is unchanged (sha256 {tensors_hash(opened.shared)})" in said
    shared, exclusive = SiteModel(tmp_path / "out" / "frozen" / NEW).tensors
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in (exclusive, shared)]
    assert f"trained: {sizes[0]:,} of {sum(sizes):,} values" in said
    assert all(tensor.any() for tensor in exclusive.values())
    # Adam's first step moves a value by the rate, and the first of the average's decays is 0.1.
    (one,) = adapt(
        opened.config,
        opened.shared,
        load_task(opened.config.data, 7).train,
        task=NEW,
        mode="frozen",
        steps=1,
        every=1,
    )
    moved = [float(tensor.abs().max()) for tensor in one.exclusive.values()]
    assert moved == pytest.approx([0.9 * 2e-2] * len(moved), rel=0.1)
    assert srfed.open_run(tmp_path / "out" / "frozen" / NEW).sample(0, 2).shape == (2, 8, 8, 1)


def test_a_run_of_half_precision_can_be_adapted_to_on_a_cpu() -> None:
    half = tiny_config({"resources.device": "auto", "resources.precision": "bfloat16"})
    for device in ("auto", "cpu"):
        resources = computed_here(half, device, cuda=False).resources
        assert (resources.device, resources.precision) == (device, "float32")
    assert computed_here(half, "auto", cuda=True).resources.precision == "bfloat16"


def test_a_second_call_goes_on_with_what_is_missing(
    run_command: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_command("--task", NEW, "--images", 20)
    kept = files_in(out / "frozen")
    points = first_points(out)
    capsys.readouterr()
    assert code == 0
    assert run_command("--task", NEW, "--images", 20, "--mode", "all")[0] == 0
    assert "frozen: finished already" in capsys.readouterr().out
    assert files_in(out / "frozen") == kept
    assert first_points(out) == points
    assert run_command("--task", NEW, "--images", 30)[0] == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "images: 20 -> 30" in said


def first_points(out: Path) -> list[str]:
    return (out / "scores.csv").read_text().splitlines()[1:3]


def test_an_owners_own_pictures_are_brought_to_the_runs_form(
    run_command: Callable[..., tuple[int, Path]], tmp_path: Path, trained: TrainedRun
) -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        save(
            tmp_path / "Clinic 9" / f"{number}.png", random.integers(0, 256, (20, 14, 3), np.uint8)
        )
    code, out = run_command("--data", tmp_path / "Clinic 9")
    assert code == 0
    site = TrainedSite(out / "frozen" / "clinic-9", CPU)
    assert site.shapes == trained.shapes
    images = generate(
        site.denoiser(site.tasks[0]),
        site.objective.process,
        site.config.sampling,
        count=2,
        shape=site.shapes[0],
        seed=0,
        task="x",
    ).images
    assert images.shape == (2, 8, 8, 1)
    # A site's store has a core too, and another task can build on that.
    arguments = [
        "--store",
        out / "frozen" / "clinic-9",
        "--task",
        NEW,
        *FEW,
        "--out",
        tmp_path / "further",
    ]
    assert command.main([str(argument) for argument in arguments]) == 0
    assert same_bits(SiteModel(tmp_path / "further" / "frozen" / NEW).tensors[0], trained.shared)


def test_an_npz_without_labels_is_a_task(
    run_command: Callable[..., tuple[int, Path]], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "site.npz", train_images=images[:20], test_images=images[20:])
    code, out = run_command("--data", tmp_path / "site.npz", "--images", 12)
    assert code == 0
    assert json.loads((out / "adaptation.json").read_text())["images"] == 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--task", "digit-1"),
            "digit-1 is no task that the run has not seen; allowed: digit-3, digit-4",
        ),
        (
            ("--task", NEW, "--images", 10_000),
            "--images 10000 is impossible: digit-7 has 143 training images",
        ),
        (("--task", NEW, "--images", 0), "--images 0 is impossible"),
        (("--task", NEW, "--steps", 0), "--steps 0 is impossible"),
        (
            ("--task", NEW, "--every", 7),
            "7 steps between two scores are impossible; allowed: 1 to 6",
        ),
        (
            ("--task", NEW, "--images", 20, "--validation", 19),
            "--validation 19 is impossible: digit-7 has 20 training images, 2 of which are left",
        ),
        (("--task", NEW, "--samples", 1), "--samples 1 is impossible; allowed: 2 or more"),
        (("--data", "/nowhere/at/all"), "/nowhere/at/all does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    arguments: tuple[object, ...],
    said: str,
    run_command: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out = run_command(*arguments)
    message = capsys.readouterr().err
    assert code == 2
    assert said in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_too_few_images_to_hold_any_out(
    run_command: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save(tmp_path / "few" / f"{number}.png", np.full((8, 8), 80 * number, np.uint8))
    assert run_command("--data", tmp_path / "few")[0] == 2
    assert (
        "few has 2 training and 1 held-out images; a score needs 2 of each"
        in capsys.readouterr().err
    )


def test_channels_that_cannot_be_converted_are_an_error(
    run_command: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "two.npz", train_images=np.zeros((20, 8, 8, 2), np.uint8))
    assert run_command("--data", tmp_path / "two.npz")[0] == 2
    assert "only grey and RGB are converted" in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(
    run_command: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "out" / "holiday.png", np.zeros((8, 8), np.uint8))
    assert run_command("--task", NEW)[0] == 2
    assert "is not an empty folder" in capsys.readouterr().err

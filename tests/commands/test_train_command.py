"""``srfed train``: what is proposed for somebody's images and this machine, and what is said before
anything begins.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srfed import plan
from srfed.config import RunConfig, load_config
from srfed.config.presets import is_preset, preset_file
from srfed.data import load_tasks
from srfed.runs.proposed import FEW, Proposal, propose
from srfed.runs.requested import requested_config
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.tiny_run import TINY, records, tiny_config

TINY_SETTINGS = [
    f"{section}.{key}={json.dumps(value)}"
    for section in ("model", "training", "sampling")
    for key, value in TINY[section].items()
]


def photos(folder: Path, *tasks: str, count: int = 10, size: tuple[int, int] = (8, 8)) -> Path:
    """Grey noise, and its folder."""
    rng = np.random.default_rng(0)
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / task / f"{number}.png")
    return folder


def configuration(proposal: Proposal, folder: Path, *overrides: str) -> RunConfig:
    return requested_config(
        proposal.base, [*proposal.overrides, *overrides], {"data.dir": json.dumps(str(folder))}
    )


# --- What is proposed -----------------------------------------------------------------------------


def test_few_images_an_owner_take_the_recipe_for_few_and_the_best_round(tmp_path: Path) -> None:
    folder = photos(tmp_path / "my drawings", "a", "b", "c")
    config = configuration(propose(str(folder), None, [], {}), folder)
    assert config.model_dump(exclude={"name", "data", "federation"}) == load_config(
        preset_file("few_images")
    ).model_dump(exclude={"name", "data", "federation"})
    assert (config.name, config.data.dataset) == ("my-drawings", "folder")
    assert (config.federation.clients, config.federation.result) == (3, "best")
    assert config.data.image_size is None
    # Of eight to train on, four set aside would be half.
    assert config.data.validation_images == 4
    fewer = photos(tmp_path / "fewer", "a", "b", count=7)
    assert propose(str(fewer), None, [], {}).settings["data.validation_images"] == 2


def test_more_images_an_owner_take_the_usual_recipe(tmp_path: Path) -> None:
    enough = FEW + 20
    file = tmp_path / "winds.npz"
    images = np.random.default_rng(0).integers(0, 256, (2 * enough, 8, 8), dtype=np.uint8)
    test = images[:8]
    np.savez(
        file,
        train_images=images,
        train_labels=np.arange(2 * enough) % 2,
        test_images=test,
        test_labels=np.arange(8) % 2,
    )
    proposal = propose(str(file), None, [], {})
    assert proposal.base is not None
    assert proposal.base.stem == "small"
    config = configuration(proposal, file)
    assert (config.name, config.data.dataset, config.federation.clients) == ("winds", "npz", 2)
    assert config.federation.result == "last"


def test_pictures_of_many_sizes_get_one_and_grey_beside_colour_three_channels(
    tmp_path: Path,
) -> None:
    folder = photos(tmp_path / "photos", "a", size=(40, 50))
    photos(folder, "b", size=(26, 30))
    proposal = propose(str(folder), None, [], {})
    assert proposal.settings["data.image_size"] == 24
    assert "data.channels" not in proposal.settings
    Image.new("RGB", (60, 60)).save(folder / "a" / "colour.png")
    proposal = propose(str(folder), None, [], {})
    assert proposal.settings["data.channels"] == 3
    tasks = load_tasks(configuration(proposal, folder).data, 2)
    assert {task.shape for task in tasks} == {(24, 24, 3)}
    large = photos(tmp_path / "large", "a", count=5, size=(64, 64))
    assert propose(str(large), None, [], {}).settings["data.image_size"] == 32


def test_what_is_said_stays(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", "a", "b", "c", size=(40, 50))
    said = ["data.image_size=10", "name=x", "federation={clients: 2, rounds: 7}"]
    config = configuration(propose(str(folder), None, said, {}), folder, *said)
    assert (config.name, config.data.image_size) == ("x", 10)
    assert (config.federation.clients, config.federation.rounds) == (2, 7)
    file = tmp_path / "own.yaml"
    file.write_text("name: mine\ndata: {image_size: 12}\ntraining: {batch_size: 3}\n")
    config = configuration(propose(str(folder), file, [], {}), folder)
    assert (config.name, config.data.image_size, config.training.batch_size) == ("mine", 12, 3)
    assert config.federation.clients == 3
    assert config.federation.rounds == RunConfig().federation.rounds


def test_a_published_set_is_found_by_looking(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    proposal = propose(str(tmp_path), None, [], {})
    assert proposal.base is not None
    assert (proposal.base.stem, proposal.settings["data.dataset"]) == ("mnist", "mnist")
    (tmp_path / "cifar-100-python").mkdir()
    done = run_here("train", "--data", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "holds mnist and cifar100; say which is meant" in done.stderr
    preset = preset_file("cifar100")
    assert propose(str(tmp_path), preset, [], {}).settings["data.dataset"] == "cifar100"
    assert is_preset(preset.resolve())
    assert not is_preset(tmp_path / "cifar100.yaml")


def test_many_owners_have_samples_enough_for_a_score(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", *(f"o{number}" for number in range(110)), count=3)
    config = configuration(propose(str(folder), None, [], {}), folder)
    assert (config.federation.clients, config.evaluation.samples_between) == (110, 220)


def test_a_quick_run_takes_ten_owners_and_enlarges_nothing(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", *"abcdefghijkl")
    config = configuration(propose(str(folder), None, [], {}, quick=True), folder)
    assert (config.federation.clients, config.data.image_size) == (10, None)
    assert config.training.learning_rate_schedule == "linear"
    assert config.training.decay_rounds is None
    assert propose(str(folder), None, [], {}, quick=True).fitted
    many = propose(str(folder), None, ["federation.clients=40"], {}, quick=True)
    assert many.settings["evaluation.samples"] == 80
    assert not propose(str(folder), None, ["federation.rounds=3"], {}, quick=True).fitted
    (tmp_path / "own.yaml").write_text("seed: 3\n")
    done = run_here("train", "--quick", "--config", "own.yaml", folder=tmp_path)
    assert "--quick would be ignored" in done.stderr
    digits = propose(None, None, [], {}, quick=True)
    assert requested_config(digits.base, digits.overrides, {}).data == RunConfig().data


# --- The plan -------------------------------------------------------------------------------------


def test_the_plan_is_said_and_a_dry_run_ends_there(tmp_path: Path) -> None:
    photos(tmp_path / "photos", "a", "b", count=20)
    done = run_here("train", "--data", "photos", "--dry-run", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for said in (
        r"^data: +photos is taken as data\.dataset = folder$",
        r"^recipe: +few_images, for owners of 16 training images",
        r"^owners: +2, with \d+ to \d+ images",
        r"^images: +8 x 8 x 1$",
        r"^network: +φ 834,\d+ parameters, shared; θ_i 1,024",
        r"^steps: +2,560, in 80 rounds$",
        r"^time: +about \d+.*an estimate",
        r"^memory: +about [\d.]+ [MG]B at peak$",
        r"^traffic: .* in all$",
    ):
        assert re.search(said, done.stdout, re.MULTILINE), (said, done.stdout)
    assert [one.name for one in tmp_path.iterdir()] == ["photos"]


def test_what_is_slow_here_gets_a_smaller_network_only_where_that_was_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config({"model.channels": [16, 32, 64, 64]})
    tasks = load_tasks(config.data, 3)
    monkeypatch.setattr(plan, "SLOWEST", 0.0)
    assert plan.plan_run(config, tasks).config == config
    smaller = plan.plan_run(config, tasks, free=True)
    assert smaller.config.model.channels == plan.SMALLER
    assert "smaller than the recipe's" in "".join(smaller.lines())


def test_a_plan_counts_what_the_run_then_does(finished_run: RunFolder) -> None:
    config = finished_run.config
    made = plan.plan_run(config, load_tasks(config.data, 3))
    lines = [line for line in records(finished_run) if line["kind"] == "round"]
    assert made.steps * config.training.batch_size == sum(line["images"] for line in lines)
    for planned, key in ((made.bytes_up, "bytes_up"), (made.bytes_down, "bytes_down")):
        assert planned * 3 == pytest.approx(lines[0][key], rel=0.05)


def test_the_time_of_a_plan_has_the_evaluations_and_the_page_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 0.3 s an image of a step: 0.1 s a pass."""
    monkeypatch.setattr(plan, "_steps_timed", lambda config, task: plan.Timed(0.3, 0.0, 0.0))
    changes = {
        "federation.rounds": 6,
        "federation.clients_per_round": 2,
        "federation.result": "best",
        "federation.validate_every": 2,
        "data.validation_images": 5,
    }
    config = tiny_config(changes)
    made = plan.plan_run(config, load_tasks(config.data, 3))
    # Of three clients: 12 samples of 5 steps, 3 reconstructions from t = 5 in 4; at the end 30,
    # from 5 and 10 in 4 each.
    passes = 2 * (12 * 5 + 9 * 4) + 30 * 5 + 9 * 8
    assert made.seconds_besides == pytest.approx(5 + 0.1 * passes + 3 * 3 + 3)
    # Two clients, 2 steps of 16; every other round 8 moments of 5 images of three.
    steps, looks = 1.4 * 2 * 32 * 0.3, 3 * 5 * 8 * 0.1 / 2
    assert made.seconds_per_round == pytest.approx(steps + looks)
    compared = plan.plan_run(
        tiny_config({**changes, "federation.compare": "alone"}), load_tasks(config.data, 3)
    )
    tests = sum(test for _, _, test in compared.owners.values())
    assert compared.seconds_besides - made.seconds_besides == pytest.approx(3 * 2 * 8 * tests * 0.1)
    assert compared.seconds_per_round == pytest.approx(2 * steps + 3 * looks)


# --- Runs -----------------------------------------------------------------------------------------


def test_a_quick_run_is_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "QUICK", 0.0)
    photos(tmp_path / "photos", "a", "b", count=12, size=(20, 20))
    settings = [*TINY_SETTINGS, "evaluation.ssim_images=0"]
    done = run_here("train", "--data", "photos", "--quick", "--set", *settings, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").glob("photos-*")
    run = RunFolder.open(path)
    federation, data = run.config.federation, run.config.data
    assert (federation.rounds, federation.clients, data.image_size) == (1, 2, 16)
    assert run.config.resources.backend == "inline"
    assert [line["final"] for line in records(run) if line["kind"] == "evaluation"] == [True]
    assert run.summary.exists()
    assert list(run.samples.glob("*.png"))
    done = run_here("train", "--resume", path, "--quick", folder=tmp_path)
    assert done.returncode == 2
    assert "--quick is for a new run" in done.stderr
    done = run_here("train", "--resume", path, folder=tmp_path)
    assert "is finished already" in done.stdout


def test_compare_says_for_each_owner_what_joining_is_worth(tmp_path: Path) -> None:
    photos(tmp_path / "photos", "east", "west", count=12)
    settings = [*TINY_SETTINGS, "federation.rounds=1", "evaluation.ssim_images=0"]
    done = run_here(
        "train", "--data", "photos", "--quick", "--compare", "--set", *settings, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "and as many of everybody alone" in done.stdout
    assert re.search(r"^east +[\d.]+ +[\d.]+ +[\d.]+ \(", done.stdout, re.MULTILINE)
    done = run_here(
        "train",
        "--data",
        "photos",
        "--compare",
        "--set",
        "federation.compare=none",
        folder=tmp_path,
    )
    assert "federation.compare is set twice" in done.stderr

"""A run that starts from a trained run's φ, with owners of its own."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor, equal

import srfed
from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.records import RoundRecord, TaskInfo
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.manifest import read_manifest
from srfed.storage.run_folder import RunFolder
from srfed.storage.start import load_start
from support.commands import run_here
from support.errors import message_of
from support.tiny_run import CHEAP, all_bits, tiny_config

OTHERS = ["digit-4", "digit-5"]
SHORT = {**CHEAP, "federation.rounds": 2}


def new_owners(**settings: object) -> tuple[RunConfig, list[srfed.Task]]:
    tasks = load_tasks(tiny_config().data, 6)[4:]
    config = tiny_config({**SHORT, **{k.replace("__", "."): v for k, v in settings.items()}})
    return config, [srfed.Task(task.name, task.train, task.test) for task in tasks]


def tensors_of(checkpoint: Path, group: str) -> dict[str, Tensor]:
    tensors = read_checkpoint(checkpoint).group(group)
    assert tensors
    return tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return srfed.train(tiny_config(SHORT), run_dir=tmp_path_factory.mktemp("from") / "run").path


@pytest.fixture(scope="module")
def started(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> srfed.Run:
    folder = tmp_path_factory.mktemp("start") / "run"
    return srfed.train(*new_owners(), run_dir=folder, start_from=srfed.open_run(trained))


def test_phi_is_the_trained_average_and_theta_is_fresh(trained: Path, started: srfed.Run) -> None:
    theirs = tensors_of(trained / "server" / "round-00002", "shared_average")
    for group in ("shared", "shared_average"):
        ours = tensors_of(started.path / "server" / "round-00000", group)
        assert set(ours) == set(theirs)
        assert all(equal(ours[name], theirs[name]) for name in theirs)
    assert started.tasks == OTHERS
    straight = tensors_of(started.path / "server" / "round-00002", "shared")
    assert any(not equal(straight[name], theirs[name]) for name in theirs), "it has trained on"
    # θ_0 of the new run is that of a run of the same seed that starts from nothing.
    assert read_manifest(started.path / "server" / "round-00000")["attempts"] == {}


def test_where_it_comes_from_is_on_record(trained: Path, started: srfed.Run) -> None:
    origin = json.loads((started.path / "run.json").read_text())["start"]
    lineage = json.loads((trained / "run.json").read_text())["lineage"]
    assert (origin["run"], origin["lineage"], origin["round"]) == (trained.name, lineage, 2)
    assert len(bytes.fromhex(origin["phi_sha256"])) == hashlib.sha256().digest_size
    assert origin["phi_sha256"][:12] in (started.path / "report.html").read_text()
    assert "start" not in json.loads((trained / "run.json").read_text())


class StopAtOnce(srfed.Observer):
    """With the checkpoint of round 0."""

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        raise KeyboardInterrupt


class Stop(srfed.Observer):
    def on_round(self, record: RoundRecord) -> None:
        raise KeyboardInterrupt


def test_it_goes_on_with_the_same_bits_though_the_other_run_is_gone(
    trained: Path, started: srfed.Run, tmp_path: Path
) -> None:
    source = shutil.copytree(trained, tmp_path / "source")
    config, tasks = new_owners()
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        srfed.train(config, tasks, run_dir=folder, start_from=source, observers=[Stop()])
    shutil.rmtree(source)
    shutil.rmtree(folder / "server")  # as if it had been killed before its first checkpoint
    shutil.rmtree(folder / "clients")
    run = srfed.train(config, tasks, run_dir=folder, resume=True)
    assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(started.path))
    text = message_of(
        lambda: srfed.train(config, tasks, run_dir=folder, resume=True, start_from=trained)
    )
    assert f"start_from = {trained} is for a new run" in text


def refusals(trained: Path) -> Iterator[tuple[dict[str, object], str]]:
    yield {"model__channels": [8, 8, 16, 16]}, "model.channels is [8, 16, 16, 16] there and [8, 8"
    yield {"model__exclusive_stages": "io"}, 'model.exclusive_stages is 2 there and "io" here'
    yield {"diffusion__prediction": "velocity"}, 'diffusion.prediction is "noise" there and "velo'


def test_another_network_is_refused_by_the_setting_before_anything_is_written(
    trained: Path, tmp_path: Path
) -> None:
    for settings, words in refusals(trained):
        config, tasks = new_owners(**settings)
        text = message_of(
            lambda c=config, t=tasks: srfed.train(
                c, t, run_dir=tmp_path / "run", start_from=trained
            )
        )
        assert words in text
        assert text.endswith("allowed: the same")
    missing = tmp_path / "nothing"
    config, tasks = new_owners()
    text = message_of(
        lambda: srfed.train(config, tasks, run_dir=tmp_path / "x", start_from=missing)
    )
    assert "is not the folder of a run" in text
    assert not any(tmp_path.iterdir())


def test_images_of_other_channels_are_refused_where_what_meets_them_is_shared(
    tmp_path: Path,
) -> None:
    shared = tiny_config({**SHORT, "model.exclusive_stages": "none", "federation.clients": 1})
    source = tmp_path / "source"
    with pytest.raises(KeyboardInterrupt):
        srfed.train(shared, run_dir=source, observers=[StopAtOnce()])
    config, tasks = new_owners(model__exclusive_stages="none", data__channels=3)
    text = message_of(
        lambda: srfed.train(config, tasks, run_dir=tmp_path / "run", start_from=source)
    )
    assert "of its φ is (8, 1, 3, 3), and (8, 3, 3, 3) here" in text
    assert "data.channels" in text


def test_the_command_takes_the_network_of_the_run_it_starts_from(
    trained: Path, tmp_path: Path
) -> None:
    settings = ["federation.rounds=1", "evaluation.samples=6", "evaluation.samples_between=6"]
    settings += ["evaluation.ssim_images=0", "sampling.steps=1", "training.local_steps=1"]
    done = run_here(
        *("simulate", "--from", trained, "--clients", "2", "--backend", "inline"),
        *("--run-dir", tmp_path / "run", "--set", *settings),
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(tmp_path / "run")
    assert run.config.model == RunFolder.open(trained).config.model != RunConfig().model
    assert (run.path / "start" / "state.safetensors").exists()
    assert f"starts from {trained.name}, round 2, φ " in done.stdout
    again = run_here("simulate", "--resume", run.path, "--from", trained)
    assert again.returncode == 2
    assert "--from is for a new run" in again.stderr
    other = run_here(
        *("simulate", "--from", trained, "--clients", "2", "--backend", "inline"),
        *("--run-dir", tmp_path / "other", "--set", "model.groups=2"),
    )
    assert other.returncode == 2
    assert "model.groups is 4 there and 2 here" in other.stderr
    assert not (tmp_path / "other").exists()


def test_a_start_that_was_changed_is_refused(
    trained: Path, started: srfed.Run, tmp_path: Path
) -> None:
    assert load_start(started.path) is not None
    shutil.copy(started.path / "run.json", tmp_path)
    shutil.copytree(trained / "server" / "round-00001", tmp_path / "start")
    text = message_of(lambda: load_start(tmp_path))
    assert "its φ is not the one that run.json names" in text


def test_one_party_with_all_images_may_start_from_it_too(trained: Path, tmp_path: Path) -> None:
    config, tasks = new_owners(
        training__method="one_task", federation__rounds=1, federation__clients=2
    )
    run = srfed.train(config, tasks, run_dir=tmp_path / "run", start_from=trained)
    theirs = tensors_of(trained / "server" / "round-00002", "shared_average")
    ours = tensors_of(run.path / "server" / "round-00000", "shared")
    assert all(equal(ours[name], theirs[name]) for name in theirs)

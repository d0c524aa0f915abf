"""``srfed centralise``: stopped, killed and resumed with the same bits, and one line for what it
does not do.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from srfed import simulate
from srfed.commands.train import centralise
from srfed.data import load_tasks
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.generation import generate
from srfed.evaluation.references import References
from srfed.model import build_model
from srfed.runs.run import TrainedRun
from srfed.storage.client_store import ClientStore
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from support.tiny_run import TINY, all_bits, records, stop_after_a_round

torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    evaluation = {
        "every": 0,
        "samples": 6,
        "samples_between": 6,
        "ssim_images": 1,
        "ssim_timestep": 5,
        "ssim_curve": [5],
    }
    content = {
        **TINY,
        "evaluation": {**TINY["evaluation"], **evaluation, "memorisation_quantile": 0.0},
    }
    content["training"] = {**TINY["training"], "batch_size": 12}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **content}))
    return path


METHOD_OPTIONS = {
    "pooled": [
        "training.method=pooled",
        "model.exclusive_stages=none",
        "model.task_embedding=shared",
    ],
    "one_task": ["training.method=one_task"],
    "balanced": ["training.method=balanced", "training.centralised_batch_size=36"],
    "all shared but what is owned": [
        "training.method=balanced",
        "training.centralised_batch_size=36",
        "model.exclusive_stages=none",
        "model.owned=[vector, film]",
    ],
}


def setting(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def whole_run(tiny: Path, path: Path, method: str, rounds: int) -> RunFolder:
    options = setting(*METHOD_OPTIONS[method], f"federation.rounds={rounds}")
    assert centralise(["--config", str(tiny), "--run-dir", str(path), *options]) == 0
    return RunFolder.open(path)


def losses(run: RunFolder) -> list[Any]:
    return [(line["round"], line["loss"]) for line in records(run) if line["kind"] == "round"]


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_a_run_that_was_stopped_and_resumed_has_the_bits_of_one_that_was_not(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a round, and again between the tasks' stores and the checkpoint of φ."""
    undisturbed = whole_run(tiny, tmp_path / "whole", method, 3)
    run = whole_run(tiny, tmp_path / "run", method, 1)
    more = ["--resume", str(run.path), *setting("federation.rounds=3")]
    save = ServerCheckpoints.save

    def crash(checkpoints: ServerCheckpoints, state: Any) -> None:
        if state.round == 2:
            raise KeyboardInterrupt
        save(checkpoints, state)

    with monkeypatch.context() as patch:
        patch.setattr(ServerCheckpoints, "save", crash)
        with pytest.raises(SystemExit) as stopped:
            centralise(more)
    assert stopped.value.code == 130
    assert ServerCheckpoints(run.server, 3).rounds() == [0, 1]
    task = "digit-0"
    assert (ClientStore(run.clients, task, run.lineage, 3).folder / "round-00002").exists()
    assert centralise(more) == 0
    run = RunFolder.open(run.path)
    assert all_bits(run) == all_bits(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert [number for number, _ in losses(run)] == [1, 2, 3]
    evaluation = [line for line in records(run) if line["kind"] == "evaluation"][-1]
    assert evaluation == [line for line in records(undisturbed) if line["kind"] == "evaluation"][-1]
    assert "Real training images of the same owners" in run.report.read_text()
    identity = json.loads(run.identity_file.read_text())
    assert (identity["device"], identity["precision"]) == ("cpu", "float32")


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    options = setting(*METHOD_OPTIONS["one_task"], "federation.rounds=9999")
    arguments = ["--config", str(tiny), "--run-dir", str(path), *options]
    code, _ = stop_after_a_round(
        [sys.executable, "-m", "srfed", "centralise", *arguments], signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    run = RunFolder.open(path)
    rounds = ServerCheckpoints(run.server, 3).rounds()[-1] + 2
    assert centralise(["--resume", str(path), *setting(f"federation.rounds={rounds}")]) == 0
    undisturbed = whole_run(tiny, tmp_path / "whole", "one_task", rounds)
    run = RunFolder.open(path)
    assert all_bits(run) == all_bits(undisturbed)
    assert losses(run) == losses(undisturbed)


def test_a_conditional_run_draws_each_task_with_its_own_row(tiny: Path, tmp_path: Path) -> None:
    """The samples that it scored, and those of the run opened later, are those of the row put in by
    hand.
    """
    run = whole_run(tiny, tmp_path / "run", "pooled", 1)
    trained = TrainedRun(run.path, run.config.resources)
    assert [task.task for task in trained.tasks] == ["digit-0", "digit-1", "digit-2"]
    model = build_model(run.config, 1)
    model.load_state_dict(trained.shared)
    model.eval()
    samples = {}
    for row, task in enumerate(trained.tasks):
        # Two images each: the run's six.
        arguments: dict[str, Any] = {
            "count": 2,
            "shape": trained.shapes[0],
            "seed": 0,
            "task": task.task,
        }

        def by_hand(x: Tensor, timesteps: Tensor, row: int = row) -> Tensor:
            return model(x, timesteps, torch.full((len(x),), row))

        process, sampling = trained.objective.process, run.config.sampling
        ours = generate(trained.denoiser(task), process, sampling, **arguments)
        expected = generate(trained.objective.denoiser(by_hand), process, sampling, **arguments)
        np.testing.assert_array_equal(ours.images, expected.images)
        samples[task.task] = expected.images
    tests = {task.name: task.test for task in load_tasks(run.config.data, 3)}
    scores = References(load_feature_network("embedded", "", torch.device("cpu")), tests).score(
        samples
    )
    (evaluation,) = [line for line in records(run) if line["kind"] == "evaluation"]
    assert evaluation["score"] == pytest.approx(scores.overall, rel=1e-6)


@pytest.mark.parametrize(
    ("main", "options", "words"),
    [
        (simulate.main, METHOD_OPTIONS["pooled"], ["training.method = pooled", "srfed centralise"]),
        (
            simulate.main,
            METHOD_OPTIONS["balanced"],
            ["training.method = balanced", "srfed centralise"],
        ),
        (
            centralise,
            [],
            ["training.method = federated", "srfed.simulate", "pooled, one_task, balanced"],
        ),
        (centralise, ["training.method=pooled"], ["exclusive_stages", "2", "none"]),
        (
            centralise,
            ["training.method=one_task", "training.batch_size=400"],
            ["training.batch_size = 400", "'digit-0'", "allowed: up to"],
        ),
    ],
)
def test_what_a_command_does_not_do_it_refuses_in_one_line(
    main: Any,
    options: list[str],
    words: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    assert main(["--config", str(tiny), "--run-dir", str(path), *setting(*options)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not path.exists(), "nothing is written before the check"


def test_pooled_batches_may_be_larger_than_a_task(tiny: Path, tmp_path: Path) -> None:
    options = [*METHOD_OPTIONS["pooled"], "data.images_per_task=10", "federation.rounds=1"]
    assert (
        centralise(["--config", str(tiny), "--run-dir", str(tmp_path / "run"), *setting(*options)])
        == 0
    )


def test_a_refusal_in_a_process_of_its_own_has_no_traceback(tiny: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "srfed",
        "centralise",
        "--config",
        str(tiny),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: training.method = federated")
    assert done.stderr.count("\n") == 1

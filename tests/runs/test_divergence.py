"""Training that diverges, evaluations that fail, and memory that is short: named, and mended."""

import json
import math
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import srfed.federation.flower.client_app as client_app
from srfed.config import SamplingConfig
from srfed.diffusion.process import Denoiser
from srfed.evaluation.generation import Generated, generate
from srfed.interrupts import run_command
from srfed.model import build_objective
from srfed.records import TaskInfo
from srfed.runs.centralised import Centralised
from srfed.runs.loop import run_rounds
from srfed.runs.run import TrainedRun
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.training.divergence import DIVERGED, Divergence
from support.commands import run_here
from support.errors import message_of
from support.tiny_run import CHEAP, begin, run_in_process, tiny_config

WILD = {
    "training.optimizer": "sgd",
    "training.learning_rate": 10.0,
    "training.gradient_clip": None,
    "training.local_steps": 8,
    "federation.rounds": 1,
    "evaluation.memorisation_quantile": 0.0,
    "federation.clients": 2,
}


def words(error: str) -> str:
    return " ".join(error.split())


def train(run: RunFolder) -> None:
    if run.config.training.method == "federated":
        run_in_process(run)
    else:
        run_rounds(run, Centralised(run))


@pytest.mark.parametrize("method", ["federated", "balanced"])
def test_a_run_that_diverges_says_so_and_goes_on_with_lower_rates(
    tmp_path: Path, method: str
) -> None:
    run = begin(tmp_path / "run", {**CHEAP, **WILD, "training.method": method})
    text = message_of(train, run)
    for part in (
        "diverged at digit-0",
        "digit-1",
        "a lower training.learning_rate (it is 10) or training.gradient_clip (it is null)",
        "--resume",
    ):
        assert part in text
    calm = {"learning_rate": 0.01, "gradient_clip": 1.0}
    changed = run.config.training.model_copy(update={**calm, "local_steps": 3})
    other = run.config.model_copy(update={"training": changed})
    assert message_of(run.reconfigure, other).endswith("training.local_steps: 8 -> 3")
    lower = run.config.training.model_copy(update=calm)
    train(RunFolder.open(run.path).reconfigure(run.config.model_copy(update={"training": lower})))
    (first,) = MetricsLog(run.metrics).rounds()
    assert first["lowered"] == {"training.learning_rate": 0.01, "training.gradient_clip": 1.0}
    assert first["learning_rate"] == 0.01
    assert max(first["loss_by_client"].values()) < 3
    again = RunFolder.open(run.path)
    assert again.config.training.gradient_clip == 1.0
    text = message_of(again.reconfigure, run.config)
    assert "training.learning_rate: 0.01 -> 10.0" in text


def test_a_stop_between_the_two_files_leaves_a_run_that_opens(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    before = run.config_file.read_bytes()
    training = run.config.training.model_copy(update={"learning_rate": 1e-4})
    lowered = run.reconfigure(run.config.model_copy(update={"training": training}))
    with lowered.in_use():
        pass
    assert json.loads(run.identity_file.read_text())["settings"]["training.learning_rate"] == 1e-4
    run.config_file.write_bytes(before)
    assert RunFolder.open(run.path).config == run.config
    run.config_file.write_bytes(before.replace(b"local_steps: 2", b"local_steps: 3"))
    assert "local_steps" in message_of(RunFolder.open, run.path)


def test_a_loss_above_1_is_told_once_after_the_first_rounds_with_the_round_it_began() -> None:
    training = tiny_config().training
    watch = Divergence(training)
    assert watch.add(1, {"a": 1.3, "b": 0.9}, {}) is None
    assert watch.add(2, {"a": 1.2, "b": 0.8}, {}) is None
    said = watch.add(3, {"a": 1.1, "b": 2.3}, {})
    assert said is not None
    assert "round 3: training diverges at b (since round 3)" in said
    assert watch.add(4, {"a": 1.1, "b": 2.4}, {}) is None
    said = watch.add(6, {"a": 1.1, "b": 3.0}, {})
    assert said is not None
    assert "at a (since round 1): a loss above 1" in said
    assert "training.learning_rate (it is 0.002)" in said
    gone = watch.add(7, {"a": 0.5}, {"c": f"{DIVERGED}: tensor 'x' ..."})
    assert gone is not None
    assert "at c (since round 7)" in gone
    lines: list[dict[str, Any]] = [
        {"round": 1, "loss_by_client": {"a": 0.7}, "refused": {}},
        {"round": 2, "loss_by_client": {"a": None}, "refused": {}},
    ]
    assert Divergence(training, lines).in_words(["a", "b"]) == "a (since round 2), b"


def test_samples_of_a_model_that_has_diverged_are_a_sentence(tmp_path: Path) -> None:
    config = tiny_config()
    process = build_objective(config, torch.device("cpu")).process
    text = message_of(
        lambda: generate(
            lambda x, t: x * math.nan,  # type: ignore[arg-type]
            process,
            config.sampling,
            count=1,
            shape=(8, 8, 1),
            seed=0,
            task="north",
        )
    )
    assert "the model of north has diverged: its samples are no numbers" in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_short_memory_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert run_command(command) == 2
    assert "there is not enough memory; allowed: fewer images at once (--batch-size" in (
        capsys.readouterr().err
    )
    with pytest.raises(RuntimeError, match="ours"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a defect of ours")))


class Short:
    """A denoiser with memory for so many images; as oneDNN, it refuses ever after what a thread
    has asked too much of.
    """

    def __init__(self, denoiser: Denoiser, most: int, error: Exception) -> None:
        self._denoiser, self._most, self._error = denoiser, most, error
        self.asked: list[int] = []
        self._refused: list[Thread] = []

    def __call__(self, x: Tensor, times: Tensor) -> Tensor:
        self.asked.append(len(x))
        if len(x) > self._most or current_thread() in self._refused:
            self._refused.append(current_thread())
            raise self._error
        return self._denoiser(x, times)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_where_memory_is_short_half_as_many_are_drawn_at_once_and_no_image_changes(
    error: Exception,
) -> None:
    process = build_objective(tiny_config(), torch.device("cpu")).process

    def shrinks(x: Tensor, times: Tensor) -> Tensor:
        return 0.5 * x

    def drawn(denoiser: Denoiser, batch_size: int | None) -> Generated:
        sampling = SamplingConfig(steps=2, batch_size=batch_size)
        return generate(
            denoiser, process, sampling, count=11, shape=(8, 8, 1), seed=0, task="a", strip_steps=3
        )

    short = Short(shrinks, 3, error)
    images, expected = drawn(short, 8), drawn(shrinks, 1)
    assert np.array_equal(images.images, expected.images)
    assert np.array_equal(images.strip, expected.strip)
    assert short.asked == [8, 4, *[2] * 10, 1, 1]
    text = message_of(drawn, Short(shrinks, 0, error), None)
    assert text.startswith("task a: there is not enough memory (cpu) to sample one image of 8 x 8;")


def test_large_images_are_drawn_a_few_at_once_unless_somebody_says_otherwise() -> None:
    default = SamplingConfig()
    assert [default.images_at_once(side, side) for side in (8, 32, 48)] == [256] * 3
    # At 96 px 256 took 4.0 GB where training took 2.1; 64 take 1.3.
    assert default.images_at_once(96, 96) == 64
    assert default.images_at_once(5000, 5000) == 1
    assert SamplingConfig(batch_size=100).images_at_once(96, 96) == 100


def test_a_last_evaluation_that_failed_everywhere_is_not_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run", {**CHEAP, "federation.rounds": 1, "federation.clients": 2})

    def fails(*_: object, **__: object) -> None:
        raise MemoryError("no room for 256 samples")

    with monkeypatch.context() as broken:
        broken.setattr(client_app, "evaluate_task", fails)
        ended = run_here("simulate", "--resume", run.path)
    assert ended.returncode == 2
    said = words(ended.stderr)
    assert "evaluation 1 has no score, as no client gave samples" in said
    for client in ("digit-0", "digit-1"):
        assert (
            f"{run.clients / client / 'client.log'}: MemoryError: no room for 256 samples" in said
        )
    assert "it is the last, so the run has not ended" in said
    ended = run_here("simulate", "--resume", run.path)
    assert ended.returncode == 0, ended.stderr
    (evaluation,) = MetricsLog(run.metrics).evaluations()
    assert evaluation["final"]


def test_a_name_wins_over_a_position_and_a_number_that_is_anothers_name_is_refused() -> None:
    names = ["0", "1", "10", "2"]
    run = object.__new__(TrainedRun)
    run.tasks = [TaskInfo(f"client-{name}", name, 9, 2) for name in names]
    assert [run.find_task(name).task for name in names] == names
    assert run.find_task("3").task == "2"
    assert run.find_task(3).task == "2"
    assert run.find_task(1).task == "1"
    text = message_of(run.find_task, 2)
    assert "task 2 is '10' by position, and another one is called '2'" in text
    assert "2 (10), 3 (2)" in message_of(run.find_task, "4")
    assert "it has 0 (0)" in message_of(run.find_task, -1)
    assert "it has 0 (0)" in message_of(run.find_task, "-1")


def test_a_task_is_found_by_the_name_of_its_folder() -> None:
    run = object.__new__(TrainedRun)
    run.tasks = [TaskInfo(name, name, 9, 2) for name in ("red-cells", "red", "7")]
    assert run.find_task("Red_cells").task == "red-cells"
    assert run.find_task("red!").task == "red"
    for wrong in ("red cell", "-7", "§"):
        assert f"'{wrong}' is not in this run" in message_of(run.find_task, wrong)

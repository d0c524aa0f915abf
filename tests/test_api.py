"""The front door: what a notebook would do, in this process and in threads of it."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.supercore.task_identity import TaskIdentity

import srfed
from srfed.data import load_tasks
from srfed.federation.flower.exchange import stop_requested
from srfed.observer import Stage
from srfed.randomness import derive_generator
from srfed.records import RoundRecord
from srfed.reporting.pace import round_passes
from srfed.storage.run_folder import RunFolder
from srfed.work import passes_done
from support.tiny_run import CLIENTS, all_bits, begin, records, run_in_process, tiny_config

TWO = {"federation.rounds": 2}


def tiny_tasks() -> list[srfed.Task]:
    """The images of the tiny run, as somebody has them in a notebook."""
    loaded = load_tasks(tiny_config().data, 3)
    return [srfed.Task(task.name, task.train, task.test) for task in loaded]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> srfed.Run:
    return srfed.train(tiny_config(TWO), run_dir=tmp_path_factory.mktemp("api") / "run")


def test_importing_srfed_loads_no_torch_and_nothing_but_itself() -> None:
    program = "import sys, srfed; print(*({'torch', 'numpy', 'flwr'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert set(srfed.__all__) <= set(dir(srfed))
    for name in srfed.__all__:
        assert getattr(srfed, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = srfed.trian  # type: ignore[attr-defined]


def test_training_here_has_the_bits_of_the_command(trained: srfed.Run, tmp_path: Path) -> None:
    by_command = run_in_process(begin(tmp_path / "run", TWO))
    assert all_bits(RunFolder.open(trained.path)) == all_bits(by_command)
    assert records(RunFolder.open(trained.path)) == records(by_command)
    assert "finished: round 2 of 2" in (trained.path / "report.html").read_text()


def test_a_run_prints_nothing_and_leaves_nothing_behind(
    trained: srfed.Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But what libraries set when they are first imported, for the run before."""
    # Flower has one identity for the whole process; here is somebody who has set it.
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    srfed.train(tiny_config({"federation.rounds": 1}), run_dir=tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert TaskIdentity.run_id == 7
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_run_that_was_stopped_in_this_process_stops_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run for which nobody names a folder has one by its name and time."""
    monkeypatch.chdir(tmp_path)
    stop_requested.set()
    run = srfed.train(tiny_config({"federation.rounds": 1}), tiny_tasks())
    assert run.round == 1
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run.path.name)
    assert run.path.parent == tmp_path / "runs"


class Watching(srfed.Observer):
    """Writes down what it is told, and stops the run after a round."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.told: list[int | str] = []

    def on_round(self, record: RoundRecord) -> None:
        self.told.append(record.round)
        if record.round == self.last:
            raise KeyboardInterrupt

    def on_end(self) -> None:
        self.told.append("end")


def test_observers_are_told_and_what_one_raises_stops_the_run(tmp_path: Path) -> None:
    first, second = Watching(1), Watching(9)
    config = tiny_config(TWO)
    with pytest.raises(KeyboardInterrupt):
        srfed.train(config, run_dir=tmp_path / "run", observers=[first])
    assert first.told == [1, "end"]
    assert RunFolder.open(tmp_path / "run").last_round == 1
    run = srfed.train(config, run_dir=tmp_path / "run", resume=True, observers=[second])
    assert second.told == [2, "end"]
    straight = srfed.train(config, run_dir=tmp_path / "straight")
    assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(straight.path))
    again = srfed.train(config, run_dir=tmp_path / "run", resume=True, observers=[second])
    assert (again.round, second.told) == (2, [2, "end"]), "a finished run is only opened"


class Told(srfed.Observer):
    """Writes down what it is told in sentences, and stops the run when it has begun."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def on_notice(self, text: str) -> None:
        self.notices.append(text)

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        raise KeyboardInterrupt


def test_observers_are_told_which_images_hold_next_to_nothing(tmp_path: Path) -> None:
    tasks = tiny_tasks()
    black = [srfed.Task(tasks[0].name, tasks[0].train * 0, tasks[0].test * 0), *tasks[1:]]
    told = Told()
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            srfed.train(
                tiny_config(TWO), black, observers=[told], run_dir=tmp_path / "run", resume=resume
            )
    first, advice = told.notices[:2]
    assert first.startswith("images of digit-0: ")
    assert "are of one value, all" in first
    assert "data.background" in advice
    assert told.notices[2:] == [first, advice]
    sound = Told()
    with pytest.raises(KeyboardInterrupt):
        srfed.train(tiny_config(TWO), tasks, observers=[sound], run_dir=tmp_path / "sound")
    assert sound.notices == []


def test_a_run_in_another_thread_is_as_one_in_the_main_thread(
    trained: srfed.Run, tmp_path: Path
) -> None:
    ended: list[srfed.Run] = []
    thread = threading.Thread(
        target=lambda: ended.append(srfed.train(tiny_config(TWO), run_dir=tmp_path / "run"))
    )
    thread.start()
    thread.join(timeout=200)
    (run,) = ended
    assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(trained.path))


def test_tasks_given_as_arrays_train_as_those_of_a_data_set(
    trained: srfed.Run, tmp_path: Path
) -> None:
    run = srfed.train(tiny_config(TWO), tiny_tasks(), run_dir=tmp_path / "run")
    assert run.tasks == trained.tasks == CLIENTS
    assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(trained.path))
    assert (run.path / "tasks.npz").stat().st_mode & 0o077 == 0, "images are their owner's alone"
    longer = tiny_config({"federation.rounds": 3})
    assert srfed.train(longer, tiny_tasks(), run_dir=run.path, resume=True).round == 3
    others = [srfed.Task(t.name, 255 - t.train, t.test) for t in tiny_tasks()]
    with pytest.raises(srfed.UserError, match="the tasks are others than those that"):
        srfed.train(longer, others, run_dir=run.path, resume=True)


def image(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


WRONG: dict[str, tuple[list[srfed.Task], str]] = {
    "none": ([], "tasks is empty"),
    "a name for no file": (
        [srfed.Task("Clinic A", image(9, 8, 8, 1), image(2, 8, 8, 1))],
        "task name 'Clinic A' is impossible; allowed: such as 'clinic-a'",
    ),
    "one name twice": (
        [srfed.Task("a", image(9, 8, 8, 1), image(2, 8, 8, 1))] * 2,
        "two tasks are called 'a'",
    ),
    "floats": (
        [srfed.Task("a", image(9, 8, 8, 1, dtype=np.float32), image(2, 8, 8, 1))],
        "train of task 'a' is float32",
    ),
    "no channels": (
        [srfed.Task("a", image(9, 8, 8), image(2, 8, 8, 1))],
        r"train of task 'a' is uint8 \(9, 8, 8\); it must be",
    ),
    "mixed sizes": (
        [srfed.Task("a", image(9, 8, 8, 1), image(2, 9, 9, 1))],
        "a task's must be of one shape",
    ),
    "two channels": (
        [srfed.Task("a", image(9, 8, 8, 2), image(2, 8, 8, 2))],
        "allowed: 1 or 3 channels",
    ),
    "one test image": (
        [srfed.Task("a", image(9, 8, 8, 1), image(1, 8, 8, 1))],
        "data.test_fraction = 0.2 gives 1 held-out image of task a",
    ),
    "fewer images than a minibatch": (
        [srfed.Task("a", image(3, 8, 8, 1), image(2, 8, 8, 1))],
        "training.batch_size",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tasks_that_cannot_be_are_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    tasks, words = WRONG[name]
    with pytest.raises(srfed.UserError, match=words) as caught:
        srfed.train(tiny_config(TWO), tasks, run_dir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_opened_run_samples_scores_and_lists_its_metrics(trained: srfed.Run) -> None:
    run = srfed.open_run(str(trained.path))
    assert (run.round, run.tasks) == (2, CLIENTS)
    images = run.sample("digit-1", 5, seed=3)
    assert (images.shape, images.dtype) == ((5, 8, 8, 1), np.uint8)
    assert np.array_equal(images, run.sample(1, 5, seed=3))
    assert not np.array_equal(images, run.sample(1, 5, seed=4))
    lines = run.metrics()
    assert [line["kind"] for line in lines] == ["round", "round", "evaluation"]
    assert lines[0]["loss"] > lines[1]["loss"]
    scored = run.evaluate(12, ssim_images=2)
    assert scored["samples"] == 12
    again = run.evaluate(12, ssim_images=2)
    assert {name: again[name] for name in scored} == scored, "the second call finds what is there"
    for call, words in (
        (lambda: run.sample("digit-7", 1), "digit-7.*is not in this run"),
        (lambda: run.sample(0, 0), "n = 0 is impossible; allowed: 1 or more"),
        (lambda: run.evaluate(1), "samples"),
        (lambda: run.evaluate(12, quantile=0.7), "quantile = 0.7 is impossible"),
        (lambda: run.evaluate(12, network="lenet"), "evaluation.feature_network"),
        (lambda: srfed.open_run(trained.path.parent), "no model"),
    ):
        with pytest.raises(srfed.UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_new_task_is_adapted_to_and_opened(trained: srfed.Run, tmp_path: Path) -> None:
    loaded = load_tasks(tiny_config().data.model_copy(update={"images_per_task": 16}), 4)[3]
    task = srfed.Task("newcomer", loaded.train, loaded.test)
    settings: dict[str, Any] = {"out": tmp_path / "new", "steps": 4, "every": 2, "samples": 4}
    adapted = trained.adapt(task, **settings)
    assert adapted.tasks == ["newcomer"]
    assert adapted.sample("newcomer", 2).shape == (2, 8, 8, 1)
    assert trained.adapt(task, **settings).path == adapted.path, "finished, so it is opened again"
    with pytest.raises(srfed.UserError, match="it has no metrics"):
        adapted.metrics()
    with pytest.raises(srfed.UserError, match="is a site's store"):
        adapted.evaluate(12)
    with pytest.raises(srfed.UserError, match="mode = 'melted' is unknown; allowed: frozen"):
        trained.adapt(task, mode="melted", **settings)
    black = srfed.Task("newcomer", 0 * loaded.train, 0 * loaded.test)
    with (
        pytest.warns(UserWarning, match="images of newcomer: .* are of one value, all"),
        pytest.raises(srfed.UserError, match="holds another adaptation"),
    ):
        trained.adapt(black, **settings)


def test_resuming_says_what_it_needs(trained: srfed.Run, tmp_path: Path) -> None:
    with pytest.raises(srfed.UserError, match="resume needs run_dir"):
        srfed.train(tiny_config(TWO), resume=True)
    other = tiny_config(TWO).model_copy(update={"seed": 1})
    with pytest.raises(srfed.UserError, match="begun with another configuration: seed: 0 -> 1"):
        srfed.train(other, run_dir=trained.path, resume=True)
    with pytest.raises(srfed.UserError, match="is not the folder of a run"):
        srfed.train(tiny_config(TWO), run_dir=tmp_path, resume=True)
    with pytest.raises(srfed.UserError, match=str(trained.path)):
        srfed.train(tiny_config(TWO), run_dir=trained.path)


def test_an_opened_run_gives_the_denoiser_that_samples_are_drawn_with(trained: srfed.Run) -> None:
    """A sampler of one's own over it, DDIM written out, draws what Run.sample does."""
    denoise, config = trained.denoiser("digit-1"), trained.config
    betas = torch.linspace(1e-4, 0.02, 500, dtype=torch.float64) * 2
    alpha_bars = [1.0, *torch.cumprod(1 - betas, 0).tolist()]
    eta, steps = config.sampling.eta, config.sampling.steps
    times = [500 * (steps - i) // steps for i in range(steps + 1)]
    images = []
    for number in range(2):
        generator = derive_generator(3, "samples", "digit-1", number)
        x = torch.randn(1, 8, 8, generator=generator)[None]
        for t, s in pairwise(times):
            now, then = alpha_bars[t], alpha_bars[s]
            with torch.no_grad():
                image = denoise(x, torch.tensor([t])).clamp(-1, 1)
            noise = (x - now**0.5 * image) / (1 - now) ** 0.5
            variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
            x = then**0.5 * image + max(0.0, 1 - then - variance) ** 0.5 * noise
            if s:
                x += variance**0.5 * torch.randn(1, 8, 8, generator=generator)[None]
        images.append(((x[0].permute(1, 2, 0) + 1) * 127.5).round().numpy())
    ours = trained.sample("digit-1", 2, seed=3).astype(float)
    assert np.abs(ours - np.stack(images)).max() <= 1
    with pytest.raises(srfed.UserError, match="'digit-9' is not in this run"):
        trained.denoiser("digit-9")


class Counting(srfed.Observer):
    """The passes of each round, in whatever process they are made."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self._since = 0

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        self._since = passes_done()

    def on_round(self, record: RoundRecord) -> None:
        self.passes.append(passes_done() - self._since)


@pytest.mark.slow
def test_two_runs_under_ray_in_one_process_leave_nothing_behind(
    trained: srfed.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each with the bits of a run in this process."""
    config = tiny_config({**TWO, "resources.backend": "ray"})
    environment = dict(os.environ)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    level, filters = logging.getLogger("flwr").level, list(warnings.filters)
    for name in ("first", "second"):
        counting = Counting()
        run = srfed.train(config, run_dir=tmp_path / name, observers=[counting])
        assert counting.passes == [round_passes(config, [1, 1, 1])] * 2
        assert all_bits(RunFolder.open(run.path)) == all_bits(RunFolder.open(trained.path))
        assert set(os.environ.items()) ^ set(environment.items()) == set()
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert logging.getLogger("flwr").level == level
        assert list(warnings.filters) == filters
        assert not ray.is_initialized()  # type: ignore[no-untyped-call]
        assert not stop_requested.is_set()
    assert capfd.readouterr().out == ""

"""The commands as a user meets them: the main job, sampling, Ctrl-C, and one line for what is
wrong.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srfed import simulate
from srfed.commands import sample
from srfed.reporting.pictures import GAP, SMALLEST_CELL
from srfed.storage.manifest import STATE_FILE
from srfed.storage.run_folder import RunFolder
from support.tiny_run import all_bits, begin, records, run_in_process, stop_after_a_round


def command(module: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    whole = [sys.executable, "-m", "srfed", module, *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300)


# --- The main job --------------------------------------------------------------------------------


def test_the_main_job_from_the_command_line(
    tiny_yaml: Path, tmp_path: Path, finished_run: RunFolder
) -> None:
    done = command("simulate", "--config", tiny_yaml, "--clients", 3, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, no progress bar where there is no terminal"
    run = RunFolder.open(tmp_path / "run")
    for name in ("config.yaml", "run.json", "metrics.jsonl", "summary.txt", "report.html"):
        assert (run.path / name).stat().st_size > 0, name
    assert run.config.to_yaml() == (run.path / "config.yaml").read_text()
    assert run.summary.read_text().strip() in done.stdout
    lines = done.stdout.splitlines()
    told = [line.split()[1] for line in lines if line.startswith("round")]
    assert (told[0], told[-1]) == ("1/3", "3/3"), "others where a minute has gone by"
    assert [line.split()[0] for line in lines if line.startswith("digit-")] == [
        "digit-0",
        "digit-1",
        "digit-2",
    ]
    for name in ("round-00002", "round-00003", "reverse-process-00002", "reverse-process-00003"):
        with Image.open(run.samples / f"{name}.png") as picture:
            assert picture.size[1] == 3 * (SMALLEST_CELL + GAP), "one row a task"
    # A process of its own, or this one: the same bits.
    assert all_bits(run) == all_bits(finished_run)
    assert records(run) == records(finished_run)

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert {
        "loss/mean",
        "fd_embedded/all",
        "ssim_rec_4_steps/t=5",
        "traffic/bytes_up",
        "traffic/bytes_down",
        "speed/images_per_second",
        "optimisation/learning_rate",
        "optimisation/shared_update_norm",
        "optimisation/client_disagreement",
    } <= set(events.Tags()["scalars"])
    assert {"samples", "reverse_process"} <= set(events.Tags()["images"])
    assert "config/text_summary" in events.Tags()["tensors"]


def test_ctrl_c_stops_with_code_130_says_how_to_go_on_and_that_works(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    arguments = [
        sys.executable,
        "-m",
        "srfed",
        "simulate",
        "--config",
        str(tiny_yaml),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    arguments += ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]
    code, message = stop_after_a_round(arguments, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in message
    assert f"python -m srfed.simulate --resume {tmp_path / 'run'}" in message
    run = RunFolder.open(tmp_path / "run")
    rounds = len([line for line in records(run) if line["kind"] == "round"]) + 1
    assert simulate.main(["--resume", str(run.path), "--set", f"federation.rounds={rounds}"]) == 0
    whole = run_in_process(
        begin(tmp_path / "whole", {"federation.rounds": rounds, "evaluation.every": 0})
    )
    assert all_bits(run) == all_bits(whole)
    assert [line.get("loss") for line in records(run)] == [
        line.get("loss") for line in records(whole)
    ]


def test_resuming_a_finished_run_changes_nothing(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(finished_run.path, tmp_path / "copy"))
    before = (copy / "metrics.jsonl").read_bytes()
    assert simulate.main(["--resume", str(copy)]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("module", ["simulate", "sample"])
def test_help_is_quick_to_read_and_complete(module: str) -> None:
    done = command(module, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    if module == "simulate":
        assert "federation.round_timeout = 3600.0" in done.stdout


# --- Sampling ------------------------------------------------------------------------------------

Sampled = tuple[bytes, np.ndarray, list[str]]


@pytest.fixture
def draw(finished_run: RunFolder, tmp_path: Path) -> Callable[..., Sampled]:
    """Sample with some arguments; the picture, the images and their tasks."""

    def call(*arguments: object) -> Sampled:
        out, numbers = tmp_path / "new" / "grid.png", tmp_path / "new" / "images.npz"
        steps = [] if "ancestral" in arguments else ["--steps", 5]
        given = [
            "--run",
            finished_run.path,
            *steps,
            "--device",
            "cpu",
            "--out",
            out,
            "--npz",
            numbers,
            *arguments,
        ]
        assert sample.main([str(argument) for argument in given]) == 0
        with np.load(numbers) as content:
            return out.read_bytes(), content["images"], content["tasks"].tolist()

    return call


def test_sampling_from_the_command_line(
    finished_run: RunFolder, tmp_path: Path, draw: Callable[..., Sampled]
) -> None:
    out, numbers = tmp_path / "grid.png", tmp_path / "images.npz"
    done = command(
        "sample",
        "--run",
        finished_run.path,
        "--task",
        1,
        "--n",
        9,
        "--steps",
        5,
        "--seed",
        0,
        "--out",
        out,
        "--npz",
        numbers,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(out) in done.stdout
    assert str(numbers) in done.stdout
    with np.load(numbers) as content:
        assert content["images"].shape == (9, 8, 8, 1)
        assert content["images"].dtype == np.uint8
        assert content["tasks"].tolist() == ["digit-1"] * 9
        here = draw("--task", 1, "--n", 9, "--seed", 0)
        assert here[0] == out.read_bytes()
        assert (here[1] == content["images"]).all()


def test_the_same_seed_gives_the_same_images_and_another_others(
    draw: Callable[..., Sampled],
) -> None:
    first, again, other = (
        draw("--task", "digit-1", "--n", 4, "--seed", seed) for seed in (0, 0, 1)
    )
    assert first[0] == again[0]
    assert (first[1] == again[1]).all()
    assert first[0] != other[0]
    assert (first[1] != other[1]).any()


def test_every_task_is_sampled_through_its_own_layers(draw: Callable[..., Sampled]) -> None:
    _, images, tasks = draw("--n", 3)
    assert tasks == [f"digit-{digit}" for digit in (0, 1, 2) for _ in range(3)]
    assert len({images[start : start + 3].tobytes() for start in (0, 3, 6)}) == 3
    for position in range(3):
        alone = draw("--n", 3, "--task", position)[1]
        assert (alone == images[3 * position : 3 * position + 3]).all()


def test_the_ancestral_sampler_can_be_asked_for(draw: Callable[..., Sampled]) -> None:
    ddim, ancestral = (
        draw("--task", 0, "--n", 2),
        draw("--task", 0, "--n", 2, "--sampler", "ancestral"),
    )
    assert (ddim[1] != ancestral[1]).any()


# --- What is wrong, in one line
# --------------------------------------------------------------------


def refusal(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: object
) -> str:
    """The one line on stderr of a command that exits with code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--set training.foo=1", "unknown key `training.foo`"),
        ("--set training.batch_size=many", "training.batch_size"),
        ("--set training.batch_size", "section.key=value"),
        ("--clients 0", "federation.clients = 0"),
        ("--clients 11 --set evaluation.samples_between=22", "1 to 10"),
        ("--clients three", "federation.clients"),
        ("--backend dask", "ray | inline"),
        ("--set diffusion.timesteps=0", "diffusion.timesteps = 0"),
        ("--set model.exclusive_stages=9", "exclusive_stages"),
        ("--set model.exclusive_stages=[nowhere.*]", "nowhere.*"),
        ("--set training.batch_size=1000", "batch_size"),
        ("--set evaluation.samples=3", "evaluation.samples 3"),
        ("--set sampling.steps=501", "sampling.steps 501 is above diffusion.timesteps 500"),
        ("--set data.dataset=mnist", "data.dir is not set"),
        ("--set data.dataset=mnist --data-dir /nowhere", "/nowhere does not exist"),
        ("--set data.dataset=imagenet", "imagenet"),
        ("--backend ray --set resources.cpus=1 --set resources.client_cpus=2", "client_cpus 2"),
        (
            "--set evaluation.feature_network=inception --set "
            "evaluation.inception_weights=/nowhere",
            "/nowhere",
        ),
        ("--config /nowhere.yaml", "cannot read /nowhere.yaml"),
        ("--resume /nowhere", "/nowhere is not the folder of a run"),
        ("--resume /nowhere --run-dir /elsewhere", "leave --run-dir out"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_before_anything_is_written(
    tiny_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    given = arguments.split()
    if "--config" not in given and "--resume" not in given:
        given += ["--config", str(tiny_yaml)]
    if "--resume" not in given:
        given += ["--run-dir", str(tmp_path / "run")]
    assert expected in refusal(capsys, simulate.main, *given)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder data set of three tasks of ten grey images each."""
    rng = np.random.default_rng(0)
    for task in ("one", "three", "two"):
        (tmp_path / "pictures" / task).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / task / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("spoil", ["unreadable", "wrong size", "text", "one task of another size"])
def test_images_that_do_not_do_are_named(
    tiny_yaml: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    spoilt = pictures / "two" / "3.png"
    if spoil == "unreadable":
        spoilt.write_bytes(spoilt.read_bytes()[:40])
    elif spoil == "text":
        spoilt.write_text("not a picture")
    else:
        for path in (pictures / "two").iterdir() if spoil.startswith("one") else [spoilt]:
            Image.new("L", (9, 8)).save(path)
    text = refusal(
        capsys,
        simulate.main,
        "--config",
        tiny_yaml,
        "--set",
        "data.dataset=folder",
        "--data-dir",
        pictures,
        "--set",
        "training.batch_size=4",
        "--run-dir",
        tmp_path / "run",
    )
    assert ("task two" in text) if spoil.startswith("one") else (str(spoilt) in text)
    assert not (tmp_path / "run").exists()


def test_a_broken_configuration_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("training: [1,")
    assert f"{broken} is not valid YAML" in refusal(capsys, simulate.main, "--config", broken)
    broken.write_text("just words")
    assert "must hold sections" in refusal(capsys, simulate.main, "--config", broken)


def test_a_folder_that_cannot_hold_a_new_run_is_refused_and_left_alone(
    tiny_yaml: Path, tmp_path: Path, finished_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    holds_a_run = all_bits(finished_run)
    for folder, expected in (
        (tmp_path / "file" / "run", "cannot write"),
        (tmp_path / "file", "is not an empty folder"),
        (tmp_path / "full", "is not an empty folder"),
        (finished_run.path, f"continue it with --resume {finished_run.path}"),
    ):
        text = refusal(capsys, simulate.main, "--config", tiny_yaml, "--run-dir", folder)
        assert str(folder) in text
        assert expected in text
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["notes"]
    assert all_bits(finished_run) == holds_a_run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--task digit-7",
            "--task 'digit-7' is not in this run; it has 0 (digit-0), 1 (digit-1), 2 (digit-2)",
        ),
        ("--task 3", "--task '3'"),
        ("--n 0", "--n 0 is impossible"),
        ("--n -1", "--n -1 is impossible"),
        ("--steps 501", "501 is above diffusion.timesteps 500"),
        ("--steps 0", "sampling.steps = 0"),
        ("--sampler magic", "ddim | ancestral"),
        ("--device abacus", "auto | cpu | cuda"),
        ("--run /nowhere", "/nowhere is not the folder of a run"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    finished_run: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    expected: str,
) -> None:
    given = [
        "--run",
        finished_run.path,
        "--device",
        "cpu",
        "--n",
        2,
        "--out",
        tmp_path / "x.png",
        *arguments.split(),
    ]
    assert expected in refusal(capsys, sample.main, *given)
    assert not (tmp_path / "x.png").exists()


def test_sampling_where_nothing_can_be_written_or_nothing_was_trained_is_one_line(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    common = ["--run", finished_run.path, "--n", 1, "--steps", 1, "--device", "cpu"]
    assert "cannot write" in refusal(
        capsys, sample.main, *common, "--out", tmp_path / "file" / "x.png"
    )
    fresh = begin(tmp_path / "fresh")
    assert "no checkpoint" in refusal(capsys, sample.main, "--run", fresh.path)
    copy = Path(shutil.copytree(finished_run.path, tmp_path / "copy"))
    state = copy / "server" / "round-00003" / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    assert "is damaged" in refusal(capsys, sample.main, "--run", copy)


def test_a_refusal_of_the_real_command_is_one_line_without_traceback(tmp_path: Path) -> None:
    done = command("simulate", "--clients", 11, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: federation.clients = 11 is impossible")


def test_a_full_disk_ends_the_run_in_one_line_and_more_room_lets_it_go_on(
    tiny_yaml: Path, tmp_path: Path, finished_run: RunFolder
) -> None:
    """The limit on a file's size stands for the disk: φ's checkpoint fits, the one with its moments
    does not.
    """
    arguments = ["--config", str(tiny_yaml), "--run-dir", str(tmp_path / "run")]
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    limit += "from srfed.simulate import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", limit, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"error: cannot write {tmp_path / 'run' / 'server'}"
    )
    assert simulate.main(["--resume", str(tmp_path / "run")]) == 0
    assert all_bits(RunFolder.open(tmp_path / "run")) == all_bits(finished_run)

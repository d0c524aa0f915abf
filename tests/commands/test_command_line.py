"""What all commands share: options, signals, closed pipes and streams, and no torch before the
options are sound.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator
from PIL import Image

from srfed import simulate
from srfed.commands import evaluate, partition, sample
from srfed.commands.options import Parser, training_parser
from srfed.commands.table import COMMANDS
from srfed.commands.train import CENTRALISE, SIMULATE
from srfed.config import ResourcesConfig, RunConfig, load_config
from srfed.config.presets import preset_file, preset_names
from srfed.cores import check_resources, quota_of_group, usable_cores
from srfed.errors import UserError
from srfed.runs.requested import requested_config
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.tiny_run import records

ROOT = Path(__file__).parents[2]
Completed = subprocess.CompletedProcess[str]
PROGRAMS = {"simulate": SIMULATE, "centralise": CENTRALISE}
ENDLESS = ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]


def shell(line: str, **variables: str) -> Completed:
    """A line of bash in which $PYTHON is this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        errors="surrogateescape",
    )


def pictures(folder: Path, *tasks: str, count: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(
                folder / task / f"{number}.png"
            )
    return folder


def refusal(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: object
) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --- No torch -------------------------------------------------------------------------------------

WRONG_SETTING = ["--set", "training.batch_size=0100"]
EARLY: dict[str, list[list[str]]] = {
    "train": [
        WRONG_SETTING,
        ["--data", "/nowhere"],
        ["--resume", "/nowhere"],
        ["--resume", "/nowhere", "--quick"],
        ["--from", "/nowhere"],
        ["--seeds", "0,x"],
        ["--sweep", "training.local_step=1,2"],
        ["--resume", "/nowhere", "--seeds", "0,1"],
    ],
    "simulate": [
        WRONG_SETTING,
        ["--data-dir", "/nowhere"],
        ["--resume", "/nowhere"],
        ["--clients", "11"],
    ],
    "centralise": [WRONG_SETTING, ["--set", "training.method=federated"], ["--resume", "/nowhere"]],
    "sample": [
        ["--run", "/nowhere"],
        ["--run", "x", "--n", "0"],
        ["--run", "x", "--device", "abacus"],
    ],
    "evaluate": [["--run", "/nowhere"], ["--run", "x", "--quantile", "1"]],
    "adapt": [
        ["--run", "/nowhere", "--task", "digit-0"],
        ["--run", "x", "--task", "y", "--steps", "0"],
    ],
    "partition": [WRONG_SETTING, ["--image-channels", "0"], ["--data-dir", "/nowhere"]],
    "schema": [["--flower", "/nowhere/pyproject.toml"], ["x"]],
    "completion": [["fish"], ["bash", "zsh"]],
    "runs": [["/nowhere"], ["x", "y"]],
    "watch": [["/nowhere"], ["x", "--every", "0"], ["x", "--port", "-1"]],
    "compare": [["/nowhere", "x"], ["x"]],
    "report": [["/nowhere"], ["x", "y"]],
    "export": [["/nowhere", "--out", "x"], ["x"], ["--out", "x"], ["x", "--store", "y"]],
    "share": [["/nowhere", "x"], ["x"]],
    "deploy": [
        ["check", "--data", "x", "--state-dir", "y", *WRONG_SETTING],
        ["agree", "--data", "x", "--state-dir", "y", "--client-id", "z", *WRONG_SETTING],
        ["agree", "--data", "x", "--state-dir", "y", "--client-id", "z", "--least-mean", "0"],
        ["agree", "--help"],
        ["rehearse", *WRONG_SETTING],
        ["certificates", "--out", "x"],
        ["check", "--help"],
        ["rehearse", "--help"],
        ["certificates", "--help"],
        ["rehearse", "--no-such-option"],
    ],
}


def test_every_command_is_in_the_table() -> None:
    assert set(COMMANDS) == set(EARLY)
    for where, _ in COMMANDS.values():
        module, function = where.split(":")
        assert callable(getattr(import_module(module), function))


def test_srfed_is_on_the_path_and_knows_its_commands() -> None:
    """As installed: the script that pip has made of the project's own entry."""
    program = Path(sys.executable).with_name("srfed")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(re.search(rf"^ +{name}\s+\w", done.stdout, re.MULTILINE) for name in COMMANDS)
    none = subprocess.run([program, "trian"], capture_output=True, text=True, timeout=60)
    assert none.returncode == 2
    assert "'trian'" in none.stderr
    assert "simulate" in none.stderr
    nothing = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert nothing.returncode == 2


CALLS = {
    module: [["--help"], ["--no-such-option"], *arguments] for module, arguments in EARLY.items()
}


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """All these calls, in one process that must never load torch."""
    program = """
import json, sys
from srfed.__main__ import main
for module, calls in json.loads(sys.argv[1]).items():
    for arguments in calls:
        try:
            status = main([module, *arguments])
        except SystemExit as end:
            status = end.code
        print("status of", module, status, "torch" in sys.modules)
"""
    folder = tmp_path_factory.mktemp("called")
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(CALLS)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not any(folder.iterdir())
    return done


@pytest.mark.parametrize("module", EARLY)
def test_help_and_what_is_wrong_with_options_and_settings_load_no_torch(
    called: "subprocess.CompletedProcess[str]", module: str
) -> None:
    begins = f"status of {module} "
    said = [line for line in called.stdout.splitlines() if line.startswith(begins)]
    expected = [f"{begins}{0 if '--help' in call else 2} False" for call in CALLS[module]]
    assert said == expected, called.stderr
    assert "Traceback" not in called.stderr


# --- Options --------------------------------------------------------------------------------------


def test_there_is_one_parser() -> None:
    """So whatever the parser decides holds for every command, sub-command, study and benchmark."""
    files = [
        path
        for folder in ("srfed", "simulations", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    others = [
        path
        for path in files
        if "ArgumentParser(" in path.read_text() and path.name != "options.py"
    ]
    assert len(files) > 100
    assert others == []


@pytest.mark.parametrize(
    ("module", "arguments", "unknown"),
    [
        ("srfed.simulate", ["--data", "folder"], "--data folder"),
        ("srfed", ["partition", "--image", "3"], "--image 3"),
        ("srfed.deploy", ["rehearse", "--client", "3"], "--client 3"),
        ("benchmarks.default_run", ["--arg"], "--arg"),
    ],
)
def test_an_abbreviated_option_is_none(module: str, arguments: list[str], unknown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert f"unrecognized arguments: {unknown}" in done.stderr


def test_a_path_knows_home_folders_and_says_what_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    parser = Parser(prog="x")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out", "~/grid.png"]).out == tmp_path / "grid.png"
    for wrong, said in (
        ("~nobody-here/x", "~nobody-here is nobody's home folder"),
        ("/x\udcff", "is not UTF-8"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--out", wrong])
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_data_dir_in_the_home_folder_is_found_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "photos", "east", "west")
    config = requested_config(
        None, ["evaluation.inception_weights=~/weights.pth"], {"data.dir": '"~/photos"'}
    )
    assert config.data.dir == str(tmp_path / "photos")
    assert config.evaluation.inception_weights == str(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="~nobody-here is nobody's home folder"):
        requested_config(None, [], {"data.dir": '"~nobody-here/photos"'})


def test_a_preset_is_a_file_that_comes_with_srfed(tmp_path: Path) -> None:
    parser = training_parser("x", "x")
    assert preset_names() == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
    for name in ("digits", "mnist_paper", "mnist-paper"):
        file = parser.parse_args(["--preset", name]).config
        assert load_config(file).name == name.replace("-", "_")
    assert load_config(preset_file("digits")) == RunConfig()
    done = run_here("partition", "--preset", "mnits", folder=tmp_path)
    assert done.returncode == 2
    assert "there is no preset mnits, did you mean mnist?; allowed: cifar10" in done.stderr
    done = run_here("simulate", "--preset", "mnist", "--config", "x.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "not allowed with argument" in done.stderr


def test_one_set_takes_several_settings() -> None:
    parser = training_parser("x", "x")
    several = ["seed=1", "model.owned=[vector, film]"]
    options = parser.parse_args(["--set", *several, "--set", "name=a"])
    assert options.overrides == [*several, "name=a"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "there is no command 'trian', did you mean train?; allowed: train, simulate"),
        (["simulate", "--data", "x"], "unrecognized arguments: --data x, did you mean --data-dir?"),
        (["deploy", "rehearse", "--client=3"], "--client=3, did you mean --clients?"),
        (["train", "--drie-run"], "did you mean --dry-run?"),
        (["simulate", "--set", "training.batchsize=3"], "did you mean training.batch_size?"),
        (["simulate", "--set", "training.rounds=3"], "did you mean federation.rounds?"),
        (["simulate", "--set", "batch_size=3"], "`batch_size`, did you mean training.batch_size?"),
        (["simulate", "--set", "trainning.batch_size=3"], "did you mean training?"),
        (["simulate", "--set", "trainning={}"], "`trainning`, did you mean training?"),
    ],
)
def test_what_was_meant_is_guessed(arguments: list[str], said: str) -> None:
    done = run_here(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_printed_configuration_is_the_runs_and_can_be_read_again(tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos", "a", "b")
    given = ["--set", "training.batch_size=4", "seed=3", "--print-config"]
    done = run_here("simulate", "--data-dir", photos, *given, folder=tmp_path)
    assert "taken as data.dataset = folder" in done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "again.yaml")
    assert (config.seed, config.federation.clients, config.data.dir) == (3, 2, str(photos))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["again.yaml", "photos"]
    done = run_here("train", "--data", photos, "--print-config", folder=tmp_path)
    assert "time: " in done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "again.yaml").federation.result == "best"


def test_every_setting_is_an_option_too(tmp_path: Path) -> None:
    words = ["--training.batch_size", "4", "--sampling.eta=0.5", "--set", "seed=3"]
    words += ["--evaluation.ssim_curve", "[10, 20]", "--model.exclusive_stages", "io"]
    done = run_here("simulate", *words, "--print-config", folder=tmp_path)
    (tmp_path / "asked.yaml").write_text(done.stdout)
    config = load_config(tmp_path / "asked.yaml")
    assert (config.training.batch_size, config.sampling.eta, config.seed) == (4, 0.5, 3)
    assert (config.evaluation.ssim_curve, config.model.exclusive_stages) == ((10, 20), "io")
    wrong = run_here("partition", "--training.batchsize", "4", folder=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean training.batch_size?" in wrong.stderr
    for rest in ([], ["--print-config"]):
        missing = run_here("simulate", "--training.batch_size", *rest, folder=tmp_path)
        assert missing.returncode == 2
        assert "--training.batch_size: expected a value" in missing.stderr


def test_the_schema_takes_what_the_configuration_takes() -> None:
    schema = json.loads(run_here("schema").stdout)
    check = Draft202012Validator(schema)
    files = [(ROOT / "configs" / f"{name}.yaml").read_text() for name in preset_names()]
    own = "model: {network: 'a:B', options: {depth: 2, kinds: [x, y]}}"
    for text in (*files, own, "{}", "seed: 3"):
        assert check.is_valid(yaml.safe_load(text)), text
    for wrong in (
        "training: {batch_size: many}",
        "training: {batchsize: 3}",
        "model: {channels: [8, 16]}",
        "data: {dataset: minst}",
        "seed: -1",
    ):
        assert not check.is_valid(yaml.safe_load(wrong)), wrong
    described = [
        field for section in schema["$defs"].values() for field in section["properties"].values()
    ]
    assert all(field["description"] for field in described)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ce"], ["centralise"]),
        (["train", "--dry"], ["--dry-run"]),
        (["simulate", "--preset", "few"], ["few_images"]),
        (["simulate", "--set", "seed=1", "training.batch"], ["training.batch_size="]),
        (["deploy", "reh"], ["rehearse"]),
        (["sample", "--gui"], ["--guidance"]),
    ],
)
def test_the_shell_completes(words: list[str], completed: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(run_here("completion").stdout)
    line = shlex.join(["srfed", *words])
    done = shell(
        f"source {tmp_path}/script; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _srfed; "
        'echo "${COMPREPLY[@]}"'
    )
    assert done.stdout.split() == completed, done.stderr


def test_zsh_learns_first_to_complete_as_bash_does() -> None:
    first, _, script = run_here("completion", "zsh").stdout.partition("\n")
    assert "bashcompinit" in first
    assert script == run_here("completion", "bash").stdout == run_here("completion").stdout


# --- The data say what they are -------------------------------------------------------------------


def npz(path: Path) -> Path:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 4
    np.savez(
        path, train_images=images, train_labels=labels, label_names=np.array(["n", "e", "s", "w"])
    )
    return path


def test_own_data_are_recognised_and_give_the_run_its_tasks_and_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = pictures(tmp_path / "My photos", *"abcdefghijklm"), npz(tmp_path / "winds.npz")
    for where, dataset, clients, name in (
        (folder, "folder", 13, "my-photos"),
        (file, "npz", 4, "winds"),
    ):
        config = requested_config(None, [], {"data.dir": json.dumps(str(where))})
        assert (config.data.dataset, config.federation.clients, config.name) == (
            dataset,
            clients,
            name,
        )
        said = capsys.readouterr().out
        assert f"{where} is taken as data.dataset = {dataset}" in said
        assert f"all {clients} of {where}" in said
    # What is named stays.
    named = ["data.dataset=folder", "federation.clients=2", "name=x"]
    config = requested_config(None, named, {"data.dir": json.dumps(str(folder))})
    assert (config.federation.clients, config.name) == (2, "x")
    assert capsys.readouterr().out == ""
    assert requested_config(None, ["data.dataset=mnist"], {}).name == "mnist"
    assert requested_config(None, [], {}) == RunConfig()


def test_a_run_of_own_data_has_all_tasks_and_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", "east", "west")
    settings = {
        "model": "{channels: [8, 16, 16, 16], groups: 4}",
        "training": "{batch_size: 4, local_steps: 1}",
        "federation.rounds": "1",
        "sampling.steps": "1",
        "evaluation": "{samples: 4, samples_between: 4, ssim_images: 0}",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert simulate.main(["--data-dir", "photos", "--backend", "inline", *given]) == 0
    (folder,) = (tmp_path / "runs").glob("photos-*")
    run = RunFolder.open(folder)
    assert run.config.data.dir == str(tmp_path / "photos")
    assert [line["accepted"] for line in records(run) if line["kind"] == "round"] == [
        ["east", "west"]
    ]


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        (["MNIST/raw"], "holds mnist; say which is meant, for example --preset mnist"),
        (["MNIST/raw", "cifar-100-python"], "holds mnist and cifar100; say which"),
        (["FashionMNIST/raw"], "holds fashion_mnist"),
        (["cifar-10-batches-py"], "holds cifar10"),
        ([], "has no task folders"),
        (None, "does not exist"),
    ],
)
def test_what_is_not_clear_is_asked_for(
    tmp_path: Path, inside: list[str] | None, said: str
) -> None:
    root = tmp_path / "root"
    for name in [] if inside is None else [".", *inside]:
        (root / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=said):
        requested_config(None, [], {"data.dir": json.dumps(str(root))})


def test_files_in_the_wrong_place_are_told_apart(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            requested_config(None, [], {"data.dir": json.dumps(str(path))})
        return str(caught.value)

    (tmp_path / "npz").mkdir()
    assert f"name the file in it, such as {npz(tmp_path / 'npz' / 'x.npz')}" in said(
        tmp_path / "npz"
    )
    assert "put each task's pictures into a folder of its own" in said(
        pictures(tmp_path / "flat", "one") / "one"
    )
    (tmp_path / "notes.txt").write_text("")
    assert "is no data set" in said(tmp_path / "notes.txt")


def test_what_would_be_ignored_is_refused(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "photos", "a", "b")
    digits = [ROOT / "configs" / "digits.yaml", "--data-dir", folder]
    assert "data.dataset = digits takes nothing from there" in refusal(
        capsys, simulate.main, "--config", *digits
    )
    said = refusal(
        capsys, simulate.main, "--set", "data.dataset=digits", "--set", f"data.dir={folder}"
    )
    assert "would be ignored" in said
    said = refusal(capsys, simulate.main, "--clients", 3, "--set", "federation.clients=4")
    assert "federation.clients is set twice" in said
    said = refusal(capsys, partition.main, "--image-channels", 1, "--data-dir", folder)
    assert "--data-dir would be ignored" in said
    run = ["--run", finished_run.path, "--sampler", "ancestral"]
    for main in (sample.main, evaluate.main):
        assert "--steps 5 would be ignored" in refusal(capsys, main, *run, "--steps", 5)
        assert "--eta 0.5 would be ignored" in refusal(capsys, main, *run, "--eta", 0.5)
    said = refusal(
        capsys, evaluate.main, "--run", finished_run.path, "--inception-weights", tmp_path / "x"
    )
    assert "the feature network is embedded" in said


# --- Signals --------------------------------------------------------------------------------------


def started(*command: object, **settings: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )  # type: ignore[call-overload]


def wait_for_line(process: "subprocess.Popen[str]", start: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(start) for line in process.stdout)


@pytest.mark.parametrize(
    ("module", "more", "number"),
    [
        ("simulate", [], signal.SIGTERM),
        ("simulate", [], signal.SIGHUP),
        ("centralise", ["--set", "training.method=one_task"], signal.SIGTERM),
    ],
)
def test_a_signal_stops_a_run_with_its_status_and_the_way_to_go_on(
    tiny_yaml: Path, tmp_path: Path, module: str, more: list[str], number: signal.Signals
) -> None:
    path = tmp_path / "a run"
    with started(
        "-m", "srfed", module, "--config", tiny_yaml, "--run-dir", path, *ENDLESS, *more
    ) as process:
        wait_for_line(process, "round")
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == f"stopped; go on with: {PROGRAMS[module]} --resume '{path}'"
    assert "Traceback" not in said


WAITING = (
    "import time; from srfed.interrupts import run_command; raise SystemExit(run_command(lambda: "
    "({})))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_other_command_with_its_status_and_a_word(number: signal.Signals) -> None:
    # A signal that comes just before a sleep does not cut it short: many short ones.
    sleeping = "print('ready', flush=True), [time.sleep(0.1) for _ in range(1000)]"
    with started("-c", WAITING.format(sleeping)) as process:
        wait_for_line(process, "ready")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "interrupted\n")


def test_nohup_holds() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    program = WAITING.format("print('ready', flush=True), input(), print('done')")
    with started("-c", program, preexec_fn=ignore, stdin=subprocess.PIPE) as process:
        wait_for_line(process, "ready")
        process.send_signal(signal.SIGHUP)
        said, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, said) == (0, "done\n")


# --- Pipes and streams ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "method"), [("simulate", "federated"), ("centralise", "one_task")]
)
def test_a_run_whose_output_nobody_reads_ends_and_says_so(
    tiny_yaml: Path, tmp_path: Path, module: str, method: str
) -> None:
    more = [*ENDLESS, "--set", f"training.method={method}"]
    with started(
        "-m", "srfed", module, "--config", tiny_yaml, "--run-dir", tmp_path / "run", *more
    ) as process:
        wait_for_line(process, "round")
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGPIPE
    assert said == f"stopped; go on with: {PROGRAMS[module]} --resume {tmp_path / 'run'}\n"


PRINTS = """'from srfed.interrupts import run_command
raise SystemExit(run_command(lambda: print("φ " * 9999)))'"""
FAILS = """'from srfed.interrupts import run_command; from srfed.config import load_config
raise SystemExit(run_command(lambda: load_config(None, ["a=1"])))'"""


@pytest.mark.parametrize(
    "arguments", [["-c", PRINTS.strip("'")], ["-m", "srfed", "simulate", "--help"]]
)
@pytest.mark.parametrize("both", [False, True])
def test_a_command_whose_output_nobody_reads_ends_as_others_do(
    arguments: list[str], both: bool
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stderr = writer if both else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, *arguments], stdout=writer, stderr=stderr, text=True, timeout=60
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert (done.stderr or "").strip() in ("", "interrupted: nobody reads the output")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        # there is no standard error, or it is full
        ("$PYTHON -m srfed partition --no-such-option 2>&-", 2),
        ("$PYTHON -m srfed partition --no-such-option 2>/dev/full", 2),
        (f"$PYTHON -c {FAILS} 2>&-", 2),
        (f"$PYTHON -c {FAILS} 2>/dev/full", 2),
        (f"$PYTHON -c {PRINTS} 2>&-", 0),
        # nor standard output
        (f"$PYTHON -c {PRINTS} >&-", 0),
        (f"$PYTHON -c {PRINTS} <&- >&- 2>&-", 0),
        (f"$PYTHON -c {PRINTS} >/dev/full", 2),
        ("$PYTHON -m srfed.simulate --help >&-", 0),
    ],
)
def test_closed_and_full_streams_end_in_the_right_status_without_a_traceback(
    line: str, status: int
) -> None:
    done = shell(line)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_run_without_any_stream_is_whole(
    tiny_yaml: Path, tmp_path: Path, finished_run: RunFolder
) -> None:
    run = tmp_path / "run"
    assert (
        shell(
            f"$PYTHON -m srfed.simulate --config {tiny_yaml} --run-dir {run} <&- >&- 2>&-"
        ).returncode
        == 0
    )
    assert records(RunFolder.open(run)) == records(finished_run)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_gets_escapes(encoding: str) -> None:
    done = shell(f"$PYTHON -c {PRINTS}", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u03c6 ")
    done = shell("$PYTHON -m srfed.simulate --help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert r"\u2265" in done.stdout


# --- Ray ------------------------------------------------------------------------------------------


def test_a_ray_that_cannot_start_is_one_sentence_at_once(tiny_yaml: Path, tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 25)
    temporary.mkdir()
    done = shell(
        f"$PYTHON -m srfed.simulate --config {tiny_yaml} --backend ray --run-dir "
        f"{tmp_path / 'run'}",
        TMPDIR=str(temporary),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Ray cannot start: ")
    assert "name a shorter folder in TMPDIR" in line
    assert "--backend inline" in line
    assert "waiting" not in done.stdout


# --- Cores ----------------------------------------------------------------------------------------


def files(root: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_cores_follow_the_quota_of_the_control_group_and_of_those_above(tmp_path: Path) -> None:
    assert quota_of_group(tmp_path) is None
    two = files(
        tmp_path / "v2",
        proc__self__cgroup="0::/jobs/mine\n",
        sys__fs__cgroup__jobs__cpu_DOT_max="150000 100000\n",
        sys__fs__cgroup__jobs__mine__cpu_DOT_max="max 100000\n",
    )
    assert quota_of_group(two) == 1.5
    inside = files(
        tmp_path / "own",
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__cpu_DOT_max="400000 100000\n",
    )
    assert quota_of_group(inside) == 4
    folder = tmp_path / "v1" / "sys/fs/cgroup/cpu,cpuacct"
    for group, quota in (("", -1), ("docker/1", 250_000)):
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / group / "cpu.cfs_period_us").write_text("100000\n")
    one = files(
        tmp_path / "v1", proc__self__cgroup="4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n"
    )
    assert quota_of_group(one) == 2.5


def test_cores_follow_the_affinity() -> None:
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from srfed.cores import usable_cores
print(usable_cores())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "1\n", done.stderr
    more = usable_cores() + 1
    with pytest.raises(UserError, match=f"client_cpus = {more} is above the {more - 1} cores"):
        check_resources(ResourcesConfig(client_cpus=more))


def test_nobody_else_counts_cores() -> None:
    files = [
        path
        for folder in ("srfed", "simulations", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert [path.name for path in files if "cpu_count" in path.read_text()] == ["cores.py"]


def test_without_a_home_folder_a_run_is_refused_in_a_sentence_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry in the list of users."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "FLWR_HOME"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["simulate", "--run-dir", tmp_path / "run", "--backend", "ray"]
    done = run_here(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: no home folder is known: .*set HOME, or FLWR_HOME.*\n", done.stderr
    )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    check_resources(ResourcesConfig(backend="ray"))

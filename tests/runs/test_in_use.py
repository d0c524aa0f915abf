"""What another process uses is left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import srfed
from srfed.commands import adapt
from srfed.files import held, list_folder
from srfed.storage.run_folder import RunFolder
from support.errors import one_error_line
from support.membership import failure, start
from support.tiny_run import round_lines

PACKAGE = str(Path(srfed.__file__).parent.parent)


def test_a_run_in_use_keeps_its_configuration(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True)"
    )
    command = [sys.executable, "-c", f"{holder}; sys.stdin.read()", str(copy / "lock")]
    (copy / "images.json").write_text('{"format": 1, "records": {}}')
    before = [(copy / name).read_bytes() for name in ("config.yaml", "images.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        options = ["--allow-changed-images", "--set", "federation.rounds=5"]
        text = one_error_line(capsys, ["--resume", str(copy), *options])
        process.communicate()
    assert text.startswith(f"error: {copy} is in use by another process")
    assert [(copy / name).read_bytes() for name in ("config.yaml", "images.json")] == before


def test_an_adaptation_in_use_is_left_alone(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "out" / "lock", wait=False):
        assert (
            adapt.main(
                [
                    "--run",
                    str(finished_run.path),
                    "--task",
                    "digit-5",
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
    assert f"{tmp_path / 'out'} is in use by another process" in capsys.readouterr().err
    assert list_folder(tmp_path / "out") == ["lock"]


CREATOR = """
import sys, time
from pathlib import Path
from srfed.errors import UserError
from srfed.config import load_config
from srfed.storage.run_folder import RunFolder
folder, name = Path(sys.argv[1]), sys.argv[2]
path = Path(sys.argv[3]) if len(sys.argv) > 3 else None
config = load_config()
(folder / f"{name}.ready").touch()
while len(list(folder.glob("*.ready"))) < 4:
    time.sleep(0.0001)
try:
    print(RunFolder.create(path, config).path)
except UserError as error:
    print(f"refused: {error}")
"""


@pytest.mark.parametrize("named", [True, False])
def test_of_processes_that_begin_a_run_at_once_each_has_its_own_or_is_refused(
    tmp_path: Path, named: bool
) -> None:
    options = [str(tmp_path / "run")] if named else []
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATOR, str(tmp_path), str(number), *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )
        for number in range(4)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    won = [text for text in said if not text.startswith("refused")]
    assert len(won) == len(set(won)) == (1 if named else 4)
    for text in set(said) - set(won):
        # By the moment at which it looked: before, while or after the winner wrote.
        assert any(
            words in text
            for words in ("is in use by another process", "is not an empty folder", "holds a run")
        )
    assert len({RunFolder.open(Path(path)).lineage for path in won}) == len(won)


def test_a_run_in_use_is_left_alone_until_its_process_ends(tiny_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "srfed",
        "simulate",
        "--config",
        str(tiny_yaml),
        "--run-dir",
        str(path),
    ]
    command += ["--set", "federation.rounds=9999", "--set", "evaluation.every=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("round") for line in process.stdout)
            text = failure(lambda: start(RunFolder.open(path)))
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
    assert text == f"{path} is in use by another process"
    run = RunFolder.open(path)
    done = len(round_lines(run))
    config = run.config
    last = config.model_copy(
        update={"federation": config.federation.model_copy(update={"rounds": done + 1})}
    )
    start(run.reconfigure(last))
    assert [line["round"] for line in round_lines(run)] == list(range(1, done + 2))

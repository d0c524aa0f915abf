"""``deploy status``: a run as the coordinator sees it, from its folder and its SuperLink."""

import json
import os
import shutil
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from srfed import deploy
from srfed.deployment.certificates import make_certificates
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import CONNECTION
from srfed.storage.run_folder import RunFolder
from support.deployed import answering, at, wait_until, write_config


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert deploy.main(["status", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_status_of_a_run_in_its_folder(
    finished_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run.path, path)
    text = told(capsys, "--run-dir", path)
    assert "round:      3 of 3, " in text
    assert "evaluation: after round 3, fd_embedded " in text
    assert "  digit-2  last answer in round 3\n" in text
    assert text.endswith(f"so:         it is finished; its table is in {path / 'summary.txt'}\n")

    # As if it had been stopped after round 2, in which a site was away for a reason of its own
    # making.
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [
        line
        for line in lines
        if line["kind"] == "tasks" or (line["round"] <= 2 and line["kind"] == "round")
    ]
    kept[-1]["accepted"].remove("digit-1")
    kept[-1]["missing"] = {"digit-1": "gone\x1b[2J"}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = told(capsys, "--run-dir", path)
    assert "round:      2 of 3, " in text
    assert "  digit-1  last answer in round 1; missing in round 2: gone [2J\n" in text
    assert "nobody is at work on it; go on with: flwr run" in text
    with RunFolder.open(path).in_use():
        assert "a ServerApp is at work on it" in told(capsys, "--run-dir", path)
    with RunFolder.open(path).in_use():
        pass  # looking holds nothing


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "cannot read"),
        ("superlink = 3 = 4", "is damaged"),
        ('[superlink.other]\naddress = "127.0.0.1:9"', "no SuperLink 'hospital'; there are: other"),
    ],
)
def test_a_connection_that_is_not_there_takes_one_line(
    config: str | None,
    words: str,
    finished_run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    if config is not None:
        (tmp_path / "config.toml").write_text(config)
    assert (
        deploy.main(["status", "--run-dir", str(finished_run.path), "--connection", "hospital"])
        == 2
    )
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_expired_certificate_is_named(
    finished_run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with at(datetime.now(UTC) - timedelta(days=400)):
        make_certificates(tmp_path, ["localhost"])
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with answering(tmp_path) as address:
        connection = (
            f'[superlink.hospital]\naddress = "{address}"\nroot-certificates = '
            f'"{tmp_path / "ca.crt"}"\n'
        )
        (tmp_path / "config.toml").write_text(connection)
        assert (
            deploy.main(["status", "--run-dir", str(finished_run.path), "--connection", "hospital"])
            == 2
        )
    assert (
        f"the certificate of the SuperLink at {address} has expired on" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_serverapp_that_was_killed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml", {})
    with Deployment(tmp_path / "d") as deployment:
        deployment.start_superlink()
        monkeypatch.setenv("FLWR_HOME", str(tmp_path / "d" / "flower"))
        run = deployment.run(tmp_path / "run", config)
        where = ("--run-dir", tmp_path / "run", "--connection", CONNECTION)
        wait_until((tmp_path / "run" / "run.json").exists, lambda: "\n".join(run.lines()))
        wait_until(
            lambda: "at work on it" in told(capsys, "--run-dir", tmp_path / "run"),
            lambda: "nobody is at work",
        )
        text = told(capsys, *where)
        assert (
            f"SuperLink:  {deployment.superlink_address}; 0 of 0 registered SuperNodes are online"
            in text
        )
        assert f"  {run.run_id}  running, since " in text
        assert "none has taken part yet" in text
        assert text.endswith("so:         a ServerApp is at work on it\n")
        for pid in deployment.pids("serverapp"):
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: "nobody is at work" in told(capsys, "--run-dir", tmp_path / "run"),
            lambda: "it lives",
        )
        assert "its ServerApp has ended without a word (killed, or out of memory)" in told(
            capsys, *where
        )
        deployment.stop_superlink()
        assert deploy.main(["status", *map(str, where)]) == 2
        assert "cannot be reached: [Errno 111] Connection refused" in capsys.readouterr().err

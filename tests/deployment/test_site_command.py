"""What a site runs: real SuperNodes under ``deploy site``, refused, ended, deaf, and with a wrong
clock.
"""

import os
import re
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import srfed
from srfed.config import load_config
from srfed.data import load_tasks
from srfed.deployment.agree import agree_as_rehearsed
from srfed.deployment.certificates import make_certificates
from srfed.deployment.connection import check_superlink
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import CONNECTION, marked
from srfed.deployment.site_command import (
    LOST_SECONDS,
    STOPPED_SECONDS,
    _Listener,
    check_before_start,
)
from srfed.errors import UserError
from srfed.storage.metrics_log import MetricsLog
from support.deployed import (
    WAIT_SECONDS,
    answering,
    assert_succeeded,
    at,
    free_ports,
    site_data,
    wait_until,
    write_config,
)
from support.tiny_run import tiny_config


class SiteProcess:
    """``python -m srfed.deploy site`` in a process of its own, its words in a file."""

    def __init__(
        self, folder: Path, superlink: str, authority: Path, key: Path, data: Path, client: str
    ) -> None:
        self.state = folder / "state"
        self.folder = self.state / client
        self._said = folder / f"{client}.said"
        options = {
            "--superlink": superlink,
            "--root-certificates": authority / "ca.crt",
            "--key": key,
            "--client-id": client,
            "--data": data,
            "--state-dir": self.state,
            "--port": free_ports(1)[0],
        }
        self.command = [sys.executable, "-m", "srfed", "deploy", "site"]
        self.command += [str(word) for option in options.items() for word in option]
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(srfed.__file__).parent.parent),
            "OMP_NUM_THREADS": "1",
        }
        with self._said.open("ab") as said:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=said, stderr=said, umask=0o022
            )

    def __enter__(self) -> "SiteProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for process in marked(self.folder):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def wait_for(self, words: str, times: int = 1) -> None:
        wait_until(lambda: self.said.count(words) >= times, lambda: self.said)

    def trains(self) -> bool:
        """Whether its one ClientApp is at work, and would end in order if asked: that which forks,
        and two forks for the message, the last of which takes SIGTERM.
        """
        forks = self.pids("srfed.federation.flower.warm")
        if len(self.pids("flwr-clientapp")) != 1 or len(forks) != 3:
            return False
        with suppress(OSError):
            status = Path(f"/proc/{max(forks)}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            return bool(caught >> (signal.SIGTERM - 1) & 1)
        return False

    def pids(self, program: str) -> list[int]:
        return [process.pid for process in marked(self.folder) if process.program == program]


@pytest.mark.slow
def test_a_site_takes_part_is_mended_and_ends_without_a_trace(tmp_path: Path) -> None:
    """Refused until its key is registered; its ClientApp ended in training; restarted; ended."""
    config = write_config(
        tmp_path / "tiny.yaml",
        {
            "federation.clients": 1,
            "federation.on_missing": "wait",
            "federation.rounds": 1,
            "training.local_steps": 200,
        },
    )
    (task,) = load_tasks(tiny_config().data, 1)
    with Deployment(tmp_path / "d") as deployment:
        deployment.start_superlink()
        authority = deployment.certificates
        make_certificates(authority, [], ["a"])
        key = authority / "site-a.key"
        data = site_data(tmp_path, task)
        agree_as_rehearsed(
            load_config(config), data, tmp_path / "state", task.name, authority / "ca.crt"
        )
        with SiteProcess(
            tmp_path, deployment.superlink_address, authority, key, data, task.name
        ) as site:
            site.wait_for("either site-a.pub is not registered there")
            deployment.flwr("supernode", "register", str(authority / "site-a.pub"), CONNECTION)
            site.wait_for("site: connected to the SuperLink")
            assert site.said.count("is not registered") == 1, (
                "said once, however often it is refused"
            )

            run = deployment.run(tmp_path / "run", config)
            log = site.folder / "supernode.log"
            wait_until(lambda: log.read_text().count("Start `flwr-clientapp`") == 2, log.read_text)
            wait_until(site.trains, log.read_text)
            os.kill(site.pids("flwr-clientapp")[0], signal.SIGTERM)
            site.wait_for("the ClientApp was ended before it answered")
            site.wait_for("site: connected to the SuperLink", times=2)
            assert_succeeded(run)
            assert len(MetricsLog(tmp_path / "run" / "metrics.jsonl").rounds()) == 1

            for path in (site.state, *site.state.rglob("*")):
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, (
                    f"{path} can be read by others"
                )
            environments = [
                Path(f"/proc/{process.pid}/environ").read_text() for process in marked(site.folder)
            ]
            assert len(environments) >= 2, "SuperNode and SuperExec"
            assert all("FLWR_TELEMETRY_ENABLED=0\0" in environment for environment in environments)

            # A second one is refused, and does not disturb the first.
            second = subprocess.run(
                site.command, capture_output=True, text=True, env={**os.environ}
            )
            assert (second.returncode, second.stderr.count("\n")) == (2, 1)
            assert "in use by another process" in second.stderr
            assert site.process.poll() is None

            # Killed, it leaves a SuperNode; its successor ends that one and takes its place.
            (orphan,) = site.pids("flower-supernode")
            site.process.kill()
            site.process.wait()
            assert site.pids("flower-supernode") == [orphan]
            site.start()
            wait_until(lambda: orphan not in site.pids("flower-supernode"), lambda: site.said)
            wait_until(lambda: site.pids("flower-supernode"), lambda: site.said)
            site.process.send_signal(signal.SIGTERM)
            assert site.process.wait(WAIT_SECONDS) == 0
            assert site.said.endswith("site: stopped\n")
            assert marked(site.folder) == []


def test_a_supernode_is_deaf_when_nobody_works_at_its_message() -> None:
    heard = _Listener()
    heard.hear("INFO : Received successfully", 0.0)
    assert not heard.is_deaf(1000.0, works=True)
    assert not heard.is_deaf(1000.0 + LOST_SECONDS, works=False), "Flower gives it up by itself"
    assert heard.is_deaf(1001.0 + LOST_SECONDS, works=False)
    heard.hear("INFO : Task stopped.", 1000.0)
    assert heard.is_deaf(1001.0 + STOPPED_SECONDS, works=False)
    heard.hear("INFO : Sending: train message (ID: 1)", 1002.0)
    assert not heard.is_deaf(9999.0, works=False)


# --- Before it starts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "words"),
    [(timedelta(hours=1), "is 60 minutes behind"), (timedelta(hours=-1), "is 60 minutes ahead of")],
)
def test_a_wrong_clock_is_named(offset: timedelta, words: str, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["localhost"])
    with (
        answering(tmp_path, offset) as address,
        pytest.raises(UserError, match=f"clock .* {words} .*NTP"),
    ):
        check_superlink(address, tmp_path / "ca.crt")
    # What Flower allows is no fault, nor is a SuperLink that is not there yet.
    with answering(tmp_path, timedelta(seconds=200)) as address:
        assert check_superlink(address, tmp_path / "ca.crt") == ""
    assert "Connection refused" in check_superlink(address, tmp_path / "ca.crt")


def test_a_certificate_that_does_not_hold_is_named(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=400)
    with at(long_ago):
        make_certificates(tmp_path / "old", ["localhost"])
    with (
        answering(tmp_path / "old") as address,
        pytest.raises(UserError, match=r"has expired on .* --renew") as expired,
    ):
        check_superlink(address, tmp_path / "old" / "ca.crt")
    assert f"SuperLink at {address}" in str(expired.value)
    with at(datetime.now(UTC) + timedelta(days=1)):
        make_certificates(tmp_path / "early", ["localhost"])
    with pytest.raises(UserError, match=r"ca\.crt is not valid before .* \(NTP\)"):
        check_superlink(address, tmp_path / "early" / "ca.crt")
    make_certificates(tmp_path / "other", ["localhost"])
    with (
        answering(tmp_path / "other") as address,
        pytest.raises(UserError, match="is not signed by the authority"),
    ):
        check_superlink(address, tmp_path / "old" / "ca.crt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--superlink": "fed.example.org"}, "HOST:PORT"),
        ({"--client-id": "../up"}, "no name for a site"),
        ({"--data": "missing"}, "does not exist"),
        ({"--key": "missing"}, "cannot read --key"),
        ({"--root-certificates": "notes.txt"}, "is no certificate"),
        ({"--port": "70000"}, "1 to 65535"),
    ],
)
def test_what_a_site_is_told_wrong_takes_one_line(
    changed: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mode: 0)
    make_certificates(tmp_path, ["localhost"], ["a"])
    (tmp_path / "notes.txt").write_text("not a certificate")
    options = {
        "--superlink": "127.0.0.1:9",
        "--root-certificates": "ca.crt",
        "--key": "site-a.key",
        "--client-id": "a",
        "--data": ".",
        "--state-dir": "state",
        **changed,
    }
    from srfed import deploy

    assert deploy.main(["site", *(word for option in options.items() for word in option)]) == 2
    assert re.fullmatch(rf"error: .*{re.escape(words)}.*\n", capsys.readouterr().err)


def test_a_site_starts_only_for_the_coordinator_that_was_agreed_to(tmp_path: Path) -> None:
    (task,) = load_tasks(tiny_config().data, 1)
    data, state = site_data(tmp_path, task), tmp_path / "state"
    for name in ("agreed", "other"):
        make_certificates(tmp_path / name, ["localhost"])
    ours, others = tmp_path / "agreed" / "ca.crt", tmp_path / "other" / "ca.crt"
    with pytest.raises(
        UserError, match="a site without an agreement answers nothing; agree with: python -m srfed"
    ):
        check_before_start(state, task.name, ours)
    agree_as_rehearsed(tiny_config(), data, state, task.name, ours)
    check_before_start(state, task.name, ours)
    with pytest.raises(
        UserError, match="is not the certificate of the coordinator that was agreed to"
    ):
        check_before_start(state, task.name, others)
    # An agreement that names no coordinator binds to none.
    agree_as_rehearsed(tiny_config(), data, state, task.name)
    check_before_start(state, task.name, others)

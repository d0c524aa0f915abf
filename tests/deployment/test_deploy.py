"""Deployment: a whole federation of real processes, and how they end."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from srfed.deployment import deployment as deployment_module
from srfed.deployment.certificates import make_certificates
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower import FOLDER_VARIABLE
from srfed.errors import UserError
from srfed.files import held
from srfed.storage.manifest import read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.commands import assert_one_line, deploy_here
from support.tiny_run import CLIENTS, all_bits, begin, run_in_process, server_bits


def processes_of(folder: Path) -> list[str]:
    """Living processes other than this one that were told of the folder, by whatever way."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in told and int(entry.name) != os.getpid():
            found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


class Rehearsal:
    """The command in a process of its own, its lines as they come."""

    def __init__(self, *arguments: object) -> None:
        whole = [sys.executable, "-m", "srfed", "deploy", "rehearse", *map(str, arguments)]
        self.process = subprocess.Popen(
            whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def read_until(self, beginning: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"{beginning!r} never came: {self.lines} {self.finish()}")

    def finish(self) -> tuple[int, str]:
        """The exit code, and what it said on standard error."""
        rest, errors = self.process.communicate(timeout=400)
        self.lines += rest.splitlines()
        return self.process.returncode, errors


def deployed_bits(folder: Path) -> dict[str, Any]:
    """As tiny_run.all_bits, from the sites' own stores."""
    run = RunFolder.open(folder / "run")
    bits: dict[str, Any] = {"server": server_bits(run)}
    attempts = read_manifest(sorted(run.server.glob("round-*"))[-1])["attempts"]
    for client, attempt in attempts.items():
        manifest = read_manifest(
            folder / "sites" / client / "state" / client / "lineages" / run.lineage / attempt
        )
        bits[client] = {
            name: manifest[name] for name in ("round", "steps", "exclusive_steps", "sha256")
        }
    return bits


def assert_none_left(folder: Path) -> None:
    assert processes_of(folder) == []


@pytest.mark.slow
def test_a_rehearsal_stopped_and_resumed_has_the_bits_of_a_simulation(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rehearsal"
    first = Rehearsal(
        "--clients", 2, "--config", tiny_yaml, "--set", "federation.rounds=2", "--dir", folder
    )
    first.read_until("round 1/2")
    assert len(processes_of(folder)) >= 1 + 1 + 2, "this command, a SuperLink, two SuperNodes"
    first.process.send_signal(signal.SIGTERM)
    code, errors = first.finish()
    assert code == 143
    assert f"go on with: python -m srfed.deploy rehearse --dir {folder}" in errors
    assert "Traceback" not in errors
    assert_none_left(folder)
    certificate = (folder / "certificates" / "ca.crt").read_bytes()
    assert len(MetricsLog(folder / "run" / "metrics.jsonl").rounds()) == 1

    second = Rehearsal("--dir", folder)
    code, errors = second.finish()
    assert (code, errors) == (0, "")
    output = "\n".join(second.lines)
    assert "going on after round 1" in output
    assert "round 2/2" in output
    assert "INFO" not in output, "Flower's own log is in the files"
    assert_none_left(folder)
    assert (folder / "certificates" / "ca.crt").read_bytes() == certificate

    # Databases, images, θ_i, keys, logs; what is handed out has its own modes, in a folder that is
    # closed.
    for path in (folder, *folder.rglob("*")):
        assert path.suffix in (".crt", ".pub") or not path.stat().st_mode & 0o077, path

    run = RunFolder.open(folder / "run")
    assert (run.server / "round-00002" / "state.safetensors").is_file()
    log = MetricsLog(run.metrics)
    assert [line["round"] for line in log.rounds()] == [1, 2]
    assert [(line["round"], line["final"]) for line in log.evaluations()] == [(2, True)]
    assert not run.clients.exists(), "what clients keep is at the sites"
    page = run.report.read_text()
    assert "a federation, deployed" in page
    assert "Real training images" not in page
    settings = {"federation.rounds": 2, "federation.clients": 2}
    simulated = run_in_process(begin(tmp_path / "simulated", settings))
    bits = deployed_bits(folder)
    assert set(bits) == {"server", *CLIENTS[:2]}
    assert bits == all_bits(simulated)

    # A setting that decides the result cannot change any more; that is said before anything starts.
    changed = deploy_here("rehearse", "--dir", folder, "--set", "seed=1")
    assert_one_line(changed, "was begun with another configuration: seed: 0 -> 1")


@pytest.mark.slow
def test_a_run_that_fails_takes_one_line_and_leaves_nothing(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rehearsal"
    make_certificates(folder / "certificates", ["localhost"])
    (folder / "run").write_text("in the way")
    failed = Rehearsal("--clients", 1, "--config", tiny_yaml, "--dir", folder)
    code, errors = failed.finish()
    assert code == 2
    assert errors.count("\n") == 1
    assert "is not an empty folder" in errors
    assert "Traceback" not in "".join(failed.lines)
    assert_none_left(folder)


def test_a_folder_of_something_else_is_left_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    done = deploy_here("rehearse", "--clients", 1, "--config", tiny_yaml, "--dir", tmp_path)
    assert_one_line(done, "neither an empty folder nor that of a rehearsal")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_rehearsal_in_use_is_left_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rehearsal"
    with held(folder / "lock", wait=False):
        done = deploy_here("rehearse", "--clients", 1, "--config", tiny_yaml, "--dir", folder)
    assert_one_line(done, f"{folder} is in use by another process")
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.slow
def test_a_deployment_starts_flower_as_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Deployment(tmp_path / "d") as deployment:
        deployment.start_superlink()
        (superlink,) = deployment.pids("superlink")
        words = Path(f"/proc/{superlink}/cmdline").read_text().split("\0")
        for word in (
            "--enable-supernode-auth",
            "--ssl-certfile",
            "--disable-runtime-dependency-installation",
        ):
            assert word in words
        certificates = tmp_path / "d" / "certificates"
        context = ssl.create_default_context(cafile=certificates / "ca.crt")
        with socket.create_connection(("127.0.0.1", deployment.superlink_port)) as connection:
            context.wrap_socket(connection, server_hostname="127.0.0.1").close()

        with monkeypatch.context() as patch:
            patch.setattr(deployment, "_register", lambda public_key: None)
            patch.setattr(deployment_module, "REJOIN_SECONDS", 0)
            with pytest.raises(UserError, match="flower-supernode of site stranger ended"):
                deployment.add_site("stranger", tmp_path, tmp_path / "state")

        deployment.add_site("a", tmp_path, tmp_path / "state")
        (supernode,) = deployment.pids("supernode", "a")
        deployment.kill_superlink()
        assert deployment.pids("superlink") == []
        assert deployment.pids("supernode") == [supernode], "another machine"
        deployment.start_superlink()
        (again,) = deployment.pids("superlink")
        assert again != superlink
        assert Path(f"/proc/{again}/cmdline").read_text().split("\0") == words, (
            "the same port and database"
        )
        deployment.stop_site("a")
        assert deployment.pids("supernode") == []
    assert processes_of(tmp_path / "d") == []


def test_only_marked_processes_are_ended_and_living_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    # A process's environment can be read only a moment after it was started: this one says when it
    # runs.
    waits = [sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(60)"]
    marked = {**os.environ, FOLDER_VARIABLE: str(folder)}
    with subprocess.Popen(waits, env=marked, stdout=subprocess.PIPE, text=True) as left:
        try:
            assert left.stdout is not None
            assert left.stdout.readline() == "runs\n"
            with pytest.raises(UserError, match=f"kill {left.pid}$"):
                Deployment(folder)
        finally:
            left.kill()
    with subprocess.Popen([*waits, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "runs\n"
            Deployment(folder, tls=False, authentication=False).close()
            assert other.poll() is None
        finally:
            other.kill()


def test_authentication_needs_tls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs tls"):
        Deployment(tmp_path / "d", tls=False)


def test_the_submitted_app_is_the_projects(tmp_path: Path) -> None:
    Deployment(tmp_path / "d")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    submitted = tomllib.loads((tmp_path / "d" / "app" / "pyproject.toml").read_text())
    for key in ("components", "config", "publisher"):
        assert submitted["tool"]["flwr"]["app"][key] == project["tool"]["flwr"]["app"][key]
    for key in ("name", "version", "license"):
        assert submitted["project"][key] == project["project"][key]


def test_importing_the_processes_loads_neither_flower_nor_torch() -> None:
    modules = "{'flwr', 'ray', 'torch'} & set(sys.modules)"
    code = f"import sys, srfed.deploy, srfed.deployment.deployment; print(sorted({modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

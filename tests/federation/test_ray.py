"""Ray: who may join it, what becomes of a process or a node that dies, what is said where it cannot
start.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray

from srfed import __version__
from srfed.config import load_config
from srfed.errors import UserError
from srfed.federation.flower import ray_head, ray_start
from srfed.federation.flower.ray import run_on_ray
from srfed.federation.flower.ray_grid import Room
from srfed.federation.flower.ray_node import Wanted, unfit
from srfed.observer import Observer
from srfed.records import Place
from support import killing, surroundings
from support.commands import run_here
from support.tiny_run import (
    CHEAP,
    all_bits,
    begin,
    round_lines,
    run_in_process,
    store_of,
    write_tiny_yaml,
)

SETTINGS = {**CHEAP, "federation.rounds": 2}


class Heard(Observer):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


def free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def with_in_environment(text: str) -> list[int]:
    """The processes that have it there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [process for process in found if process != os.getpid()]


# --- A cluster ------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    address: str
    token: str


def start_node(folder: Path, token: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_raylet_start_wait_time_s": "200",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of one core each."""
    token, port = secrets.token_hex(32), free_port()
    # Sockets have short names.
    folder = Path(os.path.realpath(f"/tmp/srfed-{port}"))
    try:
        start_node(
            folder,
            token,
            *("--head", "--port", str(port), "--num-cpus", "1", "--temp-dir", str(folder)),
            "--include-dashboard=false",
        )
        address = f"127.0.0.1:{port}"
        joining = ("--address", address, "--node-ip-address", killing.OTHER_NODE)
        start_node(folder, token, *joining, "--num-cpus", "1")
        yield Cluster(address, token)
    finally:
        for process in with_in_environment(token):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.fixture
def join(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings with which a run joins the cluster, whose token is in the environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    return {**SETTINGS, "resources.backend": "ray", "resources.ray_address": cluster.address}


@pytest.mark.slow
def test_another_token_is_refused(
    join: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(UserError, match="the cluster refuses the token"):
        run_on_ray(begin(tmp_path / "run", join))


@pytest.mark.slow
def test_a_node_with_another_srfed_is_named(
    join: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_start, "__version__", "9.9")
    reason = rf"node \S+ \(.+\): it has srfed {__version__}, and the run needs 9\.9"
    with pytest.raises(UserError, match=reason):
        run_on_ray(begin(tmp_path / "run", join))


@pytest.mark.slow
def test_a_node_and_a_process_that_are_killed_change_no_bit(
    join: dict[str, Any], tmp_path: Path
) -> None:
    run, heard = begin(tmp_path / "run", join), Heard()
    run_on_ray(run, [heard], killing.app)
    undisturbed = run_in_process(begin(tmp_path / "undisturbed", SETTINGS))
    assert (run.path / killing.NODE_IS_GONE).exists()
    assert (run.path / killing.WORKER_IS_GONE).exists()
    assert all_bits(run) == all_bits(undisturbed)
    assert [line["accepted"] for line in round_lines(run)] == [
        ["digit-0", "digit-1", "digit-2"]
    ] * 2
    first, second = (
        [text for text in heard.notices if text.startswith(f"round {number}: ")]
        for number in (1, 2)
    )
    assert len(first) == 1
    assert re.fullmatch(r"round 2: digit-1: its process died: .+; asking it again", second[0])
    # What the dead process had stored answers the same question.
    assert len(list(store_of(run, "digit-1").glob("round-00002-*"))) == 1


# --- A Ray of the run's own -----------------------------------------------------------------------


@pytest.mark.slow
def test_its_processes_have_the_clients_surroundings_from_their_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the command is surrounded by stays as it is."""
    monkeypatch.setenv(surroundings.FOLDER, str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    settings = {**CHEAP, "federation.rounds": 1, "resources.backend": "ray"}
    run_on_ray(begin(tmp_path / "run", settings), client_app=surroundings.app)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    told = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert told
    for process in told:
        assert process["threads"] == "1"
        assert process["counts"]
        assert not process["simulation"]


HEAD = "from srfed.federation.flower import ray_head\n"


def test_it_begins_before_the_command_imports_pytorch_or_ray(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom srfed.errors import UserError\n" + HEAD + "def begins(*_):\n"
        '    raise UserError(f\'Ray too; loaded: {[m for m in ("torch", "ray", "flwr") '
        "if m in sys.modules]}')\n"
        "ray_head.RayHead = begins\n"
        "from srfed.simulate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    config = write_tiny_yaml(tmp_path / "tiny.yaml")
    begun = [sys.executable, "-c", program, "--config", str(config), "--run-dir", "run"]

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [*begun, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        return done.stderr

    ray = ("--backend", "ray")
    assert said(*ray) == "error: Ray too; loaded: []\n"
    for nothing in (
        (*ray, "--print-config"),
        (*ray, "--set", "data.images_per_task=0"),
        (*ray, "--set", "federation.clients=11"),
    ):
        assert "Ray too" not in said(*nothing), nothing


@pytest.mark.slow
def test_a_run_takes_the_ray_that_was_begun_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[ray_head.RayHead] = []

    class Counted(ray_head.RayHead):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            begun.append(self)

    monkeypatch.setattr(ray_head, "RayHead", Counted)
    config = write_tiny_yaml(tmp_path / "tiny.yaml")
    words = ["--config", config, "--backend", "ray", "--run-dir", tmp_path / "run"]
    done = run_here("simulate", *words, "--set", "federation.rounds=1")
    assert done.returncode == 0, done.stderr
    (head,) = begun
    assert not with_in_environment(head.token)
    assert head.token not in os.environ.values()
    own = load_config(config, ["resources.backend=ray", "resources.client_cpus=1"])
    with ray_head.begun_ahead():
        ray_head.begin_ahead(own)
        other = load_config(config, ["resources.backend=ray", "resources.client_cpus=2"])
        with ray_head.head_for(other, 0) as another:
            assert another is begun[2], "that of another run has other threads"
    assert len(begun) == 3


def gone(trace: str, folder: Path) -> bool:
    """Whether no process has the trace in its environment and nothing is left in the folder; waits
    a while for it.
    """
    deadline = time.monotonic() + 60
    while with_in_environment(trace) or list(folder.iterdir()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refused", "killed"])
def test_no_ray_outlives_its_command(how: str, tmp_path: Path) -> None:
    """A Ray that was begun for a run that is refused then, and that of a run that is killed."""
    # Sockets have short names.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    config = write_tiny_yaml(tmp_path / "tiny.yaml")
    wrong = ["--set", "model.exclusive_stages=[nothing]"] if how == "refused" else []
    words = ["--config", str(config), "--backend", "ray", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "srfed.simulate", *words, *wrong],
        env={**os.environ, "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        if how == "killed":
            assert any("round 1" in line for line in command.stdout)
            assert len(with_in_environment(str(folder))) > 3
            command.kill()
        else:
            assert "nothing" in command.stderr.read()
    assert gone(str(folder), folder)
    folder.rmdir()


def test_a_ray_whose_process_ends_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert simulated(tmp_path).startswith(
        "error: Ray cannot start: the process that starts it has ended (1); resources.backend = "
    )


class Stranger(Observer):
    """A process without the token, which tries to join while the run goes on."""

    def __init__(self) -> None:
        self.said = self.token = ""
        self.files: list[Path] = []
        self.shown: list[str] = []

    def on_begin(self, *_: Any) -> None:
        context = ray.get_runtime_context()
        self.token = os.environ["RAY_AUTH_TOKEN"]
        folder = Path(ray._private.worker._global_node.get_session_dir_path())
        self.files = [
            path
            for path in folder.rglob("*")
            if path.is_file() and self.token.encode() in path.read_bytes()
        ]
        assert folder.parents[1].stat().st_mode & 0o777 == 0o700, "nor does anybody get there"
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                self.shown.append((process / "cmdline").read_text())
        program = f"import ray; ray.init(address={context.gcs_address!r}); print('joined')"
        without = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=without,
            timeout=120,
        )
        self.said = done.stdout + done.stderr


@pytest.mark.slow
def test_nobody_joins_a_runs_own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    stranger = Stranger()
    run = begin(tmp_path / "run", {**SETTINGS, "federation.rounds": 1, "resources.backend": "ray"})
    run_on_ray(run, [stranger])
    assert len(round_lines(run)) == 1
    assert "InvalidAuthToken" in stranger.said
    assert "joined" not in stranger.said
    assert len(stranger.token) == 64
    assert not stranger.files, "on disk nor in a log"
    assert not any(stranger.token in line for line in stranger.shown)
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert not any(stranger.token.encode() in p.read_bytes() for p in run.path.rglob("*.*"))


# --- What is said -------------------------------------------------------------------------------


def simulated(tmp_path: Path, *arguments: str) -> str:
    """The one line of a command that ends at once."""
    done = run_here(
        "simulate",
        *("--config", write_tiny_yaml(tmp_path / "tiny.yaml"), "--backend", "ray"),
        *("--run-dir", tmp_path / "run"),
        *arguments,
    )
    assert done.returncode == 2
    assert "waiting" not in done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_a_ray_that_raises_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("the raylet\nhas died\n\nTraceback: its log") from OSError("no port")

    monkeypatch.setattr(ray, "init", fail)
    assert simulated(tmp_path).startswith("error: Ray cannot start: no port; resources.backend = ")
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RAY_TMPDIR", str(file))
    line = simulated(tmp_path)
    assert line.startswith("error: Ray cannot start: ")
    assert "RAY_TMPDIR" in line


def test_a_ray_without_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "HAS_TOKENS", False)
    assert "has no access tokens" in simulated(tmp_path)


def test_a_cluster_that_asks_for_no_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32)
    monkeypatch.setattr(ray_start, "GcsClient", lambda address: address)
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        line = simulated(tmp_path, "--set", f"resources.ray_address={address}")
    assert line.startswith(f"error: resources.ray_address = {address}")
    assert "that Ray asks for no token" in line
    assert os.environ["RAY_AUTH_TOKEN"] == "t" * 32


def test_an_address_without_a_ray_or_a_run_without_a_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    closed = f"127.0.0.1:{free_port()}"
    line = simulated(tmp_path, "--set", f"resources.ray_address={closed}")
    assert line.startswith(f"error: resources.ray_address = {closed}")
    assert "nobody answers there" in line
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        setting = f"resources.ray_address={address}"
        done = run_here("simulate", "--resume", tmp_path / "run", "--set", setting)
    assert "needs the cluster's token in RAY_AUTH_TOKEN" in done.stderr


@pytest.mark.parametrize("address", ["ray://h:1", "h", "h:0", "h:65536", "h:1/x", "", 7])
def test_an_impossible_address_is_refused(tmp_path: Path, address: object) -> None:
    assert "ray_address" in simulated(tmp_path, "--set", f"resources.ray_address={address}")


def test_an_address_without_ray_is_refused(tmp_path: Path) -> None:
    done = run_here(
        *("simulate", "--config", write_tiny_yaml(tmp_path / "tiny.yaml")),
        *("--set", "resources.ray_address=h:1"),
    )
    assert "ray_address needs backend ray" in done.stderr


def test_a_node_says_why_it_cannot_work_for_a_run(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    fit = Wanted(__version__, str(run.path), run.lineage, "")
    assert unfit(fit) == ""
    other = unfit(replace(fit, version="9.9"))
    assert other == f"it has srfed {__version__}, and the run needs 9.9"
    assert "cannot read" in unfit(replace(fit, folder=str(tmp_path / "none")))
    assert "another run" in unfit(replace(fit, lineage="other"))
    assert "data.dir = /none" in unfit(replace(fit, images="/none"))


def test_each_node_has_room_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    cpu = Place("cpu", "float32")
    assert Room(cpus=1, gpus=0, most=100, place=cpu).now() == 6
    assert Room(cpus=2, gpus=0, most=100, place=cpu).now() == 2, "not three"
    assert Room(cpus=1, gpus=0, most=4, place=cpu).now() == 4
    assert Room(cpus=1, gpus=0.5, most=100, place=cpu).now() == 2
    nodes[1]["Resources"]["GPU"] = 2.0
    assert Room(cpus=1, gpus=0.6666, most=100, place=cpu).now() == 3, "one on each GPU"

"""What answers a site's messages is Flower's own program, but that it has imported everything."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

from srfed.deployment.flower import FOLDER_VARIABLE, environment_for, marked, program
from srfed.federation.flower.shim import install

WARM, CLIENT_APP = "srfed.federation.flower.warm", "flwr-clientapp"


class Site:
    """A program in a folder, the processes of which are found by its mark."""

    def __init__(self, folder: Path, supernode: int) -> None:
        self.folder = folder
        self.environment = environment_for(folder, folder, "site a")
        self.supernode = supernode

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [CLIENT_APP, "--parent-pid", str(self.supernode), *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self, name: str) -> list[int]:
        return [process.pid for process in marked(self.folder) if process.program == name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("a-folder-with-a-name-too-long-for-a-socket-" + 60 * "x")
    supernode = subprocess.Popen(["sleep", "600"])
    site = Site(folder, supernode.pid)
    yield site
    supernode.kill()
    supernode.wait()
    wait_until(lambda: not site.pids(WARM))


def wait_until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("words", [["--help"], ["--nonsense"], ["--token", " "]])
def test_it_says_and_ends_as_flowers_program_does(site: Site, words: list[str]) -> None:
    ours = site.start(*words)
    said = ours.communicate(timeout=120)
    own = subprocess.run(
        [program(CLIENT_APP), *words], env=site.environment, capture_output=True, text=True
    )
    assert (said[0], said[1], ours.returncode) == (own.stdout, own.stderr, own.returncode)
    assert len(site.pids(WARM)) == 1, "one process has imported everything, and stays"


def at_work(site: Site) -> "subprocess.Popen[str]":
    """A ClientApp that waits for a SuperNode which is not there."""
    words = ["--insecure", "--token", "ab" * 32, "--runtime-api-address", "127.0.0.1:1"]
    started = site.start(*words)
    wait_until(lambda: len(site.pids(WARM)) == 3)
    return started


def test_a_killed_program_takes_its_fork_along_and_leaves_the_rest(site: Site) -> None:
    started = at_work(site)
    first = min(site.pids(WARM))
    started.kill()
    started.communicate()
    wait_until(lambda: site.pids(WARM) == [first])


def test_a_signal_reaches_the_fork(site: Site) -> None:
    started = at_work(site)
    os.kill(max(site.pids(WARM)), signal.SIGSTOP)  # so that it is not faster than this test
    started.send_signal(signal.SIGTERM)
    os.kill(max(site.pids(WARM)), signal.SIGCONT)
    said = "".join(started.communicate(timeout=60))
    assert started.returncode == 128 + signal.SIGTERM or "Task stopped" in said


def test_whoever_forks_ends_with_the_supernode(tmp_path: Path) -> None:
    supernode = subprocess.Popen(["sleep", "600"])
    site = Site(tmp_path, supernode.pid)
    site.start("--help").communicate(timeout=120)
    (pid,) = site.pids(WARM)
    supernode.kill()
    supernode.wait()
    wait_until(lambda: not site.pids(WARM))
    # Another SuperNode of the same site finds a socket that nobody hears.
    site.supernode = os.getpid()
    try:
        assert "Run a Flower ClientApp" in site.start("--help").communicate(timeout=120)[0]
        assert site.pids(WARM) != [pid]
    finally:
        for left in site.pids(WARM):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def test_where_nothing_can_be_forked_the_same_program_runs_by_itself(tmp_path: Path) -> None:
    """There is no folder for the socket."""
    folder = install(tmp_path, sys.executable)
    text = (folder / CLIENT_APP).read_text()
    broken = text.replace(f"run({str(tmp_path)!r}", f"run({str(tmp_path / 'none')!r}")
    assert broken != text
    (folder / CLIENT_APP).write_text(broken)
    done = subprocess.run(
        [folder / CLIENT_APP, "--parent-pid", str(os.getpid()), "--help"],
        env={**os.environ, FOLDER_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "usage: flwr-clientapp" in done.stdout
    assert "Run a Flower ClientApp" in done.stdout
    assert not marked(tmp_path)


def test_no_program_of_flowers_for_another_kind_of_app_is_found_at_a_site(tmp_path: Path) -> None:
    """A SuperLink says which kind of app a run is; those for agents run what an archive holds."""
    path = environment_for(tmp_path, tmp_path, "site a")["PATH"]
    for kind in TaskType:
        if kind != TaskType.CLIENT_APP:
            command = shutil.which(TASK_TYPE_TO_COMMAND[kind], path=path)
            assert command is not None
            done = subprocess.run([command, "--token", "x"], capture_output=True, text=True)
            assert done.returncode == 1
            assert done.stderr.startswith(f"refused: {kind}, which")

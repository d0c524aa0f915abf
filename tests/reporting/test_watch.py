"""``srfed watch``: the page of a run that goes on, for this machine and whoever has its address."""

import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srfed.errors import UserError
from srfed.records import TaskInfo
from srfed.reporting.watch import Watch
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.browser import needs_chromium, screenshot
from support.commands import run_here
from support.records import round_record
from support.tiny_run import begin


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = begin(tmp_path / "run")
    MetricsLog(made.metrics).begin(0, [TaskInfo("client-a", "ant", 30, 10)])
    return made


@pytest.fixture
def watch(run: RunFolder) -> Iterator[Watch]:
    served = Watch(run, port=0, every=3)
    thread = threading.Thread(target=served.serve)
    thread.start()
    yield served
    served.close()
    thread.join()


def asked(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        return str(answer.read().decode())


def test_the_page_follows_the_run_and_is_asked_for_again(run: RunFolder, watch: Watch) -> None:
    page = asked(watch.address)
    assert "round 0 of 3" in page
    assert '<meta http-equiv="refresh" content="3">' in page
    MetricsLog(run.metrics).add_round(round_record(1))
    assert "round 1 of 3" in asked(watch.address)
    with run.metrics.open("a") as log:
        log.write("rubbish\n")
    assert asked(watch.address).endswith("is damaged in line 3; remove that line")
    assert not run.report.exists(), "nothing is written"


def test_a_finished_run_is_not_asked_for_again(finished_run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder.open(Path(shutil.copytree(finished_run.path, tmp_path / "run")))
    served = Watch(copy, port=0, every=3)
    thread = threading.Thread(target=served.serve)
    thread.start()
    try:
        page = asked(served.address)
    finally:
        served.close()
        thread.join()
    assert "finished: round 3 of 3" in page
    assert 'http-equiv="refresh"' not in page
    assert "Real training images of the same owners" in page


@needs_chromium
def test_a_browser_shows_it(watch: Watch, tmp_path: Path) -> None:
    shot = screenshot(watch.address, tmp_path, width=600, height=600, dark=True)
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert np.median(pixels) < 60, "the page's own style is let through"
    assert np.ptp(pixels) > 150


def test_only_this_machine_and_only_the_whole_address_is_answered(watch: Watch) -> None:
    assert watch.address.startswith("http://127.0.0.1:")
    root = watch.address.split("/", 3)[:3]
    for path in ("", "x", "..%2f..%2frun.json", "ä".encode().hex()):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked("/".join([*root, path]))
    assert len(watch.address.split("/")[3]) >= 32, "nobody guesses it"


def test_a_port_that_is_taken_or_none_is_said(run: RunFolder, watch: Watch) -> None:
    taken = int(watch.address.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"^--port {taken} cannot be used: Address already in use"):
        Watch(run, port=taken, every=3)
    for option, value in (("--port", 65536), ("--every", 0)):
        done = run_here("watch", run.path, option, value)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {option} {value} is impossible; allowed: ")


def test_the_command_says_where_and_ends_with_ctrl_c(run: RunFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "srfed", "watch", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("open ").strip()
            assert "round 0 of 3" in asked(address)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "interrupted\n")

"""``flwr run .`` of a clone, with nothing prepared: Flower's own local SuperLink and simulation."""

import signal
import subprocess
from pathlib import Path

import pytest

from srfed.deployment.flower import environment_for, marked, program, send
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.deployed import RUN_SECONDS, free_ports

pytestmark = pytest.mark.slow
SMALL = (
    'federation.rounds=1 training.local_steps=1 model.channels="[8, 16, 16, 16]" model.groups=4 '
    "evaluation.samples=4 evaluation.ssim_images=0 sampling.steps=1"
)


def test_plain_flwr_run_simulates_the_digits_and_shows_how_far_it_is(tmp_path: Path) -> None:
    ports = free_ports(2)
    environment = environment_for(tmp_path / "flower", tmp_path, "flwr") | {
        "HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        # What it would install is tested without a registry: tests/federation/test_run_config.py.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    clone = Path(__file__).parents[2]
    (tmp_path / "home").mkdir()
    try:
        done = subprocess.run(
            [str(program("flwr")), "run", ".", "--stream", "-c", SMALL],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
        listed = subprocess.run(
            [str(program("flwr")), "ls"],
            cwd=clone,
            env=environment | {"COLUMNS": "300"},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
    finally:
        # Flower leaves its SuperLink running.
        while alive := marked(tmp_path):
            send(signal.SIGKILL, [process.pid for process in alive])
    assert "round 1/1" in done.stdout, done.stdout + done.stderr
    assert "finished:completed" in listed.stdout
    (folder,) = (tmp_path / "home" / "srfed-runs").iterdir()
    assert f"the run's folder is {folder}" in done.stdout
    (line,) = MetricsLog(RunFolder.open(folder).metrics).rounds()
    assert line["accepted"] == ["digit-0", "digit-1"]
    assert (folder / "report.html").exists()

"""The smallest federation there is: three clients, a few thousand weights, a few steps a round."""

import json
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Message
from flwr.clientapp import ClientApp

from srfed.config import RunConfig, parse_config
from srfed.federation.flower.client_app import app as real_client_app
from srfed.federation.flower.exchange import stop_requested
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.in_process import run_in_process as train_in_process
from srfed.federation.flower.server_app import run_federation
from srfed.federation.messages import TRAIN
from srfed.reporting.curves import shown_on_terminal
from srfed.storage.manifest import read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

TINY: dict[str, dict[str, Any]] = {
    "model": {"channels": [8, 16, 16, 16], "groups": 4},
    "training": {"batch_size": 16, "local_steps": 2, "learning_rate_schedule": "constant"},
    "federation": {"clients": 3, "rounds": 3},
    "sampling": {"steps": 5},
    "evaluation": {
        "every": 2,
        "samples": 30,
        "samples_between": 12,
        "ssim_images": 3,
        "ssim_timestep": 5,
        "ssim_curve": [5, 10],
        "grid_columns": 4,
        "strip_steps": 3,
    },
    "resources": {"backend": "inline", "device": "cpu"},
}
CHEAP: dict[str, Any] = {
    "federation.keep_attempts": 9,
    "evaluation.every": 0,
    "evaluation.samples": 6,
    "evaluation.ssim_images": 0,
    "evaluation.memorisation_quantile": 0,
    "sampling.steps": 1,
    "training.batch_size": 4,
}
"""For tests of the rounds alone: next to no evaluation, and all attempts stay."""
CLIENTS = ["digit-0", "digit-1", "digit-2"]
TIMINGS = {"seconds", "images_per_second"}


class StoppingGrid(InlineGrid):
    """Somebody presses Ctrl-C when the first client of round 3 has answered."""

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "3":
            stop_requested.set()
        return reply


def tiny_config(overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The tiny configuration with some "section.key" set otherwise."""
    content: dict[str, Any] = {
        "name": "tiny",
        **{section: dict(keys) for section, keys in TINY.items()},
    }
    for name, value in (overrides or {}).items():
        section, key = name.split(".")
        content[section] = {**content.get(section, {}), key: value}
    return parse_config(content)


def write_tiny_yaml(path: Path) -> Path:
    path.write_text(yaml.safe_dump({"name": "tiny", **TINY}))
    return path


def begin(path: Path, overrides: Mapping[str, Any] | None = None) -> RunFolder:
    """A new run's folder."""
    return RunFolder.create(path, tiny_config(overrides))


def run_in_process(run: RunFolder, client_app: ClientApp = real_client_app) -> RunFolder:
    """The whole run through the real ServerApp and the in-process grid."""
    train_in_process(run, shown_on_terminal(run), client_app)
    return run


def run_on_grid(
    run: RunFolder, grid_type: type[InlineGrid], client_app: ClientApp = real_client_app
) -> InlineGrid:
    """As :func:`run_in_process`, on a grid that does something besides."""
    grid = grid_type(client_app, run.config.federation.clients, run.clients)
    run_federation(grid, run, fixed=True)
    return grid


def server_bits(run: RunFolder) -> dict[str, Any]:
    """What tells whether two servers ended in the same bits: φ, its average, optimizer, moments."""
    manifest = read_manifest(sorted(run.server.glob("round-*"))[-1])
    return {name: manifest[name] for name in ("round", "shared_steps", "sha256")}


def accepted_attempts(run: RunFolder) -> dict[str, Path]:
    """The folder of each client's last accepted attempt."""
    manifest = read_manifest(sorted(run.server.glob("round-*"))[-1])
    return {
        client: store_of(run, client) / attempt for client, attempt in manifest["attempts"].items()
    }


def store_of(run: RunFolder, client: str) -> Path:
    """Where a client keeps the attempts of a run."""
    return run.clients / client / "lineages" / run.lineage


def all_bits(run: RunFolder) -> dict[str, Any]:
    """:func:`server_bits`, and the same of every client's θ_i, its average and its moments."""
    bits: dict[str, Any] = {"server": server_bits(run)}
    for client, folder in accepted_attempts(run).items():
        manifest = read_manifest(folder)
        bits[client] = {
            name: manifest[name] for name in ("round", "steps", "exclusive_steps", "sha256")
        }
    return bits


def records(run: RunFolder) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in map(json.loads, run.metrics.read_text().splitlines())
    ]


def round_lines(run: RunFolder) -> list[dict[str, Any]]:
    return MetricsLog(run.metrics).rounds()


def stop_after_a_round(command: list[str], number: signal.Signals) -> tuple[int, str]:
    """Start a command, send it a signal once it has printed a round; its exit code and standard
    error.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("round"):
                    break
            process.send_signal(number)
            _, message = process.communicate(timeout=200)
        finally:
            process.kill()
    return process.returncode, message


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing stops in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)

"""Fixtures that several test files share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from srfed.federation.flower.exchange import stop_requested
from srfed.storage.run_folder import RunFolder
from support.shared_runs import trained_once
from support.tiny_run import run_in_process, tiny_config, write_tiny_yaml

# A deployment's SuperExecs ask for work ten times a second, a request over HTTP each, and several
# deployments share two cores here. A message waits a little longer instead.
os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.3")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: whoever runs one last lets the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of the tiny federation, in-process backend."""
    return write_tiny_yaml(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole tiny run; a test that changes its folder works on a copy."""
    return trained_once(tmp_path_factory, tiny_config(), run_in_process)


@pytest.fixture(scope="session")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """As ``finished_run``, of two rounds."""
    return trained_once(tmp_path_factory, tiny_config({"federation.rounds": 2}), run_in_process)


@pytest.fixture(scope="session", autouse=True)
def _signals_as_at_a_terminal() -> Iterator[None]:
    """A suite that was started with nohup, or in the background, would hand on to its processes
    what it ignores.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _nobody_asked_to_stop() -> Iterator[None]:
    stop_requested.clear()
    yield
    stop_requested.clear()

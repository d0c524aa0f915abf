"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import begin, run_in_process, write_tiny_yaml

from srfed.federation.exchange import stop_requested
from srfed.reporting.run_directory import RunDirectory


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of the tiny federation, in-process backend."""
    return write_tiny_yaml(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A whole tiny run; a test that changes its folder works on a copy."""
    return run_in_process(begin(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture(autouse=True)
def _nobody_asked_to_stop() -> Iterator[None]:
    stop_requested.clear()
    yield
    stop_requested.clear()

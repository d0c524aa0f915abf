"""Fixtures that several files of this folder share."""

from collections.abc import Callable
from functools import cache

import pytest

from srfed.storage.run_folder import RunFolder
from support.faults import app_with
from support.membership import SETTINGS, ChangingGrid, failing_in, start
from support.shared_runs import trained_once
from support.tiny_run import begin, tiny_config


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "LOOKS_APART"):
        monkeypatch.setattr(f"srfed.federation.flower.roster.{name}", 0)
    monkeypatch.setattr("srfed.federation.flower.roster.POLL_SECONDS", 0.01)
    monkeypatch.setattr("srfed.federation.flower.exchange.LONGEST_PAUSE", 0.05)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run, three rounds with all three clients."""
    return trained_once(tmp_path_factory, tiny_config(SETTINGS), start)


@pytest.fixture(scope="session")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A run in which a client, by its position, is there but fails in some rounds."""

    @cache
    def failed(index: int, *rounds: int) -> RunFolder:
        run = begin(tmp_path_factory.mktemp("without") / "run", SETTINGS)
        return start(run, ChangingGrid(run, app_with(index, train=failing_in(*rounds))))

    return failed


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three clients that ended after its first round."""
    config = tiny_config({**SETTINGS, "federation.rounds": 1})
    return trained_once(tmp_path_factory, config, start)

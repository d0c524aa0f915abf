"""Runs that many tests look at: trained once by a whole session, and copied to each of its
processes.
"""

import hashlib
import os
import shutil
from collections.abc import Callable

import pytest

from srfed.config import RunConfig
from srfed.files import held
from srfed.storage.run_folder import RunFolder


def trained_once(
    factory: pytest.TempPathFactory, config: RunConfig, train: Callable[[RunFolder], object]
) -> RunFolder:
    """This process's copy of a run, which the first process of the session that wants it trains.

    Args:
        factory: pytest's own.
        config: of the run; with the name of ``train`` it says which run it is.
        train: trains a new run to its end, the same way each time.
    """
    base = factory.getbasetemp()
    # Each of xdist's processes has a folder of its own in the session's.
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    key = hashlib.sha256(config.to_json().encode()).hexdigest()[:12]
    kept = session / "trained" / f"{train.__name__}-{key}"
    with held(kept.with_suffix(".lock"), wait=True):
        if not kept.exists():
            # Whoever fails leaves nothing that looks trained.
            begun = kept.with_suffix(f".{os.getpid()}")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir(parents=True)
            train(RunFolder.create(begun / "run", config))
            begun.rename(kept)
    copy = factory.mktemp("trained") / "run"
    shutil.copytree(kept / "run", copy)
    return RunFolder.open(copy)

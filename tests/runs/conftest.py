"""Fixtures that several files of this folder share."""

import shutil
from pathlib import Path

import pytest

from srfed.storage.run_folder import RunFolder


@pytest.fixture
def copy(finished_run: RunFolder, tmp_path: Path) -> Path:
    """A finished run's folder, to be spoilt."""
    return Path(shutil.copytree(finished_run.path, tmp_path / "copy"))

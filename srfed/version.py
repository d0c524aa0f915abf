"""The version, which pyproject.toml alone says."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def find_version(package: Path) -> str:
    """That of the clone that a package lies in; elsewhere that under which it was installed.

    Args:
        package: the folder of the package.
    """
    try:
        project = (package.parent / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        project = ""
    # Not by its parser, for which everything that looks at the version would wait.
    said = re.search(r'^name = "srfed"\nversion = "([^"]+)"$', project, re.MULTILINE)
    if said:
        return said[1]
    try:
        return version("srfed")
    except PackageNotFoundError:
        return "unknown"


__version__ = find_version(Path(__file__).resolve().parent)

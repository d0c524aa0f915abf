"""What an installed srfed says of itself, and of systems that it does not run on."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import srfed
from srfed.config import parse_config
from srfed.cores import check_resources
from srfed.errors import UserError
from srfed.systems import check_system, told_of_system
from srfed.version import find_version

CLONE = Path(__file__).parent.parent
CALLED = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "ray": "flwr"}
"""Packages that are imported under another name than they are installed under."""
WINDOWS = """
import signal, sys
sys.platform = "win32"
sys.modules |= {"fcntl": None, "resource": None, "termios": None}
for name in ("SIGHUP", "SIGPIPE", "SIGKILL"):
    delattr(signal, name)
import srfed, srfed.__main__, srfed.deploy, srfed.simulate
for main in (srfed.__main__.main, srfed.simulate.main, srfed.deploy.main):
    print(main(["--help"]))
try:
    srfed.train
except srfed.UserError as error:
    print(error)
"""


def test_the_version_is_said_in_one_place() -> None:
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    assert srfed.__version__ == find_version(CLONE / "srfed") == project["version"]
    cited = yaml.safe_load((CLONE / "CITATION.cff").read_text())
    assert cited["version"] == project["version"]


def test_what_is_imported_is_what_is_installed_and_said_why() -> None:
    required = (CLONE / "requirements.txt").read_text().split()
    declared = {re.split(r"[\[<>=]", one)[0] for one in required}
    imported = set()
    for file in (CLONE / "srfed").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            imported |= {
                "tensorboard" if "torch.utils.tensorboard" in one else one for one in names
            }
    packages = {one.split(".")[0] for one in imported} - sys.stdlib_module_names - {"srfed"}
    assert {CALLED.get(one, one).replace("_", "-") for one in packages} == declared
    decisions = (CLONE / "docs" / "decisions.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)(?:\[\w+\])?` \|", decisions, re.MULTILINE)
    assert set(rows) == declared


def test_a_version_is_that_of_the_clone_and_not_of_a_neighbour(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "srfed"\nversion = "7.8.9"\n')
    assert find_version(tmp_path / "srfed") == "7.8.9"
    installed = find_version(tmp_path / "elsewhere" / "srfed")
    project.write_text('[project]\nname = "other"\nversion = "7.8.9"\n')
    assert find_version(tmp_path / "srfed") == installed != "7.8.9"


def test_where_srfed_cannot_run_every_way_in_says_so_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True)
    said = (
        "srfed does not run on Windows, which has neither the file locks (fcntl) that keep two "
        "processes out of a run, nor the signals that stop one; under WSL 2 it does"
    )
    assert done.stdout.splitlines() == ["2", "2", "2", said]
    assert done.stderr.splitlines() == [f"error: {said}"] * 3


def test_what_is_not_tested_on_a_system_is_said_and_tried(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told_of_system("darwin") == 0
    assert capsys.readouterr().err.startswith("srfed is tested on Linux alone, and not on darwin")
    check_system("darwin")
    assert told_of_system("linux") == 0
    assert capsys.readouterr() == ("", "")


def test_without_ray_the_other_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srfed.cores.find_spec", lambda name: None)
    resources = parse_config({"resources": {"backend": "ray"}}).resources
    with pytest.raises(UserError, match=r"backend = ray needs Ray.*allowed: inline"):
        check_resources(resources)
    check_resources(resources, federated=False)
    check_resources(resources.model_copy(update={"backend": "inline"}))

"""What a site runs of the archive that a SuperLink hands out: nothing, and that only if it is one
of srfed's.
"""

import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk, build_fab_from_files

from srfed.deployment.deployment import Deployment
from srfed.federation.flower import client_app, guard, program
from srfed.federation.flower.archive import ForeignArchiveError, check_archive
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.messages import FAILED, REFUSED

HERE = Path(__file__).parents[2]
OURS = "srfed.federation.flower.client_app:app"
THIEF = "raise SystemExit('code of the archive was run')\n"


def project(client_app: str = OURS, more: str = "") -> str:
    return f"""
[project]
name = "srfed"
version = "1.0.0"
description = "An app"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "srfed"

[tool.flwr.app.components]
serverapp = "own_aggregator:app"
clientapp = "{client_app}"
{more}
"""


def archive(files: dict[str, str]) -> bytes:
    """As Flower itself makes one, its list of files included."""
    return build_fab_from_files({name: text.encode() for name, text in files.items()})[0]


def zipped(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files:
            made.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def test_the_archives_that_srfed_itself_submits_are_let_in(tmp_path: Path) -> None:
    check_archive(build_fab_from_disk(HERE))
    Deployment(tmp_path, tls=False, authentication=False)
    check_archive(build_fab_from_disk(tmp_path / "app"))
    harmless = {"configs/a.yaml": "seed: 1", "README.md": "# An app", "LICENSE": "free"}
    check_archive(archive({"pyproject.toml": project(), **harmless}))


PROJECT = ("pyproject.toml", project().encode())
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "a ClientApp of its own": (
        lambda: archive({"pyproject.toml": project("thief:app"), "thief.py": THIEF}),
        "it holds 'thief.py', where",
    ),
    "code under our own name": (
        lambda: archive({"pyproject.toml": project(), "srfed/__init__.py": THIEF}),
        "it holds 'srfed/__init__.py', where",
    ),
    "a module that something installed may import": (
        lambda: archive({"pyproject.toml": project(), "jinja2.py": THIEF, "yaml.py": THIEF}),
        "and 1 more like it, where",
    ),
    "an app of what is installed, but not ours": (
        lambda: archive({"pyproject.toml": project("flwr.thief:app")}),
        "its clientapp is 'flwr.thief:app'",
    ),
    "an agent besides": (
        lambda: zipped(("pyproject.toml", project(more='agentapp = "a:b"').encode())),
        "it names the components ['agentapp', 'clientapp', 'serverapp']",
    ),
    "a compiled module": (lambda: zipped(PROJECT, ("yaml.so", b"")), "it holds 'yaml.so'"),
    "a path module": (lambda: zipped(PROJECT, ("configs/x.pth", b"")), "it holds 'configs/x.pth'"),
    "a way out": (lambda: zipped(PROJECT, ("configs/../../a.yaml", b"")), "it holds 'configs/../"),
    "a folder": (lambda: zipped(PROJECT, ("configs/", b"")), "it holds 'configs/'"),
    "a name with a line break": (
        lambda: zipped(PROJECT, ("configs/a.yaml\nb.yaml", b"")),
        "it holds 'configs/a.yaml\\nb.yaml'",
    ),
    "the project twice": (lambda: zipped(PROJECT, PROJECT), "it holds a file twice"),
    "a bomb": (lambda: zipped(PROJECT, ("LICENSE", bytes(11 * 2**20))), "it unpacks to"),
    "no project": (lambda: zipped(("LICENSE", b"")), "it cannot be read: KeyError"),
    "no components": (lambda: zipped(("pyproject.toml", b"a = 1")), "it cannot be read: KeyError"),
    "deep TOML": (
        lambda: zipped(("pyproject.toml", b"a = " + b"[" * 100_000)),
        "it cannot be read: RecursionError",
    ),
    "no archive": (lambda: b"PK", "it cannot be read: BadZipFile"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", FOREIGN)
def test_any_other_archive_is_refused_in_one_line(what: str) -> None:
    make, words = FOREIGN[what]
    with pytest.raises(ForeignArchiveError) as refused:
        check_archive(make())
    assert words in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Flower's module that answers a message, with our parts in it."""
    module = import_module("flwr.supernode.runtime.run_clientapp")
    for name in ("install_from_fab", "get_load_client_app_fn", "push_message"):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    path = list(sys.path)
    program.replace_parts()
    yield module
    assert sys.path == path
    assert not (tmp_path / "flower").exists(), "nothing is unpacked"


def answer_to(runner: Any, fab: bytes) -> Any:
    """The steps of Flower's program between getting an archive and sending the reply."""
    runner.install_from_fab(fab, skip_prompt=True)
    load = runner.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    return load("srfed/srfed", "1.0.0", "0" * 64)


def test_what_answers_is_the_installed_app_or_a_refusal(runner: Any, tmp_path: Path) -> None:
    node = {"client-id": "a", "data": str(tmp_path / "a.npz"), "state-dir": str(tmp_path)}
    assert answer_to(runner, archive({"pyproject.toml": project()})) is client_app.app
    thief = archive({"pyproject.toml": project("thief:app"), "thief.py": THIEF})
    grid = InlineGrid(answer_to(runner, thief), 0)
    grid._contexts[1] = Context(0, 1, node, RecordDict(), {})
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1, "train")])
    assert (reply.error.code, reply.error.reason) == (REFUSED, program.REFUSAL)
    (line,) = (tmp_path / "a" / "client.log").read_text().splitlines()
    assert "refused: the app that was handed out: it holds 'thief.py'" in line


SECRET = "scan of patient 7"


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError(SECRET)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (program, "check_archive"),
        (type(client_app.app), "__call__"),
        (guard, "admit"),
        (import_module(program._RUNNER), "get_project_dir"),
    ],
    ids=["before the app", "around the guard", "within it", "in a step of Flower's"],
)
def test_whatever_fails_where_the_server_learns_that_it_did_and_the_owner_why(
    where: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Flower's own program, but for the connection to a SuperNode."""
    module, sent = import_module(program._RUNNER), list[Message]()
    node = {"client-id": "a", "data": str(tmp_path / "a.npz"), "state-dir": str(tmp_path)}
    asked = Message(RecordDict(), 1, "train")
    come = (
        asked,
        Context(0, 1, node, RecordDict(), {}),
        SimpleNamespace(run_id=1, fab_id="srfed/srfed", fab_version="1.0.0"),
        SimpleNamespace(content=archive({"pyproject.toml": project()}), hash_str="0" * 64),
    )
    # All that needs a SuperNode or would end this process; over a real one this program runs in
    # tests/deployment, where none of Flower's own steps can be made to fail.
    for name, part in {
        "pull_task_input": lambda _: come,
        "push_message": lambda _client, message, _context: sent.append(message),
        **dict.fromkeys(("RuntimeHttpClient", "HeartbeatSender"), MagicMock()),
        **dict.fromkeys(("register_signal_handlers", "flwr_exit", "event"), MagicMock()),
        **{name: getattr(module, name) for name in ("install_from_fab", "get_load_client_app_fn")},
    }.items():
        monkeypatch.setattr(module, name, part)
    program.replace_parts()
    monkeypatch.setattr(where, what, fails)
    module.run_clientapp("127.0.0.1:1", "token", insecure=True)
    (reply,) = sent
    assert (reply.error.code, reply.error.reason) == (FAILED, guard.FAILURE)
    assert SECRET in (tmp_path / "a" / "client.log").read_text()


def test_flowers_own_program_does_the_steps_that_are_replaced(runner: Any) -> None:
    """Or an archive would be unpacked by another name, unseen."""
    names = runner.run_clientapp.__code__.co_names
    ours = {"install_from_fab", "get_load_client_app_fn", "push_message"}
    assert {*ours, "pull_task_input"} <= set(names)
    assert not {"validate_and_install", "load_app", "extractall", "import_module"} & set(names)

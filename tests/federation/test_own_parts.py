"""Mods of an owner's own, within and around the guard, and an aggregator of a coordinator's own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import ServerApp
from flwr.supercore import object_ref

from srfed.config import FederationConfig
from srfed.deployment.agree import agree, in_words, propose, standing
from srfed.deployment.certificates import make_certificates
from srfed.deployment.site_command import check_before_start
from srfed.federation.agreement import LeastImages
from srfed.federation.flower.client_app import app, guarded_app
from srfed.federation.flower.packing import LAYOUT, read_tensors
from srfed.federation.flower.server_app import run_federation
from srfed.federation.messages import DESCRIBE, FAILED, SHARED, TRAIN
from srfed.federation.mods import package_fingerprint
from srfed.storage.checkpoint import read_checkpoint
from support.agreed_site import CLIENT, AgreedSite, refusal
from support.commands import run_here
from support.errors import message_of
from support.tiny_run import CHEAP, begin
from support.wire import SECRET, RecordingGrid, is_bare_error

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS: dict[str, Any] = CHEAP


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Installs a package ``owners_mods`` with this code in it; gives its file."""
    monkeypatch.syspath_prepend(tmp_path / "installed")

    def install(code: str) -> Path:
        file = tmp_path / "installed" / "owners_mods" / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        sys.modules.pop("owners_mods", None)
        return file

    yield install
    sys.modules.pop("owners_mods", None)


def site_with(folder: Path, *mods: str) -> AgreedSite:
    """A site whose owner has agreed to the tiny run, and to these mods."""
    site = AgreedSite(folder, SETTINGS, agreed=False)
    least = LeastImages(statistics=2, mean=1)
    agreement = propose(site.config, site.data, site.state, CLIENT, least=least, mods=mods)
    agree(agreement, site.config, site.data, site.state)
    return site


# --- Within the guard -----------------------------------------------------------------------------


def test_the_examples_mod_puts_its_noise_on_the_update_and_on_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, noisy = site_with(tmp_path / "a"), site_with(tmp_path / "b", "own_mod:noise")
    (one, other) = (each.ask(TRAIN).content for each in (plain, noisy))
    apart = {
        name: (tensor - read_tensors(one, SHARED)[name]).numpy().ravel()
        for name, tensor in read_tensors(other, SHARED).items()
    }
    noise = np.concatenate(list(apart.values()))
    assert noise.std() == pytest.approx(1e-4, rel=0.05)
    assert abs(noise.mean()) < 6e-4 / noise.size**0.5
    same = [(record.keys(), record[LAYOUT].data) for record in one.array_records.values()]
    assert same == [(record.keys(), record[LAYOUT].data) for record in other.array_records.values()]

    def told(content: Any) -> dict[str, Any]:
        (numbers,) = content.metric_records.values()
        return {key: value for key, value in numbers.items() if key != "seconds"}

    assert told(one) == told(other)
    kept = [
        [file.read_bytes() for file in map(site.state.joinpath, site.stored)]
        for site in (plain, noisy)
    ]
    assert kept[0] == kept[1] != [], "θ_i is what training has left"


def test_flowers_own_mods_are_an_owners_to_name(tmp_path: Path) -> None:
    mods = ["flwr.clientapp.mod:message_size_mod", "own_mod:noise"]
    site = site_with(tmp_path, *mods)
    assert site.ask(TRAIN).has_content()
    found = standing(site.state, CLIENT)
    assert found is not None
    assert [mod.name for mod in found.mods] == [
        "flwr.clientapp.mod:message_size_mod",
        "own_mod:noise",
    ]
    words = in_words(found, site.config)
    assert (
        f"own_mod:noise, of a package with the SHA-256 {package_fingerprint('own_mod:noise')[:12]}"
        in words
    )
    without = found.model_copy(update={"mods": ()})
    assert any("mods.own_mod:noise" in line for line in without.differences(found))


def test_code_that_was_not_agreed_to_never_runs(
    tmp_path: Path, package: Callable[[str], Path]
) -> None:
    file = package(
        "def through(message, context, call_next):\n    return call_next(message, context)\n"
    )
    site = site_with(tmp_path, "owners_mods:through")
    assert site.ask(TRAIN).has_content()
    mark = tmp_path / "ran"
    package(f"open({str(mark)!r}, 'w')\n{file.read_text()}")
    assert refusal(site.ask(TRAIN)) == "not agreed: a mod of this site"
    assert not mark.exists()
    assert "the package of owners_mods:through has the SHA-256" in site.log
    make_certificates(tmp_path, ["localhost"])
    said = message_of(check_before_start, site.state, CLIENT, tmp_path / "ca.crt")
    assert "the package of owners_mods:through has the SHA-256" in said
    assert "agree again with: python -m srfed.deploy agree" in said


ADDS = """
from flwr.app import Array, ArrayRecord, ConfigRecord
import numpy as np
def record(message, context, call_next):
    reply = call_next(message, context)
    reply.content["images"] = ArrayRecord({"x": Array(np.zeros(3, np.float32))})
    return reply
def text(message, context, call_next):
    reply = call_next(message, context)
    reply.content["reply"]["diagnosis"] = "patient-4711"
    return reply
def value(message, context, call_next):
    reply = call_next(message, context)
    (arrays,) = reply.content.array_records.values()
    arrays["float32"] = Array(np.zeros(2 * arrays["float32"].numpy().size, np.float32))
    return reply
def fails(message, context, call_next):
    raise RuntimeError("patient-4711")
def nothing(message, context, call_next):
    return None
"""


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        ("record", "arrays 'images' in a reply to train"),
        ("text", "field ['diagnosis'] in record"),
        ("value", "array 'float32' among"),
        ("fails", f"RuntimeError: {SECRET}"),
        ("nothing", "AttributeError"),
    ],
)
def test_the_guard_checks_what_a_mod_makes_of_a_reply_and_says_why_in_the_sites_log(
    mod: str, expected: str, tmp_path: Path, package: Callable[[str], Path]
) -> None:
    package(ADDS)
    site = site_with(tmp_path, f"owners_mods:{mod}")
    assert is_bare_error(site.ask(TRAIN))
    assert expected in site.log


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_mod", "mod 'own_mod' is impossible; allowed: module:function"),
        ("nowhere.to:be_found", "there is no installed package 'nowhere'"),
        ("own_mod:loud", "own_mod has no function 'loud'"),
        ("own_mod:DEVIATION", "own_mod has no function 'DEVIATION'"),
        ("own_mod.inside:noise", "cannot be imported"),
        ("sys:exit", "there is no installed package 'sys'"),
    ],
)
def test_a_mod_that_is_none_is_not_agreed_to(name: str, expected: str, tmp_path: Path) -> None:
    site = AgreedSite(tmp_path, SETTINGS, agreed=False)
    words = ["--data", site.data, "--state-dir", site.state, "--client-id", CLIENT]
    done = run_here("deploy", "agree", *words, "--mod", name, "--yes")
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert standing(site.state, CLIENT) is None


def test_a_fingerprint_is_of_every_file_of_the_package(
    package: Callable[[str], Path],
) -> None:
    folder = package("def mod(): ...\n").parent
    found = {package_fingerprint("owners_mods:mod")}
    for name, text in (("weights.bin", "1"), ("weights.bin", "2"), ("part/x.py", "2")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        found.add(package_fingerprint("owners_mods.part:mod"))
    (folder / "weights.bin").rename(folder / "renamed.bin")
    found.add(package_fingerprint("owners_mods:mod"))
    assert len(found) == 5
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("compiled")
    assert package_fingerprint("owners_mods:mod") in found


# --- Around the guard -----------------------------------------------------------------------------


def fails_before(message: Message, context: Context, call_next: Any) -> Message:
    raise RuntimeError(SECRET)


def fails_after(message: Message, context: Context, call_next: Any) -> Message:
    call_next(message, context)
    raise RuntimeError(SECRET)


def exits(message: Message, context: Context, call_next: Any) -> Message:
    sys.exit(SECRET)


@pytest.mark.parametrize(
    ("mod", "said"),
    [
        (fails_before, f"RuntimeError: {SECRET}"),
        (fails_after, f"RuntimeError: {SECRET}"),
        (exits, f"srfed.federation.exits.ExitError: SystemExit was raised: {SECRET}"),
    ],
)
def test_a_mod_that_fails_outside_the_guard_leaves_a_line_in_the_sites_log_alone(
    mod: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = AgreedSite(tmp_path, SETTINGS, client_app=guarded_app([mod]))
    for kind in (DESCRIBE, TRAIN):
        reply = site.ask(kind)
        assert is_bare_error(reply)
        assert reply.error.code == FAILED
    assert site.log.count(said) == 2
    assert f"train: {said} (in {site.state / CLIENT / 'client.log'})" in capsys.readouterr().err


def test_a_mod_around_the_guard_sees_what_leaves(tmp_path: Path) -> None:
    seen: list[str] = []

    def marks(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        reply.content["mark"] = ConfigRecord({"by": "owner"})
        seen.append(message.metadata.message_type)
        return reply

    site = AgreedSite(tmp_path, SETTINGS, client_app=guarded_app([marks]))
    assert site.ask(TRAIN).content["mark"]["by"] == "owner"
    assert seen == [TRAIN]
    assert guarded_app([])._registered_funcs.keys() == app._registered_funcs.keys()


# --- An aggregator --------------------------------------------------------------------------------


def test_flower_takes_the_examples_app(tmp_path: Path) -> None:
    assert object_ref.validate("own_aggregator:app", True, tmp_path) == (True, None)
    loaded = object_ref.load_app("own_aggregator:app", ValueError, tmp_path)
    assert isinstance(loaded, ServerApp)


def test_the_examples_aggregator_takes_the_clients_median(tmp_path: Path) -> None:
    from own_aggregator import Median

    average = {**SETTINGS, "federation.rounds": 1, "federation.server_optimizer": "average"}
    run = begin(tmp_path / "run", average)
    grid = RecordingGrid(app, 3, run.clients)
    run_federation(grid, run, fixed=True, aggregator=Median)
    trained = [
        read_tensors(reply.content, SHARED)
        for reply in grid.replies
        if reply.metadata.message_type == TRAIN
    ]
    assert len(trained) == 3
    shared = read_checkpoint(run.server / "round-00001").group("shared")
    means_differ = False
    for name, tensor in shared.items():
        of_clients = np.stack([update[name].numpy() for update in trained])
        np.testing.assert_allclose(tensor.numpy(), np.median(of_clients, axis=0), atol=1e-6)
        means_differ |= not np.allclose(tensor.numpy(), of_clients.mean(axis=0), atol=1e-5)
    assert means_differ


def test_the_median_is_the_same_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    import own_aggregator

    draws = torch.Generator().manual_seed(0)
    start, *updates = ({"a": torch.randn(3, 5, generator=draws)} for _ in range(6))
    monkeypatch.setattr(own_aggregator, "SLICE", 22)  # of four values of five clients
    middle = own_aggregator.Median(FederationConfig(), start)
    for number, update in enumerate(updates):
        middle.add(f"client-{number}", update, 1)
    moved = np.stack([(update["a"] - start["a"]).numpy() for update in updates])
    found = middle.mean().change["a"].numpy()
    np.testing.assert_allclose(found, np.median(moved, axis=0), atol=1e-6)

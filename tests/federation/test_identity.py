"""Clients that are somebody else: impostors, misfits, and whose an id is."""

import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from srfed import __version__
from srfed.deployment.certificates import make_certificates
from srfed.deployment.sites import rebind, sites_in_words
from srfed.errors import UserError
from srfed.federation.flower.client_app import app as real_app
from srfed.federation.flower.identity import ROSTER_FILE, kept_roster, read_roster
from srfed.federation.flower.roster import Expected, Roster
from srfed.federation.flower.server_app import begin_or_go_on
from srfed.federation.messages import DESCRIBE, EVALUATE, REPLY, TRAIN, Description
from srfed.files import write_json
from srfed.keys import key_fingerprint, read_key
from srfed.storage.run_folder import RunFolder
from support.faults import app_with, set_field
from support.membership import (
    ALL,
    MIDDLE,
    SETTINGS,
    SOON,
    WAIT,
    ChangingGrid,
    app_describing,
    failure,
    keep,
    reconfigured,
    start,
)
from support.tiny_run import CLIENTS, all_bits, begin, records, round_lines

pytestmark = pytest.mark.usefixtures("without_pauses")


# --- Impostors and misfits -----------------------------------------------------------------------


def test_a_second_node_of_a_client_is_refused_until_the_first_has_gone(
    tmp_path: Path,
    undisturbed: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.0)
    run = begin(tmp_path / "run", SETTINGS)
    grid = ChangingGrid(
        run, connected=lambda finished: {2, 3, 9} if finished == 2 else {1, 2, 3, 9}
    )
    grid.add_node(9, 0)
    start(run, grid)
    assert (
        capsys.readouterr().err.count("refused node 9: another node is client 'digit-0' already")
        == 1
    )
    assert [sorted(grid.nodes_asked(TRAIN, number)) for number in (1, 2, 3)] == [
        [1, 2, 3],
        [1, 2, 3],
        [2, 3, 9],
    ]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.parametrize("insists", [True, False])
def test_a_node_that_answers_as_another_client_is_refused_and_asked_again_who_it_is(
    tmp_path: Path,
    without: Callable[..., RunFolder],
    capsys: pytest.CaptureFixture[str],
    insists: bool,
) -> None:
    """It may be that two machines have been mixed up for good, or only for a moment."""
    run = begin(tmp_path / "run", SETTINGS)

    def change(node: int, reply: Message) -> None:
        if insists and node == 2 and round_lines(run):
            reply.content.config_records[REPLY]["client"] = "digit-0"

    app = app_with(MIDDLE, train=[keep, set_field("client", "digit-0"), keep])
    grid = ChangingGrid(run, app_describing(change, app))
    start(run, grid)
    second, third = round_lines(run)[1:]
    assert "answers as 'digit-0'" in second["refused"]["digit-1"]
    assert grid.nodes_asked(DESCRIBE).count(2) == 2
    assert grid.nodes_asked(DESCRIBE).count(1) == grid.nodes_asked(DESCRIBE).count(3) == 1
    told = "refused node 2: another node is client 'digit-0' already" in capsys.readouterr().err
    if insists:
        assert told
        assert third["missing"] == {"digit-1": "not connected"}
        assert 2 not in grid.nodes_asked(TRAIN, 3)
        assert all_bits(run) == all_bits(without(MIDDLE, 2, 3))
    else:
        assert not told
        assert third["accepted"] == CLIENTS
        assert all_bits(run) == all_bits(without(MIDDLE, 2))


MISFITS: dict[int, tuple[str, Any, str]] = {
    4: ("version", "0.0.1", "client 'digit-3': it runs srfed '0.0.1'"),
    5: ("channels", 99, "node 5: its number 'channels' is 99, not a whole number from 1 to 16"),
    6: ("partition", "0" * 64, "client 'digit-5': it divides the model differently"),
    7: ("client", "../digit-6", "node 7: '../digit-6' is no name for a store"),
    8: ("images", "many", "node 8: it describes itself in another way"),
    9: ("client", "clinic", "client 'clinic': the server's reference images have no such task"),
}


def test_clients_that_do_not_fit_are_refused_one_by_one_and_the_others_run(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(node: int, reply: Message) -> None:
        if node in MISFITS:
            name, value, _ = MISFITS[node]
            reply.content.config_records[REPLY][name] = value

    run = begin(tmp_path / "run", SETTINGS)
    grid = ChangingGrid(run, app_describing(change), connected=lambda _: [*range(1, 10)])
    for node in MISFITS:
        grid.add_node(node, node - 1)
    start(run, grid)
    err = capsys.readouterr().err
    assert [err.count(f"refused {reason}") for _, _, reason in MISFITS.values()] == [1] * len(
        MISFITS
    )
    assert set(grid.nodes_asked(TRAIN)) | set(grid.nodes_asked(EVALUATE)) == ALL
    assert all_bits(run) == all_bits(undisturbed)
    assert records(run) == records(undisturbed)


def test_a_misfit_that_is_mended_takes_part(
    tmp_path: Path, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.3)
    asked: list[float] = []

    def change(node: int, reply: Message) -> None:
        if node == 2:
            asked.append(time.monotonic())
            if len(asked) < 3:
                reply.content.config_records[REPLY]["version"] = "0.0.1"

    run = begin(tmp_path / "run", SETTINGS)
    start(run, ChangingGrid(run, app_describing(change)))
    assert np.diff(asked).min() >= 0.3
    assert len(asked) == 3
    assert all_bits(run) == all_bits(undisturbed)


# --- Keys ----------------------------------------------------------------------------------------

RIGHTFUL, IMPOSTOR = 1, 9

AT = "2026-01-01T00:00:00+00:00"

LATER = "2026-01-01T00:01:00+00:00"


class KeyedGrid(ChangingGrid):
    """Nodes with public keys, as a SuperLink tells them; node 9 comes as the first client too.

    Args:
        run: the run.
        connected: as for any changing grid.
        activated: when nodes connected; they were registered at ``AT``.
        keys: of the nodes, where not each has its own.
    """

    def __init__(
        self,
        run: RunFolder,
        connected: Callable[[int], Collection[int]] = lambda _: {1, 2, 3, IMPOSTOR},
        activated: str = LATER,
        keys: dict[int, bytes] | None = None,
        app: ClientApp = real_app,
    ) -> None:
        super().__init__(run, app, connected)
        self.add_node(IMPOSTOR, 0)
        self._activated = activated
        self._keys = keys or {}

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(
                node_id=node,
                public_key=self._keys.get(node, b"key %d" % node),
                registered_at=AT,
                last_activated_at=self._activated,
            )
            for node in self.get_node_ids()
        ]


def impostor_while_away(looks: int) -> Callable[[int], Collection[int]]:
    """After round 1 the rightful node is away for some looks, and another one that says it is that
    client is there.
    """
    return away_then_back(looks, {2, 3, IMPOSTOR}, {1, 2, 3, IMPOSTOR})


def away_then_back(
    looks: int, meanwhile: Collection[int], afterwards: Collection[int]
) -> Callable[[int], Any]:
    left = [looks]

    def connected(finished: int) -> Collection[int]:
        if not finished:
            return ALL
        left[0] -= 1
        return meanwhile if left[0] >= 0 else afterwards

    return connected


@pytest.fixture
def asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srfed.federation.flower.roster.ASK_AGAIN_SECONDS", 0.0)


@pytest.mark.usefixtures("asked_at_once")
def test_a_client_id_belongs_to_the_key_that_first_held_it(
    tmp_path: Path, undisturbed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = KeyedGrid(run, impostor_while_away(20))
    start(run, grid)
    notice = f"refused node {IMPOSTOR}: client 'digit-0' belongs to another SuperNode key, SHA256:"
    assert capsys.readouterr().err.count(notice) == 1
    assert IMPOSTOR not in {*grid.nodes_asked(TRAIN), *grid.nodes_asked(EVALUATE)}
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_where_nodes_make_their_own_keys_a_client_may_come_back_with_another(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    """A SuperNode without authentication has a new key in each process; that must not lock its
    owner out.
    """
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    grid = KeyedGrid(run, impostor_while_away(20), activated=AT)
    start(run, grid)
    assert sorted(grid.nodes_asked(TRAIN, 3)) == [2, 3, IMPOSTOR]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_a_key_keeps_its_id_at_another_node_and_takes_it_back_from_nobody(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    """A SuperLink that has lost its database gives the same key another node."""
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    connected = away_then_back(20, {2, 3}, {2, 3, IMPOSTOR})
    grid = KeyedGrid(run, connected, keys={IMPOSTOR: b"key 1"})
    start(run, grid)
    assert sorted(grid.nodes_asked(TRAIN, 3)) == [2, 3, IMPOSTOR]
    assert all_bits(run) == all_bits(undisturbed)


@pytest.mark.usefixtures("asked_at_once")
def test_the_key_is_remembered_beyond_the_server_until_the_run_is_told_to_forget_it(
    tmp_path: Path, undisturbed: RunFolder
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT, "federation.rounds": 1})
    start(run, KeyedGrid(run, lambda _: ALL))
    run = reconfigured(run, {**WAIT, "federation.join_timeout": SOON})
    moved = partial(KeyedGrid, connected=lambda _: {2, 3, IMPOSTOR})
    text = failure(lambda: start(run, moved(run)))
    assert f"node {IMPOSTOR}: client 'digit-0' belongs to another SuperNode key" in text
    shown = sites_in_words(run.path, None)
    assert key_fingerprint(b"key 1") in shown
    assert "evaluation 1" in shown
    with pytest.raises(
        UserError, match="knows no client 'digit-9'; it has digit-0, digit-1, digit-2"
    ):
        rebind(run.path, "digit-9")
    assert key_fingerprint(b"key 1") in rebind(run.path, "digit-0")
    start(run, moved(run))
    assert all_bits(run) == all_bits(undisturbed)
    assert key_fingerprint(b"key %d" % IMPOSTOR) in sites_in_words(run.path, None)


@pytest.mark.usefixtures("asked_at_once")
def test_a_roster_says_whose_the_ids_are(tmp_path: Path, undisturbed: RunFolder) -> None:
    """Also where the impostor is the first to come."""
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    keys = {f"digit-{index}": key_fingerprint(b"key %d" % (index + 1)) for index in range(3)}
    write_json(run.path / ROSTER_FILE, {"keys": keys})
    looks = [0]

    def connected(_: int) -> Collection[int]:
        looks[0] += 1
        return {2, 3, IMPOSTOR} if looks[0] < 20 else {1, 2, 3, IMPOSTOR}

    grid = KeyedGrid(run, connected)
    start(run, grid)
    assert IMPOSTOR not in {*grid.nodes_asked(TRAIN), *grid.nodes_asked(EVALUATE)}
    assert all_bits(run) == all_bits(undisturbed)


def test_who_is_not_in_the_roster_does_not_take_part(tmp_path: Path) -> None:
    run = begin(
        tmp_path / "run", {**SETTINGS, "federation.join_timeout": SOON, "federation.min_clients": 3}
    )
    keys = {f"digit-{index}": key_fingerprint(b"key %d" % (index + 1)) for index in range(2)}
    write_json(run.path / ROSTER_FILE, {"keys": keys})
    text = failure(lambda: start(run, KeyedGrid(run, lambda _: ALL)))
    assert "2 of 3 clients can take part" in text
    assert "client 'digit-2' is not in the run's roster" in text


def test_a_roster_file_is_read_as_public_keys_or_refused_in_one_line(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["a", "b"])
    lines = {site: (tmp_path / f"site-{site}.pub").read_text().strip() for site in "ab"}
    file = tmp_path / "roster.yaml"
    file.write_text(f"clinic-a: {lines['a']}\nclinic-b: {lines['b']}\n")
    printed = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "site-a.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert read_roster(file)["clinic-a"] in printed
    for text, expected in (
        ("clinic-a: nothing", "clinic-a: this is no public key"),
        (f"a: {lines['a']}\nb: {lines['a']}", "has the key of another client"),
        ("just words", "is no roster"),
        ("a: [", "is not valid YAML"),
    ):
        file.write_text(text)
        assert expected in failure(lambda: read_roster(file))
    assert "cannot read" in failure(lambda: read_roster(tmp_path / "none.yaml"))


def test_a_run_keeps_the_roster_that_it_is_given(tmp_path: Path) -> None:
    make_certificates(tmp_path, [], ["a"])
    file = tmp_path / "roster.yaml"
    file.write_text(f"clinic-a: {(tmp_path / 'site-a.pub').read_text()}")
    values = {"run-dir": str(tmp_path / "run"), "config": "", "set": ""}
    for roster in (str(file), ""):  # named once
        context = Context(0, 0, {}, RecordDict(), {**values, "roster": roster})
        assert kept_roster(begin_or_go_on(context).path) == {
            "clinic-a": read_key(tmp_path / "site-a.pub")
        }


def test_a_client_that_was_refused_meanwhile_can_be_doubted(tmp_path: Path) -> None:
    """It was asked to train, asked who it is, refused, and only then answered as somebody else."""
    run = begin(tmp_path / "run", SETTINGS)
    expected = Expected("", None)
    roster = Roster(
        ChangingGrid(run),
        run.config,
        run.lineage,
        expected,
        lambda _member: None,
        lambda _text: None,
    )
    roster.recheck("digit-0")
    assert roster.present == []


def test_a_site_that_may_choose_its_images_shape_keeps_it(tmp_path: Path) -> None:
    free = {**SETTINGS, "data.dataset": "sites", "evaluation.mode": "statistics"}
    grey = {**free, "data.channels": 1}

    def refusal(settings: Mapping[str, Any], shape: tuple[int, int, int]) -> str:
        run = begin(tmp_path / f"{len(settings)}-{'x'.join(map(str, shape))}", settings)
        expected = Expected("", None, shapes={"clinic": (9, 12, 3)})
        roster = Roster(
            ChangingGrid(run), run.config, run.lineage, expected, lambda _: None, lambda _: None
        )
        about = Description("clinic", "clinic", -1, *shape, 20, 5, "", __version__)
        try:
            roster._check_shape(about)
        except UserError as error:
            return str(error)
        return ""

    assert refusal(free, (9, 12, 3)) == ""
    assert "9x13x3, and were 9x12x3 when it joined; if that is meant" in refusal(free, (9, 13, 3))
    assert "its images are 9x12x3, this run's are 9x12x1" in refusal(grey, (9, 12, 3))


def test_a_client_that_comes_back_with_other_images_is_refused_until_the_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of its images is its weight, and the length of its round: nobody changes it in
    between.
    """
    run = begin(tmp_path / "run", {**SETTINGS, "federation.rounds": 1})
    start(run)

    def change(node: int, reply: Message) -> None:
        if node == 2:
            reply.content.config_records[REPLY]["images"] = 10**9

    run = reconfigured(run, {"federation.rounds": 2, "federation.join_timeout": SOON})
    start(run, ChangingGrid(run, app_describing(change)))
    assert "client 'digit-1': it has 1000000000 training and" in capsys.readouterr().err
    assert round_lines(run)[1]["accepted"] == ["digit-0", "digit-2"]

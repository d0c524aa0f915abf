"""Nobody waits in silence: whom the server waits for, why a site is refused, and what a site's own
log says.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from srfed.federation.flower import roster
from srfed.federation.flower.roster import Expected
from srfed.federation.messages import DESCRIBE, REPLY
from srfed.federation.site import Site
from srfed.federation.site_log import write_to_log
from srfed.storage.run_folder import RunFolder
from srfed.units import printable
from support.membership import (
    SETTINGS,
    SOON,
    WAIT,
    ChangingGrid,
    app_describing,
    away_for,
    failure,
    start,
)
from support.tiny_run import begin, round_lines, tiny_config


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "LOOKS_APART", "ASK_AGAIN_SECONDS"):
        monkeypatch.setattr(f"srfed.federation.flower.roster.{name}", 0.0)
    for room in ("roster", "exchange"):
        monkeypatch.setattr(f"srfed.federation.flower.{room}.TELL_SECONDS", 0.1)


def as_deployed(node: int, reply: Message) -> None:
    reply.content.config_records[REPLY]["index"] = -1


def test_a_refused_site_reads_why_in_its_own_log(tmp_path: Path) -> None:
    def change(node: int, reply: Message) -> None:
        if node == 9:
            reply.content.config_records[REPLY]["version"] = "0.0.1"

    run = begin(tmp_path / "run", SETTINGS)
    grid = ChangingGrid(run, app_describing(change), connected=lambda _: [1, 2, 3, 9])
    grid.add_node(9, 3)
    start(run, grid)
    assert grid.nodes_asked(DESCRIBE).count(9) > 2
    log = (run.clients / "digit-3" / "client.log").read_text()
    assert log.count("it runs srfed '0.0.1', this server '") == 1, "once, however often it is asked"
    assert "refused by the server" in log
    assert not (run.clients / "digit-0" / "client.log").exists()


class SilentGrid(ChangingGrid):
    """A SuperNode that is online and answers nothing."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        heard = [
            i
            for i in message_ids
            if i in self._waiting and self._waiting[i].metadata.dst_node_id != 2
        ]
        return super().pull_messages(heard)


def test_a_waiting_server_says_for_whom_and_how_long(
    undisturbed: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(
        tmp_path / "run", {**SETTINGS, "federation.min_clients": 3, "federation.join_timeout": SOON}
    )
    text = failure(lambda: start(run, SilentGrid(run)))
    assert re.search(r"\d of 3 clients can take part .*; connected and silent: node 2", text)
    assert re.search(
        r"waiting for \d more \(here: .*\), for \ds more; connected", capsys.readouterr().err
    )

    # A run that goes on knows the names.
    run = RunFolder.open(Path(shutil.copytree(undisturbed.path, tmp_path / "other")))
    run = run.reconfigure(
        tiny_config(
            {
                **SETTINGS,
                "federation.rounds": 4,
                "federation.min_clients": 3,
                "federation.join_timeout": SOON,
            }
        )
    )
    text = failure(lambda: start(run, ChangingGrid(run, connected=lambda _: {1, 3})))
    assert "silent: node 2" not in text
    assert re.search(r"waiting for .*digit-1.* \(here: .*\), for \ds more", capsys.readouterr().err)


def test_a_round_that_waits_names_the_sites_that_have_not_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **WAIT})
    # Away for about a second, ten times as long as the server waits until it says so.
    start(run, ChangingGrid(run, app_describing(as_deployed), connected=away_for(20, after=1)))
    said = capsys.readouterr().err
    assert re.search(
        r"round 2: waiting for (.* and )?digit-2 \(not connected: start that site\)", said
    )
    assert len(round_lines(run)) == 3


class Clock:
    """Stands still but for what a grid takes."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.worked


@pytest.mark.parametrize(("works", "later"), [(0.0, 1.0), (0.02, 1.0), (3.0, 30.0)])
def test_a_look_that_takes_much_work_is_taken_seldom_and_one_that_only_waits_is_not(
    works: float, later: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = Clock(), []

    class SlowGrid(ChangingGrid):
        def get_nodes(self) -> Any:
            looks.append(clock.now)
            # A SuperLink that does not answer for a minute.
            clock.now, clock.worked = clock.now + 60, clock.worked + works
            return []

    monkeypatch.setattr(roster, "time", clock)
    for name, value in (("LOOK_SECONDS", 1.0), ("LOOKS_APART", 10)):
        monkeypatch.setattr(roster, name, value)
    run = begin(tmp_path / "run", SETTINGS)
    others = roster.Roster(
        SlowGrid(run), run.config, run.lineage, Expected("", None), lambda _: None, lambda _: None
    )
    others.look()
    for after in (later - 0.5, later + 0.5):
        clock.now = after
        others.look()
    assert looks == [0.0, later + 0.5]


# --- The site's own log --------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site("a", tmp_path, data=tmp_path)
    write_to_log(site, "train", "Traceback\n  a line\nValueError: the reason")
    assert "  a line\n  ValueError: the reason\n" in site.log.read_text()
    assert capsys.readouterr().err == f"train: ValueError: the reason (in {site.log})\n"
    site.log.unlink()
    site.log.symlink_to("/dev/full")
    write_to_log(site, "train", "Traceback\n  a line\nValueError: the reason")
    assert "train\nTraceback\n  a line\nValueError: the reason\n" in capsys.readouterr().err
    write_to_log(None, "train", "ValueError: no site")
    assert "ValueError: no site\n" in capsys.readouterr().err
    # A simulation's terminal belongs to its rounds.
    write_to_log(Site("b", tmp_path), "train", "ValueError: the reason")
    assert capsys.readouterr().err == ""


def test_what_a_server_says_cannot_disturb_a_terminal() -> None:
    assert printable("so\x1b[2Jmuch\nof it\u202e") == "so [2Jmuch of it"
    assert len(printable("x" * 5000)) == 200

"""Two versions of srfed in one federation: a patch apart they work together, else one refuses the
other in words.
"""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from srfed import __version__
from srfed.federation.messages import REPLY, works_together
from srfed.storage.run_folder import RunFolder
from support.membership import SOON, ChangingGrid, app_describing, failure, start
from support.tiny_run import CHEAP, begin, round_lines

SETTINGS: dict[str, Any] = {
    **CHEAP,
    "federation.rounds": 1,
    "federation.join_timeout": SOON,
    "evaluation.memorisation_quantile": 0,
}


@pytest.mark.parametrize(
    ("theirs", "ours", "together"),
    [
        ("0.1.0", "0.1.0", True),
        ("0.1.7", "0.1.0", True),
        ("0.1.0", "0.1.12", True),
        ("0.2.0", "0.1.0", False),
        ("1.1.0", "0.1.0", False),
        ("0.1.0.dev1", "0.1.0.dev1", True),
        ("0.1.0.dev1", "0.1.0", False),
        ("0.1.0.dev1", "0.1.0.dev2", False),
        ("0.1", "0.1.0", False),
        ("", "0.1.0", False),
        ("\u0660.\u0661.\u0660", "0.1.0", False),
    ],
)
def test_the_last_number_alone_may_differ(theirs: str, ours: str, together: bool) -> None:
    assert works_together(theirs, ours) is together


def patched(number: int) -> str:
    """This version with another last number."""
    return f"{__version__.rpartition('.')[0]}.{number}"


def run_with(version: str, run: RunFolder) -> ChangingGrid:
    """A federation whose second site says that it runs this version."""

    def change(node: int, reply: Message) -> None:
        if node == 2:
            reply.content.config_records[REPLY]["version"] = version

    return ChangingGrid(run, app_describing(change))


def test_a_site_of_another_patch_takes_part_and_the_server_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    start(run, run_with(patched(7), run))
    assert round_lines(run)[0]["accepted"] == ["digit-0", "digit-1", "digit-2"]
    said = capsys.readouterr().err
    assert said.count(f"digit-1 runs srfed {patched(7)}, this server {__version__}") == 1


def test_a_site_of_another_version_is_refused_in_words(
    tmp_path: Path,
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, "federation.min_clients": 3})
    text = failure(lambda: start(run, run_with("99.0.0", run)))
    expected = (
        f"client 'digit-1': it runs srfed '99.0.0', this server '{__version__}'; allowed: versions "
        "that differ in their last number alone"
    )
    assert expected in text
    assert not round_lines(run)

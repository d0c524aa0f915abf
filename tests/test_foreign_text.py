"""Whatever a peer or a file wrote reaches terminals, logs and records printable, and cut."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from srfed.data.folder import describe_listings, list_images
from srfed.errors import UserError
from srfed.federation.agreement import RequestRefusedError
from srfed.federation.messages import Failure
from srfed.federation.screening import RefusedError, reason_of_failure
from srfed.federation.site import Site
from srfed.federation.site_log import write_to_log
from srfed.units import escaped
from support.commands import run_here
from support.images import random_images, save

CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160)])) + "\u2028\u2029\u202e\u200b\ufeff"
HOSTILE = f"\x1b[2J\x1b]0;owned\x07{CONTROLS}\n2026-01-01T00:00:00+00:00 refused: a forged line"


def of_user_error(folder: Path, text: str) -> str:
    return str(UserError(f"cannot read {text}: no such file"))


def of_refused_request(folder: Path, text: str) -> str:
    refused = RequestRefusedError(f"the request has {text}", f"asked for {text}")
    return f"{refused} {refused.detail}"


def of_refused_reply(folder: Path, text: str) -> str:
    return str(RefusedError(f"tensor {text} is another"))


def of_flower_error(folder: Path, text: str) -> str:
    return reason_of_failure(Failure(2, text))


def of_log(folder: Path, text: str) -> str:
    site = Site("a", folder)
    write_to_log(site, f"train{text}", f"failed: {text}")
    first, *others = site.log.read_text().splitlines()
    assert all(line.startswith("  ") for line in others), "an entry has one line that begins one"
    return "".join([first, *others])


def of_terminal_without_a_site(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    write_to_log(None, f"train{text}", f"failed: {text}")
    return "".join(capsys.readouterr().err.split("\n"))


def of_yaml_key(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    written = "".join(f"\\u{ord(letter):04x}" for letter in text[:300])
    file.write_text(f'training: {{"{written}": 1}}\n"{written}": 2\n')
    done = run_here("partition", "--config", file)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr.rstrip("\n")


def of_file_name(folder: Path, text: str) -> str:
    pictures = folder / "pictures"
    save(pictures / "a.png", random_images(8, 8))
    (pictures / text.replace("/", "")[:80]).write_text("no picture")
    return "".join(describe_listings([list_images(pictures)]))


DOORS = [
    of_user_error,
    of_refused_request,
    of_refused_reply,
    of_flower_error,
    of_log,
    of_yaml_key,
    of_file_name,
]


@pytest.mark.parametrize("door", DOORS)
def test_no_control_character_gets_through(
    door: Callable[[Path, str], str], tmp_path: Path
) -> None:
    said = door(tmp_path, HOSTILE)
    assert said.isprintable(), said
    assert not re.search(r"(?m)^2026-01-01", said)


def test_nor_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert of_terminal_without_a_site(tmp_path, HOSTILE, capsys).isprintable()


@pytest.mark.parametrize("door", [*DOORS[:5], of_yaml_key])
def test_a_text_of_5_mb_is_cut(door: Callable[[Path, str], str], tmp_path: Path) -> None:
    assert len(door(tmp_path, "x" * 5_000_000)) < 4500


def test_of_a_long_sentence_the_end_stays() -> None:
    said = escaped("cannot read " + "x" * 10_000 + "; allowed: a file")
    assert said.startswith("cannot read x")
    assert said.endswith("; allowed: a file")
    assert len(said) == 2000

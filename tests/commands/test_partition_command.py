"""The partition command: what it prints adds up to what the model has."""

import re

import pytest

from srfed.commands.partition import main
from srfed.config import load_config
from srfed.model import build_model
from srfed.units import bytes_in_words


@pytest.mark.parametrize(
    "rule", ["none", "io", "1", "2", "4", "all", "[up.0, down.0.blocks.0.conv_in, timestep.mix]"]
)
def test_modules_and_totals_add_up(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    override = f"model.exclusive_stages={rule}"
    assert main(["--image-channels", "3", "--set", override]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S+) +(shared|exclusive) +([\d,]+)$", printed, re.MULTILINE)
    counts = {"shared": 0, "exclusive": 0}
    for _, part, count in rows:
        counts[part] += int(count.replace(",", ""))
    model = build_model(load_config(None, [override]), 3)
    assert sum(counts.values()) == sum(tensor.numel() for tensor in model.state_dict().values())
    for part, total in counts.items():
        assert re.search(rf"^{part} .* {total:,} parameters", printed, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows)


def test_owned_parts_are_listed_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.exclusive_stages=io", "model.owned=[vector, film]"]
    assert main(["--image-channels", "1", "--set", settings[0], "--set", settings[1]]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("exclusive stages io, own vector and film\n")
    rows = re.findall(r"^(\S+) +(shared|exclusive) +([\d,]+)$", printed, re.MULTILINE)
    own = [(name, int(count)) for name, part, count in rows if part == "exclusive"]
    assert [name for name, _ in own if "film" not in name] == ["stem", "head", "task_vector"]
    films = dict(own)
    assert films["down.0.blocks.0.film"] == 2 * 32
    assert films["bottleneck.second.film"] == 2 * 64
    # A film divides nothing that is around it.
    assert {name for name, part, _ in rows if part == "shared"} == {
        "timestep",
        "bottleneck",
        *(f"{side}.{stage}" for side in ("down", "up") for stage in range(4)),
    }
    total = sum(int(count.replace(",", "")) for _, part, count in rows if part == "exclusive")
    assert re.search(rf"^exclusive .* {total:,} parameters", printed, re.MULTILINE)


@pytest.mark.parametrize("bits", ["null", "8"])
def test_a_round_carries_what_the_steps_and_control_variates_make_of_it(
    bits: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four bytes a parameter of φ down, twice with c; up one byte, twice with c_i, and four bytes a
    tensor for the scales; down as much where φ and c come in codes too.
    """
    settings = ["updates.steps=[quantise]", "training.control_variates=true"]
    settings.append(f"updates.shared_bits={bits}")
    assert main([word for text in settings for word in ("--set", text)]) == 0
    words = capsys.readouterr().out
    found = re.search(r"\(φ\) +(\d+) parameters in (\d+)", words.replace(",", ""))
    assert found
    shared, tensors = map(int, found.groups())
    up = 2 * (shared + 4 * tensors)
    down = 8 * shared if bits == "null" else up
    back = bytes_in_words(up) if bits == "null" else "as much"
    assert (
        f"{bytes_in_words(down)} to each client and {back} back; with 10 clients "
        f"{bytes_in_words(10 * (down + up))} in all"
    ) in words


def test_a_round_carries_four_bytes_a_shared_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image-channels", "1", "--set", "model.exclusive_stages=io"]) == 0
    assert "4.7 MB to each client" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "model.exclusive_stages=[no.such.module]"], "no.such.module"),
        (["--image-channels", "0"], "--image-channels 0"),
        (["--set", "data.dataset=mnist", "--data-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error

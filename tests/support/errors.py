"""What a user is told."""

from typing import Any

import pytest

from srfed import simulate
from srfed.errors import UserError


def message_of(call: Any, *arguments: Any) -> str:
    """The text of the UserError that the call raises; always one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def one_error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert simulate.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]

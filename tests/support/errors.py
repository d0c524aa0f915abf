"""What a user is told."""

from typing import Any

import pytest

from srfed.errors import UserError


def message_of(call: Any, *arguments: Any) -> str:
    """The text of the UserError that the call raises; always one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text

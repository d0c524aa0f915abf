"""What libraries change in this process as they load or begin: variables, warning filters."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Put the environment and the filters of warnings back to what they were before."""
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)

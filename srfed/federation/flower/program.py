"""Flower's ``flwr-clientapp`` as a site runs it: ``python -m srfed.federation.flower.program``.

It is Flower's own in every respect but two. The archive that the SuperLink hands out is looked at
(:mod:`srfed.federation.flower.archive`), and nothing of it is unpacked. And what answers is the
ClientApp of the srfed that is installed, whatever the archive calls it; or a refusal.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message
from flwr.supernode.cli import flwr_clientapp

from srfed.federation.flower.archive import ForeignArchiveError, check_archive
from srfed.federation.flower.client_app import app
from srfed.federation.flower.shim import CLIENT_APP
from srfed.federation.messages import REFUSED
from srfed.federation.site import deployed_site

REFUSAL = "the app that was handed out is not srfed's: it may hold configurations, and no code"
_RUNNER = "flwr.supernode.runtime.run_clientapp"
"""Flower's module whose functions are replaced."""

Answer = Callable[..., Message]


def main() -> None:
    """Answer a message as Flower's program does; see there for arguments and exit codes."""
    sys.argv[0] = CLIENT_APP
    replace_parts()
    flwr_clientapp()


def replace_parts() -> None:
    """Put what is ours in the place of what Flower's program unpacks and loads.

    Raises:
        RuntimeError: this Flower's program has other parts; nothing is run then.
    """
    judged = _Judged()
    runner = import_module(_RUNNER)
    ours = {"install_from_fab": judged.look, "get_load_client_app_fn": judged.loader}
    for name, part in ours.items():
        if not callable(getattr(runner, name, None)):
            raise RuntimeError(f"{_RUNNER} has no {name}: this Flower is of another version")
        setattr(runner, name, part)


class _Judged:
    """The one archive of this process, and what answers for it."""

    def __init__(self) -> None:
        # Whatever Flower does, an archive that nobody has looked at is answered with a refusal.
        self._answer: Answer = refusing("it was not looked at")

    def look(self, content: bytes, **_options: Any) -> None:
        """In place of unpacking."""
        try:
            check_archive(content)
        except ForeignArchiveError as error:
            self._answer = refusing(str(error))
        else:
            self._answer = app

    def loader(self, **_options: Any) -> Callable[..., Answer]:
        """In place of what imports the app that an archive names."""
        return lambda *_names: self._answer


def refusing(reason: str) -> Answer:
    """What answers for an archive that is not run: with a refusal, and one line in the site's own
    log.
    """

    def answer(message: Message, context: Context) -> Message:
        line = f"refused: the app that was handed out: {reason}"
        # Where it goes wrong with the log, the refusal goes out all the same.
        try:
            deployed_site(context.node_config).note(line)
        except Exception as error:
            line += f" (not in the log: {error})"
        print(line, file=sys.stderr, flush=True)
        return Message(Error(REFUSED, REFUSAL), reply_to=message)

    return answer


if __name__ == "__main__":
    main()

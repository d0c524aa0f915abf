"""Flower's ``flwr-clientapp`` as a site runs it: ``python -m srfed.federation.flower.program``.

It is Flower's own in every respect but three. The archive that the SuperLink hands out is looked at
(:mod:`srfed.federation.flower.archive`), and nothing of it is unpacked. What answers is the
ClientApp of the srfed that is installed, whatever the archive calls it; or a refusal. And where
Flower's own steps fail, around the app and its guard, the exception's text stays at the site.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message
from flwr.supernode.cli import flwr_clientapp

from srfed.federation.flower.archive import ForeignArchiveError, check_archive
from srfed.federation.flower.client_app import app
from srfed.federation.flower.guard import FAILURE
from srfed.federation.flower.shim import CLIENT_APP
from srfed.federation.messages import FAILED, LOST_STORE, REFUSED
from srfed.federation.site import deployed_site

REFUSAL = "the app that was handed out is not srfed's: it may hold configurations, and no code"
OWN_ERRORS = (FAILED, REFUSED, LOST_STORE)
"""Codes of what srfed itself answers, in words of its own."""
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
    for name in ("install_from_fab", "get_load_client_app_fn", "push_message"):
        if not callable(getattr(runner, name, None)):
            raise RuntimeError(f"{_RUNNER} has no {name}: this Flower is of another version")
    ours = {
        "install_from_fab": judged.look,
        "get_load_client_app_fn": judged.loader,
        "push_message": _without_texts(runner.push_message),
    }
    for name, part in ours.items():
        setattr(runner, name, part)


def _without_texts(push: Callable[..., None]) -> Callable[..., None]:
    """In place of what sends a reply: an error that Flower has made of an exception says that there
    was one, and the site's log what it was.
    """

    def pushed(client: Any, message: Message, context: Context, **options: Any) -> None:
        if message.has_error() and message.error.code not in OWN_ERRORS:
            told = _noted(context, f"failed outside the app: {message.error.reason}")
            print(told, file=sys.stderr, flush=True)
            message.error = Error(FAILED, FAILURE)
        push(client, message, context, **options)

    return pushed


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
        line = _noted(context, f"refused: the app that was handed out: {reason}")
        print(line, file=sys.stderr, flush=True)
        return Message(Error(REFUSED, REFUSAL), reply_to=message)

    return answer


def _noted(context: Context, line: str) -> str:
    """Put a line into the site's own log; returns it, with why where that has failed."""
    # Where it goes wrong with the log, the answer goes out all the same.
    try:
        deployed_site(context.node_config).note(line)
    except Exception as error:
        line += f" (not in the log: {error})"
    return line


if __name__ == "__main__":
    main()

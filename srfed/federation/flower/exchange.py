"""One bounded exchange of messages: every client is asked, whoever answers in time is heard.

A client that is not there, or whose answer is an error, can be asked again until the time is up.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import Message

from srfed.federation.flower.packing import message_bytes

POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 0.5
"""Looks for replies become rarer while none comes: each one costs a SuperLink some work."""
TELL_SECONDS = 60.0
"""Time until it is first said for whom the server waits; doubled every time."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a client is asked again; doubled every time, up to the longest."""
MOST_DEATHS = 3
"""Processes that may die over one request to a simulated client: what kills so many, such as too
little memory, would kill every other one.
"""

stop_requested = threading.Event()
"""Set by a command's signal handler; the server then stops between two replies."""


@runtime_checkable
class Simulated(Protocol):
    """A grid whose clients this process runs itself."""

    @property
    def at_once(self) -> int:
        """How many clients can be at work at once."""

    def wait(self, seconds: float) -> None:
        """Return when there may be a reply, at the latest after so many seconds."""


class StoppedError(Exception):
    """The user asked the run to stop."""


class Post(Protocol):
    """What an exchange needs of a Flower grid."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; an id of each that is taken."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come."""


@dataclass
class Exchange:
    """Who was asked and who has answered.

    Attributes:
        asked, answered: the clients.
        bytes_up, bytes_down: of every message, with those that were repeated.
    """

    asked: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class _Turn:
    """When a client is to be asked next, and the pause after that."""

    due: float
    pause: float = FIRST_PAUSE

    def postpone(self, now: float) -> None:
        self.due, self.pause = now + self.pause, min(2 * self.pause, LONGEST_PAUSE)


def exchange(
    grid: Post,
    clients: Iterable[str],
    make: Callable[[str], Message],
    hear: Callable[[str, Message], None],
    timeout: float,
    *,
    window: int | None = None,
    ready: Callable[[str], bool] = lambda client: True,
    again: Callable[[str, Message | None], bool] = lambda client, reply: False,
    heard: Callable[[int, int], None] = lambda done, total: None,
    idle: Callable[[], object] = lambda: None,
    waits: Callable[[list[str], float], None] = lambda clients, left: None,
) -> Exchange:
    """Ask clients and wait for their replies, at most ``timeout`` seconds.

    Replies are heard in the order of ``clients``: one that comes before its turn is kept until
    then, and no other is kept at all.

    Args:
        grid: any Flower grid, or what speaks to one.
        clients: whom to ask.
        make: the request to a client, made anew whenever it is asked.
        hear: takes the reply of a client.
        timeout: seconds; a reply that comes later is ignored, now and for ever.
        window: how many clients may be asked beyond the first whose reply is not heard yet, itself
            included, which bounds what is kept; None asks all at once.
        ready: whether a client can be asked now; one that cannot is asked later.
        again: whether a reply is to be forgotten and the client asked again; None stands for a
            request that could not be delivered.
        heard: told (replies so far, clients) after each reply.
        idle: called between two looks for replies.
        waits: told now and then (clients without a reply, seconds left) while there are any.

    Raises:
        StoppedError: the user asked to stop.
    """
    outcome = Exchange()
    start = time.monotonic()
    order = list(clients)
    turns = {client: _Turn(start) for client in order}
    waiting: dict[str, str] = {}
    early: dict[str, Message] = {}
    place = 0
    poll = POLL_SECONDS
    wait = grid.wait if isinstance(grid, Simulated) else time.sleep
    tell, pause = start + TELL_SECONDS, TELL_SECONDS
    while turns or waiting:
        if stop_requested.is_set():
            raise StoppedError
        last = len(order) if window is None else place + window
        for client in order[place:last]:
            turn = turns.get(client)
            if turn is None or turn.due > time.monotonic() or not ready(client):
                continue
            message = make(client)
            outcome.asked.add(client)
            # A message that the SuperLink does not take has no id.
            if message_id := next(iter(grid.push_messages([message])), None):
                outcome.bytes_down += message_bytes(message)
                waiting[message_id] = client
                turn.due = math.inf
            elif again(client, None):
                turn.postpone(time.monotonic())
            else:
                del turns[client]
        arrived = list(grid.pull_messages(list(waiting))) if waiting else []
        if time.monotonic() > start + timeout:
            break
        for reply in arrived:
            # An error reply that a SuperLink makes does not come from the client's node, so replies
            # are matched by the message they answer.
            client_of_reply = waiting.pop(reply.metadata.reply_to_message_id, None)
            if client_of_reply is None:
                continue
            outcome.bytes_up += message_bytes(reply)
            if again(client_of_reply, reply):
                turns[client_of_reply].postpone(time.monotonic())
                continue
            del turns[client_of_reply]
            outcome.answered.add(client_of_reply)
            early[client_of_reply] = reply
            heard(len(outcome.answered), len(order))
        while place < len(order) and order[place] not in turns:
            if order[place] in early:
                hear(order[place], early.pop(order[place]))
            place += 1
        poll = POLL_SECONDS if arrived else min(1.2 * poll, LONGEST_POLL_SECONDS)
        if time.monotonic() > tell:
            waits(list(turns), start + timeout - time.monotonic())
            tell, pause = tell + 2 * pause, 2 * pause
        if not arrived:
            idle()
            wait(poll)
    for client in order[place:]:
        if client in early:
            hear(client, early.pop(client))
    return outcome

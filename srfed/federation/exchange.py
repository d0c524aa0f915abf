"""One bounded exchange of messages: every client is asked once, whoever answers in time is heard."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.05

stop_requested = threading.Event()
"""Set by a command's signal handler; the server then stops between two replies."""


class StoppedError(Exception):
    """The user asked the run to stop."""


@dataclass(frozen=True)
class Exchange:
    """What was asked and what was answered: requests by message id, replies in order of arrival."""

    requests: dict[str, Message]
    replies: list[Message]


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    heard: Callable[[int, int], None] = lambda done, total: None,
) -> Exchange:
    """Send messages and wait for the replies, at most ``timeout`` seconds.

    Args:
        grid: any Flower grid.
        messages: the requests.
        timeout: seconds; a reply that comes later is ignored, now and for ever.
        heard: told (replies so far, messages sent) after each reply.

    Raises:
        StoppedError: the user asked to stop.
    """
    requests = {message_id: message for message in messages for message_id in grid.push_messages([message])}
    waiting = set(requests)
    deadline = time.monotonic() + timeout
    replies: list[Message] = []
    while waiting:
        if stop_requested.is_set():
            raise StoppedError
        arrived = list(grid.pull_messages(list(waiting)))
        if time.monotonic() > deadline:
            break
        for reply in arrived:
            # An error reply that a SuperLink makes does not come from the client's node, so replies are
            # matched by the message they answer.
            if reply.metadata.reply_to_message_id in waiting:
                waiting.remove(reply.metadata.reply_to_message_id)
                replies.append(reply)
                heard(len(replies), len(requests))
        if not arrived:
            time.sleep(POLL_SECONDS)
    return Exchange(requests, replies)

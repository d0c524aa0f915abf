"""Stacks over any Flower grid: one message asks several simulated clients to train a round, or for
samples, and they are answered together (:mod:`srfed.federation.together`).

It goes to the first of them, and holds what all are sent once, and each one's own request. A
deployed site refuses it as a kind of request that it does not know.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from uuid import uuid4

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from srfed.federation.flower.exchange import Simulated
from srfed.federation.flower.guard import GuardedApp
from srfed.federation.messages import EVALUATE, REQUEST, TRAIN
from srfed.federation.site import is_simulated
from srfed.federation.together import answer_together
from srfed.federation.worker import do_together

STACKS = {f"{kind}.stack": kind for kind in (TRAIN, EVALUATE)}
"""Kinds of messages to a stack, and of what each client in it is asked."""
PARTITIONS = "partitions"
"""Record of the clients' places among the simulation's, in the order of their requests."""
ERROR = "error"
"""Record of a client's failure, in a stack's reply."""


class Seat(NamedTuple):
    """A simulated client: its node, and its place among the simulation's clients."""

    node: int
    partition: int


def shared_out(clients: Sequence[str], most: int) -> list[list[str]]:
    """Clients in stacks of at most so many each, as equal as can be, in order."""
    stacks = -(-len(clients) // most)
    borders = [len(clients) * number // stacks for number in range(stacks + 1)]
    return [list(clients[a:b]) for a, b in itertools.pairwise(borders)]


class StackingGrid:
    """A grid whose messages to one stack's clients travel as one.

    A stack is sent as soon as all its clients have been asked; if one never is, or is asked again,
    what there is goes when there is nothing else to wait for.

    Args:
        grid: where the clients are.
        stacks: the clients that are asked together.
    """

    def __init__(self, grid: Grid, stacks: Iterable[Sequence[Seat]]) -> None:
        self._grid = grid
        self._partition: dict[int, int] = {}
        self._stack: dict[int, int] = {}
        self._to_come: list[set[int]] = []
        for number, stack in enumerate(stacks):
            self._to_come.append({seat.node for seat in stack})
            self._partition.update(stack)
            self._stack.update(dict.fromkeys(self._to_come[-1], number))
        self._held: dict[int, list[Message]] = {}
        self._sent: dict[str, list[Message]] = {}
        self._lost: list[Message] = []

    @property
    def at_once(self) -> int:
        """How many stacks can be at work at once."""
        return self._grid.at_once if isinstance(self._grid, Simulated) else 1

    def wait(self, seconds: float) -> None:
        """Return when there may be a reply, at the latest after so many seconds."""
        if isinstance(self._grid, Simulated):
            self._grid.wait(seconds)
        else:
            time.sleep(seconds)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages to clients of the stacks; each has an id of its own."""
        ids = []
        for message in messages:
            ids.append(uuid4().hex)
            # As the grid will name the one that they travel in.
            message.metadata.__dict__["_message_id"] = ids[-1]
            node = message.metadata.dst_node_id
            stack = self._stack[node]
            self._held.setdefault(stack, []).append(message)
            self._to_come[stack].discard(node)
            if not self._to_come[stack]:
                self._send(stack)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come to these messages, and to those of the same stacks."""
        if not self._sent:
            for stack in list(self._held):
                self._send(stack)
        lost, self._lost = self._lost, []
        return [
            *(Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message) for message in lost),
            *(
                reply
                for answer in self._grid.pull_messages(list(self._sent))
                for reply in _taken_apart(
                    answer, self._sent.pop(answer.metadata.reply_to_message_id)
                )
            ),
        ]

    def _send(self, stack: int) -> None:
        messages = self._held.pop(stack)
        whole = _put_together(
            messages, [self._partition[message.metadata.dst_node_id] for message in messages]
        )
        # A message that the grid does not take has no id.
        ids = list(self._grid.push_messages([whole]))
        self._sent.update(dict.fromkeys(ids, messages))
        if not ids:
            self._lost.extend(messages)


class StackedApp(GuardedApp):
    """A guarded app that answers the clients of a stack together, each through all its mods."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type not in STACKS or not is_simulated(context):
            return super().__call__(message, context)
        answer = super().__call__
        answers: list[Callable[[], Message]] = [
            lambda asked=asked, own=own: answer(asked, own)  # type: ignore[misc]
            for asked, own in _members(message, context)
        ]
        replies = answer_together(answers, do_together)
        return Message(_collected(replies), reply_to=message)


def _put_together(messages: Sequence[Message], partitions: Sequence[int]) -> Message:
    first = messages[0]
    content = RecordDict({PARTITIONS: ConfigRecord({PARTITIONS: list(partitions)})})
    for place, message in enumerate(messages):
        content[_numbered(place, REQUEST)] = message.content[REQUEST]
    # The same for all.
    for name, record in first.content.array_records.items():
        content[name] = record
    metadata = first.metadata
    return Message(
        content,
        metadata.dst_node_id,
        f"{metadata.message_type}.stack",
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )


def _members(message: Message, context: Context) -> list[tuple[Message, Context]]:
    """What each client of a stack is asked, and its surroundings."""
    content, found = message.content, []
    partitions = content.config_records[PARTITIONS][PARTITIONS]
    assert isinstance(partitions, list)
    for place, partition in enumerate(partitions):
        metadata = copy.copy(message.metadata)
        metadata.message_type = STACKS[message.metadata.message_type]
        own = RecordDict({REQUEST: content[_numbered(place, REQUEST)]})
        for name, record in content.array_records.items():
            own[name] = record
        surroundings = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**context.node_config, "partition-id": int(str(partition))},
            state=RecordDict(),
            run_config=context.run_config,
        )
        # As Flower makes a message that has come.
        asked: Message = Message(content=own, metadata=metadata)  # type: ignore[call-overload]
        found.append((asked, surroundings))
    return found


def _collected(replies: Iterable[Message | BaseException]) -> RecordDict:
    content = RecordDict()
    for place, reply in enumerate(replies):
        if isinstance(reply, BaseException):
            raise reply
        if reply.has_error():
            content[_numbered(place, ERROR)] = ConfigRecord(
                {"code": reply.error.code, "reason": reply.error.reason or ""}
            )
            continue
        for name, record in reply.content.items():
            content[_numbered(place, name)] = record
    return content


def _taken_apart(answer: Message, messages: Iterable[Message]) -> list[Message]:
    """The reply of each client of a stack; where the stack as a whole has failed, that of all."""
    if answer.has_error():
        return [Message(answer.error, reply_to=message) for message in messages]
    replies = []
    for place, message in enumerate(messages):
        start = _numbered(place, "")
        own = {n.removeprefix(start): r for n, r in answer.content.items() if n.startswith(start)}
        if ERROR in own:
            error = answer.content.config_records[_numbered(place, ERROR)]
            said = Error(int(str(error["code"])), str(error["reason"]))
            replies.append(Message(said, reply_to=message))
        else:
            replies.append(Message(RecordDict(own), reply_to=message))
    return replies


def _numbered(place: int, name: str) -> str:
    return f"{place}/{name}"

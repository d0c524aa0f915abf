"""Runs on nodes that come and go."""

import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from srfed.errors import UserError
from srfed.federation.flower.client_app import app as real_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.server_app import run_federation
from srfed.federation.messages import DESCRIBE
from srfed.storage.run_folder import RunFolder
from support.faults import Faults, fail
from support.tiny_run import records, tiny_config

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "data.images_per_task": 16,
    "federation.rounds": ROUNDS,
    "federation.server_optimizer": "momentum",
    "federation.keep_attempts": 9,
    "federation.join_timeout": 30.0,
    "federation.round_timeout": 30.0,
    "training.local_steps": 1,
    "training.batch_size": 4,
    "sampling.steps": 1,
    "evaluation.every": 0,
    "evaluation.samples": 6,
    "evaluation.ssim_images": 0,
}
WAIT = {"federation.on_missing": "wait"}
SOON = 1.5
"""A join_timeout: long enough for a client that is there, short for one that is not."""
ALL = frozenset({1, 2, 3})
MIDDLE = 1
"""Position of the client that fails; of those at nodes 1, 2, 3 it is the one at node 2."""


class ChangingGrid(InlineGrid):
    """Nodes that come and go; a message to one that has gone is answered as a SuperLink answers it.

    Args:
        run: the run; its last checkpoint says how far it is.
        app: what every node runs.
        connected: the nodes that are connected after the last finished round, 0 before the first.
    """

    def __init__(
        self,
        run: RunFolder,
        app: ClientApp = real_app,
        connected: Callable[[int], Collection[int]] = lambda _: ALL,
    ) -> None:
        super().__init__(app, 3, run.clients)
        self._server = run.server
        self._connected = connected
        self.requests: list[Message] = []

    def add_node(self, node: int, index: int) -> None:
        """A node that runs the client of a task, whether another one does so or not."""
        config = {**self._contexts[1].node_config, "partition-id": index}
        self._contexts[node] = Context(0, node, config, RecordDict(), {})

    def get_node_ids(self) -> list[int]:
        finished = max(
            (int(path.name.removeprefix("round-")) for path in self._server.glob("round-*")),
            default=0,
        )
        return [node for node in self._contexts if node in self._connected(finished)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        self.requests += listed
        return super().push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # In their order, which decides whose answer comes first.
        wanted, here = list(message_ids), self.get_node_ids()
        for message_id, message in list(self._waiting.items()):
            if message_id in wanted and message.metadata.dst_node_id not in here:
                del self._waiting[message_id]
                return [
                    Message(
                        Error(ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable"),
                        reply_to=message,
                    )
                ]
        return super().pull_messages(wanted)

    def nodes_asked(self, kind: str, *rounds: int) -> list[int]:
        """The nodes that got requests of this kind, of these rounds or of any."""
        return [
            message.metadata.dst_node_id
            for message in self.requests
            if message.metadata.message_type == kind
            and (not rounds or int(message.metadata.group_id) in rounds)
        ]


def away_for(
    looks: int, *, after: int, node: int = 3, back_as: int = 3
) -> Callable[[int], Collection[int]]:
    """A node that leaves after some round, and is back when the server has looked so many times."""
    left = [looks]

    def connected(finished: int) -> Collection[int]:
        if finished < after:
            return ALL
        left[0] -= 1
        return (ALL - {node}) | ({back_as} if left[0] < 0 else set())

    return connected


def start(run: RunFolder, grid: InlineGrid | None = None) -> RunFolder:
    """The whole run on a grid, where further clients may come: nothing is fixed."""
    run_federation(grid or ChangingGrid(run), run)
    return run


def failure(call: Callable[[], Any]) -> str:
    """The one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def app_describing(change: Callable[[int, Message], None], app: ClientApp = real_app) -> ClientApp:
    """An app that says something else of itself: its reply is changed in place, by its node's
    number.
    """

    class Describing(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = app(message, context)
            if message.metadata.message_type == DESCRIBE:
                change(context.node_id, reply)
            return reply

    return Describing()


def reconfigured(run: RunFolder, changes: dict[str, Any]) -> RunFolder:
    return RunFolder.open(run.path).reconfigure(tiny_config({**SETTINGS, **changes}))


def copy_of(run: RunFolder, path: Path) -> RunFolder:
    return RunFolder.open(Path(shutil.copytree(run.path, path)))


def keep(reply: Message) -> None:
    """A reply as it is."""


def failing_in(*rounds: int) -> Faults:
    return [fail if number in rounds else keep for number in range(1, ROUNDS + 1)]


def same_but_for_traffic(run: RunFolder, reference: RunFolder, last: int = 0) -> bool:
    """Whether two runs' records, all or the last ones, are equal but for the size of the
    messages.
    """
    free = {"bytes_up", "bytes_down"}
    kept = [
        [
            {key: value for key, value in line.items() if key not in free}
            for line in records(one)[-last:]
        ]
        for one in (run, reference)
    ]
    return kept[0] == kept[1]


def resume(half: RunFolder, path: Path, changes: dict[str, Any]) -> RunFolder:
    return reconfigured(copy_of(half, path), changes)

"""Who is asked when, and in which order replies are heard, over a grid with real ClientApps."""

from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from srfed.federation.flower.exchange import exchange
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import message_bytes

CLIENTS = ["a", "b", "c", "d", "e", "f", "g"]

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """The client's own number."""
    number = int(message.metadata.dst_node_id)
    return Message(RecordDict({"said": ConfigRecord({"number": number})}), reply_to=message)


class LastFirst(InlineGrid):
    """Whoever was asked last answers first, and those named only when nobody else is left."""

    def __init__(self, slow: Iterable[str] = (), silent: Iterable[str] = ()) -> None:
        super().__init__(app, len(CLIENTS))
        self.slow = {CLIENTS.index(client) + 1 for client in slow}
        self.silent = {CLIENTS.index(client) + 1 for client in silent}
        self.most = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        nodes = {
            i: self._waiting[i].metadata.dst_node_id for i in message_ids if i in self._waiting
        }
        nodes = {i: node for i, node in nodes.items() if node not in self.silent}
        self.most = max(self.most, len(nodes))
        if not nodes:
            return []
        last = max(nodes, key=lambda i: (nodes[i] not in self.slow, nodes[i]))
        return super().pull_messages([last])


def make(client: str) -> Message:
    return Message(RecordDict({"asked": ConfigRecord({})}), CLIENTS.index(client) + 1, "train")


def heard_by(grid: LastFirst, window: int | None, timeout: float = 60) -> list[tuple[str, int]]:
    heard: list[tuple[str, int]] = []

    def hear(client: str, reply: Message) -> None:
        heard.append((client, int(reply.content.config_records["said"]["number"])))  # type: ignore[arg-type]

    outcome = exchange(grid, CLIENTS, make, hear, timeout, window=window)
    assert outcome.answered == {client for client, _ in heard}
    return heard


@pytest.mark.parametrize(("window", "most"), [(None, 7), (3, 3), (1, 1), (50, 7)])
def test_replies_are_heard_in_the_order_of_the_clients_and_few_are_kept(
    window: int | None, most: int
) -> None:
    grid = LastFirst(slow="a")
    assert heard_by(grid, window) == [(client, i + 1) for i, client in enumerate(CLIENTS)]
    assert grid.most == most


def test_whoever_is_silent_holds_up_those_beyond_the_window_and_nobody_else() -> None:
    grid = LastFirst(silent="c")
    asked: list[str] = []

    def remember(client: str) -> Message:
        asked.append(client)
        return make(client)

    heard: list[str] = []
    outcome = exchange(
        grid, CLIENTS, remember, lambda client, _: heard.append(client), 0.5, window=3
    )
    assert asked == ["a", "b", "c", "d", "e"]
    assert heard == ["a", "b", "d", "e"], "the time being up, the others are heard in their order"
    assert outcome.asked - outcome.answered == {"c"}


def test_bytes_are_those_of_all_messages() -> None:
    replies: list[Message] = []
    outcome = exchange(
        LastFirst(), CLIENTS, make, lambda _, reply: replies.append(reply), 60, window=2
    )
    assert outcome.bytes_up == sum(map(message_bytes, replies)) > 0
    assert outcome.bytes_down == sum(message_bytes(make(client)) for client in CLIENTS)

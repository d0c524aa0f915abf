"""Whole runs whose every message is kept, and what a guarded client answers and logs."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import read_layout
from srfed.federation.messages import FAILED


class RecordingGrid(InlineGrid):
    """Keeps every message, both ways."""

    def __init__(self, app: ClientApp, nodes: int, state_dir: Path) -> None:
        super().__init__(app, nodes, state_dir)
        self.requests: list[Message] = []
        self.replies: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        listed = list(messages)
        self.requests += listed
        return super().push_messages(listed)

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        self.replies.append(reply)
        return reply

    def records(self) -> Iterator[ArrayRecord]:
        """Every record of arrays of every message."""
        for message in (*self.requests, *self.replies):
            assert message.has_content(), message.error.reason
            yield from message.content.array_records.values()

    @property
    def names(self) -> set[str]:
        """Of every tensor in them."""
        return {name for record in self.records() for name, _, _ in read_layout(record)}

    @property
    def data(self) -> bytes:
        """What travelled, each array once."""
        return b"".join({array.data for record in self.records() for array in record.values()})


SECRET = "patient-4711"


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "digit-0" / "client.log").read_text()


def is_bare_error(reply: Message) -> bool:
    return (
        reply.has_error()
        and reply.error.code == FAILED
        and SECRET not in (reply.error.reason or "")
    )

"""The in-process grid: the same two apps, one client after the other, no Ray and no network."""

import os
import traceback
from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from srfed.federation.flower.server_app import RUN_DIR_VARIABLE
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.storage.run_folder import RunFolder


class InlineGrid(Grid):
    """A Flower grid whose nodes are function calls.

    A message waits until somebody pulls its reply; then its client runs, to the end, in the
    caller's thread. So a debugger stops where it should, and a timeout is noticed only between two
    clients.

    Args:
        client_app: what every node runs.
        nodes: how many nodes; node n + 1 has partition-id n.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        # A message takes its run and sender from here; under a SuperLink or Ray, Flower sets them.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, SUPERLINK_NODE_ID, 0
        self._client_app = client_app
        self._contexts = {
            index + 1: Context(
                run_id=0,
                node_id=index + 1,
                node_config={"partition-id": index, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for index in range(nodes)
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """There is but one run, and it needs no number."""

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=0)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message_id = uuid4().hex
            # Flower's own in-memory grid names messages in this way too.
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the client of the first waiting message among ``message_ids``; its reply alone comes
        back.
        """
        wanted = set(message_ids)
        for message_id in list(self._waiting):
            if message_id in wanted:
                return [self._run_client(self._waiting.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        ids = self.push_messages(messages)
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def _run_client(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:
            # As Flower answers for an app that raises.
            return Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback.format_exc()),
                reply_to=message,
            )


def run_inline(run: RunFolder, server_app: ServerApp, client_app: ClientApp) -> None:
    """Run both apps in this process until the server is done; raises what the server raises."""
    os.environ[RUN_DIR_VARIABLE] = str(run.path)
    os.environ[STATE_DIR_VARIABLE] = str(run.clients)
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with run.in_use():
        server_app(InlineGrid(client_app, run.config.federation.clients), context)

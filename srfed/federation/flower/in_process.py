"""The in-process grid: the same ClientApp, one client after the other, no Ray and no network."""

import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from srfed.evaluation.metrics.own import OwnMetrics
from srfed.federation.flower.client_app import app as own_client_app
from srfed.federation.flower.federated import Federated
from srfed.observer import Observer
from srfed.runs.loop import run_rounds
from srfed.storage.run_folder import RunFolder


class InlineGrid(Grid):
    """A Flower grid whose nodes are function calls.

    A message waits until somebody pulls its reply; then its client runs, to the end, in the
    caller's thread. So a debugger stops where it should, and a timeout is noticed only between two
    clients.

    Args:
        client_app: what every node runs.
        nodes: how many nodes; node n + 1 has partition-id n.
        state_dir: where they keep their stores; None where the environment says it.
    """

    def __init__(self, client_app: ClientApp, nodes: int, state_dir: Path | None = None) -> None:
        # A message takes its run and sender from here; under a SuperLink or Ray, Flower sets them.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 0, SUPERLINK_NODE_ID, 0
        self._client_app = client_app
        self._contexts = {
            index + 1: Context(
                run_id=0,
                node_id=index + 1,
                node_config={
                    "partition-id": index,
                    "num-partitions": nodes,
                    **({} if state_dir is None else {"state-dir": str(state_dir)}),
                },
                state=RecordDict(),
                run_config={},
            )
            for index in range(nodes)
        }
        self._waiting: dict[str, Message] = {}

    @property
    def at_once(self) -> int:
        """How many clients can be at work at once."""
        return 1

    def wait(self, seconds: float) -> None:
        """Return when there may be a reply, at the latest after so many seconds."""
        time.sleep(seconds)

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
        """Run the client of the first of ``message_ids`` that is waiting; its reply alone comes
        back.
        """
        for message_id in message_ids:
            if message_id in self._waiting:
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


@contextmanager
def identity_kept() -> Iterator[None]:
    """Flower's task identity, one for the whole process, is put back afterwards."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def in_process(run: RunFolder, client_app: ClientApp) -> Iterator[InlineGrid]:
    """A grid of the run's simulated clients in this thread."""
    with identity_kept():
        yield InlineGrid(client_app, run.config.federation.clients, run.clients)


def run_in_process(
    run: RunFolder,
    observers: Iterable[Observer] = (),
    client_app: ClientApp = own_client_app,
    metrics: OwnMetrics | None = None,
) -> None:
    """The whole run in this thread, one client after the other; raises as
    :func:`srfed.runs.loop.run_rounds`.
    """
    with in_process(run, client_app) as grid:
        run_rounds(run, Federated(grid, run, fixed=True, metrics=metrics), observers)

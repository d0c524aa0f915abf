"""The Ray grid: the same ClientApp, as many clients at once as there is room for, each in a process
that is replaced when it dies.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from ray.exceptions import RayError, RayTaskError

from srfed.errors import UserError
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.ray_head import INSTEAD
from srfed.federation.flower.ray_node import ClientProcess, Wanted
from srfed.federation.messages import DIED
from srfed.records import Place
from srfed.work import COUNTS_VARIABLE

MOST_FAILED_STARTS = 3
"""Processes that may die before they are there, one after the other."""
LONGEST_START = 300.0
"""Seconds without a process that is there or at work."""
LOOK_SECONDS = 5.0
"""Time between two looks at how many processes there is room for; nodes come and go."""


@dataclass(frozen=True)
class Room:
    """What a client's process takes, and how many there may be.

    Attributes:
        cpus, gpus: of one process.
        most: processes, at most.
        place: where such a process trains.
    """

    cpus: int
    gpus: float
    most: int
    place: Place

    def now(self) -> int:
        """For how many processes the nodes that are there have room, each node for itself."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return min(self.most, sum(map(self._on_node, nodes)))

    def _on_node(self, node: dict[str, Any]) -> int:
        there = node["Resources"] if node["Alive"] else {}
        count = int(there.get("CPU", 0.0) / self.cpus)
        if not self.gpus:
            return count
        # A share is of one GPU, never of two; a tiny one would lose a client to rounding.
        return min(count, int(there.get("GPU", 0.0)) * int(1 / self.gpus + 1e-9))


class RayGrid(InlineGrid):
    """A Flower grid whose nodes are clients in Ray's processes.

    A message waits until somebody pulls its reply and a process is free. Where a process dies over
    a message, the reply is an error of code :data:`srfed.federation.messages.DIED`, and another
    process takes its place, on another node if need be.

    Args:
        client_app: what every node runs.
        nodes: how many nodes; node n + 1 has partition-id n.
        state_dir: where they keep their stores.
        room: for the processes.
        wanted: what a process asks of the machine that it is on.

    Raises:
        UserError: there is no room for a single client, or no process can be kept alive.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        state_dir: Path,
        room: Room,
        wanted: Wanted | None = None,
    ) -> None:
        super().__init__(client_app, nodes, state_dir)
        self._room, self._wanted = room, wanted
        self._app = ray.put(client_app)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._working: dict[Any, tuple[Any, Message]] = {}
        self._replies: dict[str, Message] = {}
        self._failed_starts, self._last_failure = 0, ""
        self._alive = self._looked = time.monotonic()
        self._fill()
        if not self._starting:
            raise UserError(
                f"no node of Ray has what one client takes (resources.client_cpus = {room.cpus}, "
                f"and {room.gpus:g} GPUs); allowed: less, or a larger node"
            )

    @property
    def at_once(self) -> int:
        """How many clients can be at work at once."""
        return len(self._starting) + len(self._idle) + len(self._working)

    def wait(self, seconds: float) -> None:
        """Return when a process has something to say, at the latest after so many seconds."""
        if awaited := [*self._working, *self._starting]:
            ray.wait(awaited, num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Give the free processes what waits, and take the replies among ``message_ids``.

        Raises:
            UserError: no process can be kept alive.
        """
        wanted = set(message_ids)
        self._collect()
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._fill()
        for message_id in [waiting for waiting in self._waiting if waiting in wanted]:
            if not self._idle:
                break
            self._start(self._idle.pop(), self._waiting.pop(message_id))
        self._check_alive()
        return [self._replies.pop(known) for known in wanted & self._replies.keys()]

    def _start(self, actor: Any, message: Message) -> None:
        context = self._contexts[message.metadata.dst_node_id]
        task = actor.answer.remote(self._app, message, context)
        self._working[task] = actor, message

    def _collect(self) -> None:
        """Hear the processes that have something to say, without waiting for any."""
        awaited = [*self._starting, *self._working]
        if not awaited:
            return
        finished, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
        for task in finished:
            if task in self._starting:
                self._hear_start(task, self._starting.pop(task))
            else:
                self._hear_reply(task, *self._working.pop(task))

    def _hear_start(self, task: Any, actor: Any) -> None:
        try:
            ray.get(task)
        except RayError as error:
            self._failed_starts += 1
            self._last_failure = reason_of_death(error)
            self._replace(actor)
        else:
            self._failed_starts = 0
            self._idle.append(actor)

    def _hear_reply(self, task: Any, actor: Any, message: Message) -> None:
        reply: Message
        context: Context
        try:
            reply, context = ray.get(task)
        except RayTaskError as error:
            # As Flower answers for an app that raises.
            reply = _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
            self._idle.append(actor)
        except RayError as error:
            reply = _error(message, DIED, reason_of_death(error))
            self._replace(actor)
        else:
            self._contexts[message.metadata.dst_node_id] = context
            self._idle.append(actor)
        self._replies[message.metadata.message_id] = reply

    def _replace(self, actor: Any) -> None:
        # One that merely cannot be reached is not to go on.
        with suppress(RayError):
            ray.kill(actor)
        self._fill()

    def _fill(self) -> None:
        """Start as many processes as there is room for now."""
        self._looked = time.monotonic()
        if self._failed_starts >= MOST_FAILED_STARTS:
            if self.at_once:
                return
            raise UserError(f"Ray cannot start a client's process: {self._last_failure}; {INSTEAD}")
        process: Any = ray.remote(num_cpus=self._room.cpus, num_gpus=self._room.gpus)(ClientProcess)
        for _ in range(self._room.now() - self.at_once):
            actor = process.remote(self._wanted, os.environ.get(COUNTS_VARIABLE, ""))
            self._starting[actor.__ray_ready__.remote()] = actor

    def _check_alive(self) -> None:
        now = time.monotonic()
        if self._idle or self._working:
            self._alive = now
        elif now - self._alive > LONGEST_START:
            raise UserError(
                f"Ray has started no client's process in {LONGEST_START:g} s: its nodes are gone, "
                f"or at work for others; {INSTEAD}"
            )


def reason_of_death(error: BaseException) -> str:
    """Why a process or a node of Ray's is gone, in a few words."""
    text = " ".join(str(error).split())
    for begin, end in (
        ("Worker exit detail: ", " Some common causes"),
        ("RuntimeError: ", " Stack Trace"),
        ("is dead because ", " Stack Trace"),
        ("is unavailable: ", " The task may"),
    ):
        if begin in text:
            return text.rpartition(begin)[2].partition(end)[0].rstrip(". ")
    return text or type(error).__name__


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)

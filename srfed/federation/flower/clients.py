"""The clients behind a Flower grid: asked together, in a bounded time, and heard one by one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar
from uuid import uuid4

from flwr.app import ArrayRecord, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.federation.flower.exchange import MOST_DEATHS, Exchange, Simulated, exchange
from srfed.federation.flower.packing import (
    array_record,
    attempt_of,
    digest_of,
    request_content,
    unpack,
)
from srfed.federation.flower.roster import Roster
from srfed.federation.flower.stacking import Seat, StackingGrid
from srfed.federation.messages import (
    DIED,
    GPU_FAILED,
    LOST_STORE,
    TRAIN,
    Reply,
    ReplyHeader,
    Request,
)
from srfed.federation.screening import (
    EvaluateReply,
    RefusedError,
    TrainReply,
    ValidateReply,
    reason_of_failure,
)
from srfed.networks.partition import Control, Shared
from srfed.observer import Observer
from srfed.units import seconds_in_words

TTL_MARGIN = 60.0
"""Seconds that a message outlives the wait for its reply, for the way back through a SuperLink."""

LOST = frozenset(
    {
        DIED,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    }
)
"""Flower's errors that mean that a client is gone; the others mean that it has failed."""

ReplyT = TypeVar("ReplyT", TrainReply, EvaluateReply, ValidateReply)


@dataclass(frozen=True)
class Screened(Generic[ReplyT]):
    """The replies of one exchange, screened.

    Attributes:
        accepted: by client, in sorted order.
        attempts: the attempt that each accepted reply is of.
        refused, missing: why, by client, in sorted order.
        bytes_up, bytes_down: of all messages, with those that were repeated.
    """

    accepted: dict[str, ReplyT]
    attempts: dict[str, str]
    refused: dict[str, str]
    missing: dict[str, str]
    bytes_up: int
    bytes_down: int


class FlowerClients:
    """Asks clients over a grid, and screens what each of them answers.

    Args:
        grid: any Flower grid.
        config: the run's configuration.
        roster: who is there, and at which node.
        tell: told of every reply, and for whom is waited.
        window: of :func:`srfed.federation.flower.exchange.exchange`.
        lowered: what names the run's settings where a resumption has lowered some: a question that
            was asked before is then another one.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        roster: Roster,
        tell: Observer,
        window: int | None = None,
        lowered: str = "",
    ) -> None:
        self._lowered = lowered
        self._grid, self._roster, self._tell, self._window = grid, roster, tell, window
        self._timeout = config.federation.round_timeout
        self._waits = config.federation.on_missing == "wait"

    def ask(
        self,
        kind: str,
        requests: Iterable[Request],
        arrays: Mapping[str, Shared | Control],
        what: str,
        screen: Callable[[Reply, ReplyHeader, Request], ReplyT],
        *,
        away: Iterable[str] = (),
        stacks: Sequence[Sequence[str]] = (),
    ) -> Screened[ReplyT]:
        """Send the requests and screen the replies, in the order of the requests; under ``wait``
        until every client has given one.

        Args:
            kind: the type of the messages.
            requests: one for each client that is asked.
            arrays: tensors that go to all of them, by the name of their record.
            what: the exchange, in words.
            screen: the reply of a client, if it can be accepted; raises RefusedError.
            away: clients that are not asked because they are not there.
            stacks: simulated clients that are to be asked together, if any; then every client of
                the requests is in one.

        Raises:
            UserError: under ``wait``, a client has not replied, or only failed, in the time there
                is, or its process has died over and over; or a simulated client's GPU has failed.
            StoppedError: the user asked to stop.
        """
        records = {name: array_record(tensors) for name, tensors in arrays.items()}
        carried = f"{digest_of(records)}{self._lowered}" if kind == TRAIN else ""
        first = {request.client: request for request in requests}
        sent: dict[str, Request] = {}
        failures: dict[str, str] = {}
        deaths = dict.fromkeys(first, 0)
        accepted: dict[str, ReplyT] = {}
        refused: dict[str, str] = {}
        missing = dict.fromkeys(away, "not connected")

        def make(client: str) -> Message:
            request = first[client]
            name = attempt_of(request, carried) if kind == TRAIN else _new_name(request.round)
            sent[client] = replace(request, attempt=name)
            return self._message(kind, sent[client], records)

        def again(client: str, reply: Message | None) -> bool:
            if reply is not None and reply.has_content():
                return False
            failure = None if reply is None else unpack(reply).failure
            if failure is not None and failure.code == LOST_STORE:
                # Nothing that the others could wait for: its owner has to do something.
                return False
            if (
                failure is not None
                and failure.code == GPU_FAILED
                and isinstance(self._grid, Simulated)
            ):
                # Whoever comes after it in its process would fail likewise, and a round without
                # them would be another one.
                raise UserError(
                    f"{what}: {client}: the GPU has failed; nothing of this is kept, and all that "
                    "was stored before is as it was"
                )
            died = failure is not None and failure.code == DIED
            if not died and not self._waits:
                return False
            failures[client] = (
                "cannot be reached" if failure is None else reason_of_failure(failure)
            )
            deaths[client] += died
            if deaths[client] == MOST_DEATHS:
                if self._waits:
                    raise UserError(f"{what}: {client}: {MOST_DEATHS} times {failures[client]}")
                return False
            self._tell.on_notice(f"{what}: {client}: {failures[client]}; asking it again")
            return True

        def hear(client: str, message: Message) -> None:
            request, reply = sent[client], unpack(message)
            if reply.failure is not None and reply.failure.code in LOST:
                times = f"{MOST_DEATHS} times " if reply.failure.code == DIED else ""
                missing[client] = times + reason_of_failure(reply.failure)
                return
            header = ReplyHeader(client, request.attempt, request.round)
            try:
                accepted[client] = screen(reply, header, request)
            except RefusedError as error:
                refused[client] = str(error)
                if reply.failure is None:
                    self._roster.recheck(client)

        members = self._roster.members
        seats = [
            [Seat(members[client].node, members[client].description.index) for client in stack]
            for stack in stacks
        ]
        outcome = exchange(
            StackingGrid(self._grid, seats) if stacks else self._grid,
            first,
            make,
            hear,
            self._timeout,
            window=self._window,
            ready=self._roster.is_present,
            again=again,
            heard=partial(self._tell.on_progress, what),
            idle=self._roster.look,
            waits=partial(self._say_waiting, what),
        )
        silent = [client for client in first if client not in outcome.answered]
        if self._waits and silent:
            reasons = [
                f"{client}: {failures.get(client, self._why_silent(outcome, client))}"
                for client in silent
            ]
            raise UserError(f"{what} has waited {self._timeout:g} s for {'; '.join(reasons[:3])}")
        missing |= dict.fromkeys(outcome.asked - outcome.answered, "no reply in time")
        return Screened(
            accepted=dict(sorted(accepted.items())),
            attempts={client: sent[client].attempt for client in accepted},
            refused=dict(sorted(refused.items())),
            missing=dict(sorted(missing.items())),
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
        )

    def _message(self, kind: str, request: Request, records: Mapping[str, ArrayRecord]) -> Message:
        content = request_content(request)
        for name, record in records.items():
            content[name] = record
        # A client that is waited for may have no node yet; its message is addressed when it is
        # sent.
        node = self._roster.node_of(request.client) if request.client in self._roster else 0
        ttl = self._timeout + TTL_MARGIN
        return Message(content, node, kind, ttl=ttl, group_id=str(request.round))

    def _say_waiting(self, what: str, clients: list[str], left: float) -> None:
        """Name the deployed sites without an answer; a simulation's clients are at work, and nobody
        can start them.
        """
        members = self._roster.members
        deployed = [
            client
            for client in clients
            if client not in members or members[client].description.index < 0
        ]
        away = [client for client in deployed if not self._roster.is_present(client)]
        silent = [client for client in deployed if client not in away]
        parts = [
            *([f"{', '.join(away)} (not connected: start that site)"] if away else []),
            *([f"{', '.join(silent)} (connected, no answer yet)"] if silent else []),
        ]
        if parts:
            self._tell.on_notice(
                f"{what}: waiting for {' and '.join(parts)}, for {seconds_in_words(left)} more"
            )

    def _why_silent(self, outcome: Exchange, client: str) -> str:
        if client not in outcome.asked or not self._roster.is_present(client):
            return "not connected"
        return "connected, but no reply in time; restart that site if it is not at work"


def _new_name(server_round: int) -> str:
    """Of an answer under which nothing is stored: what an earlier request still does at the client
    must not be taken for the answer to this one.
    """
    return f"round-{server_round:05d}-{uuid4().hex[:8]}"

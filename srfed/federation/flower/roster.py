"""The roster: which clients take part, and at which node each of them is.

A node that comes is asked who it is. One that does not fit is refused with a reason, and asked
again when it has been away or some time has passed; the others are not held up. A client id belongs
to the SuperNode key that first came with it, or to the one that the run's roster file names.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from srfed import __version__
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.federation.bounds import LONGEST_TEXT, MOST_STEPS
from srfed.federation.flower.exchange import (
    MOST_DEATHS,
    POLL_SECONDS,
    StoppedError,
    stop_requested,
)
from srfed.federation.flower.identity import registered_by_hand
from srfed.federation.flower.packing import add_refusal, request_content, unpack
from srfed.federation.messages import (
    DESCRIBE,
    DIED,
    Description,
    Request,
    works_together,
)
from srfed.federation.screening import RefusedError, screen_description
from srfed.keys import key_fingerprint
from srfed.records import Shape
from srfed.storage.server_checkpoints import KnownClient
from srfed.training.minibatches import MinibatchOrder
from srfed.units import printable, seconds_in_words

LOOK_SECONDS = 1.0
"""Least time between two looks at who is connected."""
LOOKS_APART = 10
"""And in what a look takes of the processor: with ten thousand clients that is long, while one that
waits for a SuperLink takes next to nothing."""
ASK_AGAIN_SECONDS = 30.0
"""A refused node that stays is asked again after this time: its owner may have mended it."""
TELL_SECONDS = 60.0
"""While the server waits for clients it says so this often."""
SHORT = 19
"""Characters of a fingerprint that tell keys apart in a notice."""


@dataclass(frozen=True)
class Member:
    """A client of this run, and the node that it answers from."""

    node: int
    description: Description


@dataclass(frozen=True)
class Expected:
    """What a client must say of itself to take part.

    Attributes:
        partition: fingerprint of the partition.
        clients: the only ids there can be; None where any will do.
        known: the clients that the run has had, who are held to what they said at first.
        shapes: H, W, C of their images.
        own_shapes: the same of clients whose images the server has itself.
        keys: the run's roster, fingerprint of the SuperNode key by client id; None where there is
            none.
    """

    partition: str
    clients: frozenset[str] | None
    known: Mapping[str, KnownClient] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    own_shapes: Mapping[str, Shape] = field(default_factory=dict)
    keys: Mapping[str, str] | None = None


class Roster:
    """The clients of one run, as they come and go.

    Args:
        grid: where the nodes are.
        config: the run's configuration.
        lineage: the run.
        expected: what a client must be like.
        joined: told of each client that is new to the roster.
        notice: told what the user should know.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        lineage: str,
        expected: Expected,
        joined: Callable[[Member], None],
        notice: Callable[[str], None],
    ) -> None:
        self._grid = grid
        self._config = config
        self._request = Request(config.to_json(), lineage)
        self._expected = expected
        self._joined = joined
        self._notice = notice
        self._known = dict(expected.known)
        self._shapes = {**expected.shapes, **expected.own_shapes}
        self._nodes: dict[int, NodeInfo] = {}
        self._keyed = False
        self._members: dict[str, Member] = {}
        self._at: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._refused: dict[int, tuple[float, str]] = {}
        self._told: dict[int, str] = {}
        self._doubted: set[int] = set()
        self._deaths: dict[int, int] = {}
        self._connected: frozenset[int] = frozenset()
        self._next_look = float("-inf")

    @property
    def members(self) -> dict[str, Member]:
        """Every client that has taken part since the server started, by id, in the order of their
        ids.
        """
        return dict(sorted(self._members.items()))

    @property
    def known(self) -> dict[str, KnownClient]:
        """What each client that ever took part is held to, in the order of their ids."""
        return dict(sorted(self._known.items()))

    @property
    def shapes(self) -> dict[str, Shape]:
        """H, W, C of each client's images, in the order of their ids."""
        return dict(sorted(self._shapes.items()))

    @property
    def present(self) -> list[str]:
        """The clients whose node is connected, in the order of their ids."""
        return [client for client, member in self.members.items() if member.node in self._connected]

    def __len__(self) -> int:
        """How many clients have taken part since the server started, connected or not."""
        return len(self._members)

    def __contains__(self, client: str) -> bool:
        return client in self._members

    def node_of(self, client: str) -> int:
        """The node to which messages for a client go."""
        return self._members[client].node

    def is_present(self, client: str) -> bool:
        """Whether the client's node is connected."""
        return client in self._members and self._members[client].node in self._connected

    def recheck(self, client: str) -> None:
        """Ask a client's node once more who it is: what it has sent was not to be expected of this
        client.
        """
        # It may have been refused since it was asked for what it has sent.
        if client in self._members:
            self._doubted.add(self._members[client].node)

    def look(self) -> bool:
        """See who is connected, ask the new ones, hear those that have answered, and say whether
        somebody has; never waits for anybody.
        """
        now = time.monotonic()
        if now >= self._next_look:
            began = time.thread_time()
            self._nodes = {node.node_id: node for node in self._grid.get_nodes()}
            self._connected = frozenset(self._nodes)
            # One key that somebody registered shows that nodes here have keys of their own.
            self._keyed = self._keyed or any(map(registered_by_hand, self._nodes.values()))
            self._bind(self._members)
            self._refused = {
                node: why for node, why in self._refused.items() if node in self._connected
            }
            known = {member.node for member in self._members.values()} | set(self._asked.values())
            self._next_look = now + max(LOOK_SECONDS, LOOKS_APART * (time.thread_time() - began))
            for node in sorted(self._connected - (known - self._doubted)):
                if node in self._refused and now - self._refused[node][0] < ASK_AGAIN_SECONDS:
                    continue
                content = request_content(self._request)
                reason = self._refused.get(node, (0.0, ""))[1]
                if reason != self._told.get(node, ""):
                    add_refusal(content, reason)
                    self._told[node] = reason
                message = Message(
                    content, node, DESCRIBE, ttl=self._config.federation.round_timeout
                )
                self._asked.update(
                    {i: node for i in self._grid.push_messages([message]) if i is not None}
                )
            self._doubted -= self._connected
        replies = list(self._grid.pull_messages(list(self._asked))) if self._asked else []
        for reply in replies:
            if reply.metadata.reply_to_message_id in self._asked:
                self._hear(self._asked.pop(reply.metadata.reply_to_message_id), reply)
        return bool(replies)

    def gather(
        self,
        enough: Callable[[], bool],
        acceptable: Callable[[], bool],
        *,
        fixed: bool,
        known: Collection[str] = (),
    ) -> None:
        """Wait for clients, at most ``federation.join_timeout`` seconds.

        Args:
            enough: whether there is nothing more to wait for.
            acceptable: whether, the time being up, the run can go on all the same.
            fixed: the nodes are those of a simulation, and no other will ever come.
            known: the clients of a run that goes on; none where it begins.

        Raises:
            UserError: the time is up, or all nodes are refused, and it cannot.
            StoppedError: the user asked to stop.
        """
        timeout = self._config.federation.join_timeout
        start = told = time.monotonic()
        while True:
            heard = self.look()
            if enough():
                return
            if stop_requested.is_set():
                raise StoppedError
            heard_all = (
                fixed and bool(self._connected) and not self._asked and len(self._refused) > 0
            )
            if heard_all or time.monotonic() - start > timeout:
                if acceptable() and not heard_all:
                    return
                raise UserError(self._too_few(timeout))
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                left = seconds_in_words(max(0.0, timeout - (told - start)))
                self._notice(f"waiting for {self._awaited(known)}, for {left} more{self._silent()}")
            if not heard:
                time.sleep(POLL_SECONDS)

    def _hear(self, node: int, reply: Message) -> None:
        if reply.has_error() and reply.error.code == DIED:
            deaths = self._deaths[node] = self._deaths.get(node, 0) + 1
            if deaths < MOST_DEATHS:
                # The next look asks it again.
                return
        try:
            description = self._admit(node, reply)
        except UserError as error:
            self._let_go(node)
            reason = printable(str(error))
            if self._refused.get(node, (0.0, ""))[1] != reason:
                self._notice(f"refused {reason}")
            self._refused[node] = (time.monotonic(), reason)
            return
        self._refused.pop(node, None)
        new = description.client not in self._members
        self._let_go(node)
        if description.client in self._members:
            self._at.pop(self._members[description.client].node)
        self._members[description.client] = member = Member(node, description)
        self._at[node] = description.client
        self._bind([description.client])
        if new:
            if description.version != __version__:
                self._notice(
                    f"{description.client} runs srfed {description.version}, this server "
                    f"{__version__}: patches of one version, which work together"
                )
            self._joined(member)

    def _key(self, node: int) -> str:
        """The fingerprint of a connected node's key; empty where it has none."""
        info = self._nodes.get(node)
        return key_fingerprint(info.public_key) if info is not None and info.public_key else ""

    def _let_go(self, node: int) -> None:
        """Forget who was at a node."""
        if node in self._at:
            del self._members[self._at.pop(node)]

    def _bind(self, clients: Iterable[str]) -> None:
        """Hold members to what they said first; an id without an owner becomes its key's, where
        nodes have keys.
        """
        for client in clients:
            member = self._members[client]
            description, info = member.description, self._nodes.get(member.node)
            known = self._known.get(
                client, KnownClient(description.images, description.test_images)
            )
            known = replace(known, node=member.node)
            if self._keyed and info is not None and not known.key:
                known = replace(
                    known, key=self._key(member.node), name=printable(info.name, LONGEST_TEXT)
                )
            self._known[client] = known
            self._shapes.setdefault(client, description.shape)

    def _check_owner(self, node: int, client: str) -> None:
        """Raise UserError unless the node's key is the one that the client id belongs to, or it
        belongs to none.
        """
        listed, known, key = self._expected.keys, self._known.get(client), self._key(node)
        if listed is not None and client not in listed:
            raise UserError(f"node {node}: client {client!r} is not in the run's roster")
        owner = listed[client] if listed is not None else known.key if known is not None else ""
        if owner:
            if key != owner:
                raise UserError(
                    f"node {node}: client {client!r} belongs to another SuperNode key, "
                    f"{owner[:SHORT]}, not {key[:SHORT] or 'none'}; for a new key: python -m "
                    f"srfed.deploy sites --run RUN --rebind {client}"
                )
            return
        holder = self._members.get(client)
        if holder is not None and holder.node != node and holder.node in self._connected:
            raise UserError(f"node {node}: another node is client {client!r} already")

    def _check_images(self, description: Description) -> None:
        """Raise UserError unless the client has the images that it had at first, and enough for a
        minibatch.
        """
        client, known = description.client, self._known.get(description.client)
        now = (description.images, description.test_images)
        if known is not None and now != (known.images, known.test_images):
            raise UserError(
                f"client {client!r}: it has {now[0]} training and {now[1]} test images, and had "
                f"{known.images} and {known.test_images} when it joined; if that is meant: python "
                f"-m srfed.deploy sites --run RUN --rebind {client}"
            )
        training, data = self._config.training, self._config.data
        if data.images_per_task and now[0] > (
            most := data.images_per_task - data.validation_images
        ):
            raise UserError(
                f"client {client!r}: it has {now[0]} training images, and data.images_per_task and "
                f"data.validation_images leave it {most}"
            )
        try:
            order = MinibatchOrder.of(
                training, description.images, training.batch_size, self._config.seed, client
            )
        except UserError as error:
            raise UserError(f"client {client!r}: {error}") from error
        steps = (training.local_epochs or 0) * order.steps_per_pass
        if steps > MOST_STEPS:
            raise UserError(
                f"client {client!r}: {now[0]} images make {steps} steps a round; allowed: "
                f"{MOST_STEPS}"
            )

    def _check_shape(self, description: Description) -> None:
        """Raise UserError unless the client's images are of the run's shape, where it has one, and
        of that which they had at first.
        """
        client, shape, data = description.client, description.shape, self._config.data
        of_config = data.image_size or shape[0], data.image_size or shape[1]
        theirs, ours, before = (
            "x".join(map(str, extents))
            for extents in (
                shape,
                self._expected.own_shapes.get(client, (*of_config, data.channels or shape[2])),
                self._shapes.get(client, shape),
            )
        )
        if theirs != ours:
            raise UserError(f"client {client!r}: its images are {theirs}, this run's are {ours}")
        if theirs != before:
            raise UserError(
                f"client {client!r}: its images are {theirs}, and were {before} when it joined; if "
                f"that is meant: python -m srfed.deploy sites --run RUN --rebind {client}"
            )

    def _admit(self, node: int, reply: Message) -> Description:
        """The description of a client that may take part; raises UserError with the reason where it
        may not.
        """
        try:
            description = screen_description(unpack(reply))
        except RefusedError as error:
            raise UserError(f"node {node}: {error}") from error
        client, expected = description.client, self._expected
        if not works_together(description.version, __version__):
            raise UserError(
                f"client {client!r}: it runs srfed {description.version!r}, this server "
                f"{__version__!r}; allowed: versions that differ in their last number alone"
            )
        self._check_shape(description)
        if description.partition != expected.partition:
            raise UserError(
                f"client {client!r}: it divides the model differently; is its srfed another "
                "version?"
            )
        if expected.clients is not None and client not in expected.clients:
            raise UserError(
                f"client {client!r}: the server's reference images have no such task; set "
                "evaluation.mode to statistics, or name the client after its task"
            )
        self._check_owner(node, client)
        self._check_images(description)
        return description

    def _awaited(self, known: Collection[str]) -> str:
        """Whom the server waits for, and who is here."""
        here = self.present
        missing = ", ".join(sorted(set(known) - set(here)))
        count = self._config.federation.clients - len(here)
        return f"{missing or f'{count} more'} (here: {', '.join(here) or 'none'})"

    def _silent(self) -> str:
        """What to do about nodes that are connected and say nothing; empty where there are none."""
        nodes = sorted(self._connected & set(self._asked.values()))
        if not nodes:
            return ""
        return (
            f"; connected and silent: node {', '.join(map(str, nodes[:3]))}, still at work for a "
            "run that was stopped, or stuck: wait, or restart that site (flwr supernode list)"
        )

    def _too_few(self, timeout: float) -> str:
        reasons = [why for _, why in self._refused.values()]
        told = f" ({'; '.join(reasons[:3])})" if reasons else ""
        wanted = self._config.federation.clients
        return (
            f"{len(self.present)} of {wanted} clients can take part after at most {timeout:g} "
            f"s{told}{self._silent()}"
        )

"""What the server and the clients say to each other: the one place that names a message's fields.

Every request carries the run's configuration, so that a client needs nothing but its own data;
every reply names its client and attempt, so that the server can tell what it got. How that becomes
Flower's messages is :mod:`srfed.federation.flower.packing`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NewType, Protocol, Self

from torch import Tensor

from srfed.evaluation.metrics.memorisation import Audit
from srfed.federation.agreement import RequestRefusedError
from srfed.records import Comparison, Shape
from srfed.storage.client_store import PLAIN_NAME

PROTOCOL = 4
"""Rises whenever a message means something else. 1, before it was said, knew no update but φ_i; 2
knew no best round; 3 had names of its own where Flower's apps have one in common."""
DESCRIBE = "query.describe"
TRAIN = "train"
EVALUATE = "evaluate"
VALIDATE = "evaluate.validate"
"""Asks for the loss on the owner's validation images, and for nothing else."""

Samples = NewType("Samples", dict[str, Tensor])
"""Generated images, or statistics of features: what may leave an owner besides φ."""
SHARED = "arrays"
"""Array record of φ, both ways; server to client, with ``updates.shared_bits``, of its codes. The
name is Flower's for a model's arrays, as are REQUEST, METRICS and EXAMPLES."""
UPDATE = "update"
"""Array record of what steps have made of Δ_i, client to server, in place of φ_i."""
CONTROL = "control"
"""Array record of control variates: c, or its codes, beside φ, server to client, and what travels
in place of c_i, client to server.
"""
AGAINST_TRIVIAL = "against_trivial"
"""Number of one round's reply: the loss over that of a predictor that has learned nothing."""
GENERATED = "generated"
"""Array record of generated images, client to server, uint8 N x H x W x C."""
STATISTICS = "statistics"
"""Array record of feature statistics, client to server, float64 mean (D,) and scatter (D, D) of
each of SETS.
"""
SETS = ("generated", "test", "train")
REQUEST = "config"
OLD_REQUEST = "request"
"""What REQUEST was until protocol 3."""
REPLY = "reply"
REFUSAL = "refusal"
"""Record of a request that asks a refused node once more: why it was refused, for its owner to
read.
"""
METRICS = "metrics"
EXAMPLES = "num-examples"
"""Number of the images that stand behind a reply: a client's training images m_i, or the validation
images behind its loss.
"""
FIGURES = "comparison_"
"""How the names of a comparison's numbers begin."""
AUDIT = "memorisation_"
"""How the names of a memorisation audit's numbers begin."""

FAILED = 100
"""Flower error code of a client that could not do what it was asked; the reason stays in its own
log.
"""
REFUSED = 101
"""Flower error code of a client that does not do what it was asked; the reason is in its own words.
"""
DIED = 102
"""Flower error code in place of a reply whose process died over the request, in a simulation.
"""

GPU_FAILED = 104
"""Flower error code of a client of a simulation whose process cannot use its GPU any more: the
round ends.
"""
LOST_STORE = 103
"""Flower error code of a client whose store has not the attempt that it is to go on from."""
RESTARTED = "restarted"
"""Number of a round's reply under ``on_lost_store: restart``: 1 where the client began anew, for
want of the attempt that it was to go on from."""

OTHER_PROTOCOL = "the request is of another protocol"
"""A client's words for a request that lacks what it looks for."""
IMPOSSIBLE_CONFIG = "the request's config is impossible"
"""A client's words for settings that it cannot read."""
LONGEST_CONFIG = 65_536
"""Characters of a configuration; ours have some 3,000."""
MOST_ROUNDS = MOST_SAMPLES = 1_000_000
"""Far above what any run has, and below what overflows anything."""


@dataclass(frozen=True)
class Request:
    """What every request says.

    Attributes:
        config: the run's configuration as JSON.
        lineage: the run with all its resumptions.
        client: whom the server believes to ask; empty where it asks who is there.
        round: the round, from 1; 0 in a description.
        attempt: the name under which the client is to store what it does.
        parent: the accepted attempt that the client is to start from; "none" before its first.
        best: the client's attempt in the best round so far, which it is to keep; "none" where there
            is no such round.
        best_round: that round; 0 where there is none.
        samples: how many images to generate.
        final: the evaluation at the end of the run, with all its curves.
        protocol: which the server speaks.
    """

    config: str
    lineage: str
    client: str = ""
    round: int = 0
    attempt: str = "none"
    parent: str = "none"
    best: str = "none"
    best_round: int = 0
    samples: int = 0
    final: bool = False
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """Read a request's fields, the one door for all that it says: names become folders, numbers
        become work.

        Raises:
            RequestRefusedError: it is of another protocol, a name is no plain file name, a number
                is out of range.
        """
        theirs = protocol_of(said)
        if theirs != PROTOCOL:
            raise RequestRefusedError(other_protocol("server", theirs, "site"))
        try:
            request = cls(**_fields(cls, said, "request"))
        except ValueError as error:
            raise RequestRefusedError(OTHER_PROTOCOL, str(error)[:200]) from error
        names = {
            "lineage": request.lineage,
            "attempt": request.attempt,
            "parent": request.parent,
            "best": request.best,
        }
        if request.client:
            names["client"] = request.client
        for key, name in names.items():
            if not PLAIN_NAME.fullmatch(name):
                raise RequestRefusedError(f"the request's {key} is impossible", f"{name[:100]!a}")
        numbers = {
            "round": (request.round, MOST_ROUNDS),
            "best_round": (request.best_round, MOST_ROUNDS),
            "samples": (request.samples, MOST_SAMPLES),
        }
        for key, (number, most) in numbers.items():
            if not 0 <= number <= most:
                raise RequestRefusedError(
                    f"the request's {key} is impossible", f"{number}, allowed: 0 to {most}"
                )
        if len(request.config) > LONGEST_CONFIG:
            raise RequestRefusedError(IMPOSSIBLE_CONFIG, f"{len(request.config)} characters")
        return request


@dataclass(frozen=True)
class Description:
    """What a client says of itself before the first round.

    Attributes:
        client: its stable id.
        task: the task's name.
        index: the task's position among the data set's, for display; -1 where it has none.
        height, width, channels: of its images.
        images: training images m_i.
        test_images: held-out images.
        partition: fingerprint of the shared part's names, shapes and dtypes.
        version: of srfed.
        protocol: which the client speaks.
    """

    client: str
    task: str
    index: int
    height: int
    width: int
    channels: int
    images: int
    test_images: int
    partition: str
    version: str
    protocol: int = PROTOCOL

    @property
    def shape(self) -> Shape:
        """H, W, C of its images."""
        return self.height, self.width, self.channels

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """Read a description; raises ValueError where a field is missing or of the wrong type."""
        return cls(**_fields(cls, said, REPLY))


@dataclass(frozen=True)
class ReplyHeader:
    """Who replies, and with which attempt.

    Attributes:
        client: its id.
        attempt, round: as in the request.
        features: fingerprint of the feature network of its statistics; empty where it sends none.
    """

    client: str
    attempt: str
    round: int
    features: str = ""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """Read a reply's header; raises ValueError where a field is missing or of the wrong
        type.
        """
        return cls(**_fields(cls, said, REPLY))


@dataclass(frozen=True)
class Failure:
    """An error in place of a reply: code (FAILED, REFUSED or one of Flower's) and reason."""

    code: int
    reason: str


class Packed(Protocol):
    """The tensors of one record as they came: what can be known of them before they are read."""

    @property
    def count(self) -> int:
        """How many arrays there are, the layout's among them."""

    @property
    def layout_size(self) -> int:
        """Bytes of the layout; 0 where there is none."""

    @property
    def value_size(self) -> int:
        """Bytes of all other arrays."""

    def read(self) -> dict[str, Tensor]:
        """The tensors, in the order of the message; raises whatever it pleases on what are none."""


@dataclass(frozen=True)
class Reply:
    """What came back from a client, nothing of it read or believed.

    Attributes:
        failure: where it is none; all else is empty then.
        records: the names of all its records.
        header: the fields of its header.
        numbers: its numbers, and lists of numbers.
        arrays: its tensors by record.
    """

    failure: Failure | None = None
    records: tuple[str, ...] = ()
    header: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float | list[float]] = field(default_factory=dict)
    arrays: Mapping[str, Packed] = field(default_factory=dict)


def protocol_of(said: Mapping[str, Any]) -> int:
    """The protocol that the fields of a request or a description are of; 1 where they say none, and
    ours where there are no fields at all.
    """
    protocol = said.get("protocol", 1) if said else PROTOCOL
    return protocol if type(protocol) is int else 0


def other_protocol(peer: str, theirs: int, here: str) -> str:
    """That a peer speaks another protocol, and what mends it."""
    return (
        f"the {peer} speaks protocol {theirs} of srfed, this {here} {PROTOCOL}; install the same "
        "srfed at both"
    )


def works_together(theirs: str, ours: str) -> bool:
    """Whether two versions of srfed take part in one federation: alike, or a patch apart.

    A patch changes neither what a message means nor what a setting does: what does raises PROTOCOL
    or the minor version. Of what is not numbered, such as a pre-release, every character counts.
    """
    both = [re.fullmatch(r"([0-9]+\.[0-9]+)\.[0-9]+", version) for version in (theirs, ours)]
    return theirs == ours or (all(both) and len({found[1] for found in both if found}) == 1)


def audit_metrics(audit: Audit) -> dict[str, float | list[float]]:
    """A memorisation audit as the numbers of a reply."""
    return {f"{AUDIT}{name}": value for name, value in audit.to_numbers().items()}


def read_audit(metrics: Mapping[str, float | list[float]]) -> Audit | None:
    """The memorisation audit among the numbers of a reply; None where there is none.

    Raises:
        ValueError: it is incomplete or impossible.
    """
    numbers = {
        name.removeprefix(AUDIT): value for name, value in metrics.items() if name.startswith(AUDIT)
    }
    if not numbers:
        return None
    plain = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    audit = Audit.from_numbers(plain)
    for space in (audit.pixels, audit.features):
        if not (0 <= space.share <= 1 and 0 <= space.tolerance <= 1 and space.generated >= 1):
            raise ValueError(
                f"a share of {space.share:g} with a tolerance of {space.tolerance:g} is impossible"
            )
    return audit


def comparison_metrics(comparison: Comparison) -> dict[str, float | list[float]]:
    """A comparison as the numbers of a reply."""
    return {f"{FIGURES}{name}": float(value) for name, value in vars(comparison).items()}


def read_comparison(metrics: Mapping[str, float | list[float]]) -> Comparison | None:
    """The comparison among a reply's numbers, whose ranges were checked; None where there is
    none.
    """
    found = {
        name.removeprefix(FIGURES): value
        for name, value in metrics.items()
        if name.startswith(FIGURES) and isinstance(value, (int, float))
    }
    if not found:
        return None
    return Comparison(
        alone=found["alone"],
        together=found["together"],
        low=found["low"],
        high=found["high"],
        alone_round=int(found["alone_round"]),
    )


def _fields(cls: type[Any], record: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = {}
    for entry in fields(cls):
        value = record.get(entry.name)
        if type(value) is not entry.type:
            raise ValueError(f"field {entry.name!r} of the {name} is {value!r}, not {entry.type}")
        values[entry.name] = value
    return values

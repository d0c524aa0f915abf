"""What the server and the clients say to each other: the one place that names a message's fields.

Every request carries the run's configuration, so that a client needs nothing but its own data;
every reply names its client and attempt, so that the server can tell what it got. Tensors travel as
Flower arrays (``.npy`` bytes, never pickled).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NewType, Self

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from srfed.evaluation.metrics.memorisation import Audit
from srfed.federation.agreement import RequestRefusedError
from srfed.federation.layout import Layout, layout_bytes, layout_of, zeros_of
from srfed.federation.updates import Delta
from srfed.networks.partition import Shared
from srfed.storage.client_store import PLAIN_NAME

PROTOCOL = 2
"""Rises whenever a message means something else. 1, before it was said, knew no update but φ_i."""
DESCRIBE = "query.describe"
TRAIN = "train"
EVALUATE = "evaluate"

Samples = NewType("Samples", dict[str, Tensor])
"""Generated images, or statistics of features: what may leave an owner besides φ."""
SHARED = "shared"
"""Array record of φ, both ways."""
UPDATE = "update"
"""Array record of what steps have made of Δ_i, client to server, in place of φ_i."""
GENERATED = "generated"
"""Array record of generated images, client to server, uint8 N x H x W x C."""
STATISTICS = "statistics"
"""Array record of feature statistics, client to server, float64 mean (D,) and scatter (D, D) of
each of SETS.
"""
SETS = ("generated", "test", "train")
REQUEST = "request"
REPLY = "reply"
REFUSAL = "refusal"
"""Record of a request that asks a refused node once more: why it was refused, for its owner to
read.
"""
METRICS = "metrics"
AUDIT = "memorisation_"
"""How the names of a memorisation audit's numbers begin."""

FAILED = 100
"""Flower error code of a client that could not do what it was asked; the reason stays in its own
log.
"""
REFUSED = 101
"""Flower error code of a client that does not do what it was asked; the reason is in its own words.
"""

IMPOSSIBLE_CONFIG = "the request's config is impossible"
"""A client's words for settings that it cannot read."""
LONGEST_CONFIG = 65_536
"""Characters of a configuration; ours have some 3,000."""
MOST_ROUNDS = MOST_SAMPLES = 1_000_000
"""Far above what any run has, and below what overflows anything."""

LAYOUT = "layout"
"""The array of a record that says what its other arrays hold."""
Arrays = Mapping[str, Mapping[str, Tensor]]


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
    samples: int = 0
    final: bool = False
    protocol: int = PROTOCOL

    def to_content(self, arrays: Arrays | None = None) -> RecordDict:
        return _content(REQUEST, asdict(self), arrays)

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """Read a request, the one door for all that it says: names become folders, numbers become
        work.

        Raises:
            RequestRefusedError: it is of another protocol, a name is no plain file name, a number
                is out of range.
        """
        theirs = protocol_of(content, REQUEST)
        if theirs != PROTOCOL:
            raise RequestRefusedError(other_protocol("server", theirs, "site"))
        try:
            request = cls(**_fields(cls, content, REQUEST))
        except ValueError as error:
            raise RequestRefusedError(
                "the request is of another protocol", str(error)[:200]
            ) from error
        names = {"lineage": request.lineage, "attempt": request.attempt, "parent": request.parent}
        if request.client:
            names["client"] = request.client
        for field, name in names.items():
            if not PLAIN_NAME.fullmatch(name):
                raise RequestRefusedError(f"the request's {field} is impossible", f"{name[:100]!a}")
        numbers = {
            "round": (request.round, MOST_ROUNDS),
            "samples": (request.samples, MOST_SAMPLES),
        }
        for field, (number, most) in numbers.items():
            if not 0 <= number <= most:
                raise RequestRefusedError(
                    f"the request's {field} is impossible", f"{number}, allowed: 0 to {most}"
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

    def to_content(self) -> RecordDict:
        return _content(REPLY, asdict(self))

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """Read a description; raises ValueError where a field is missing or of the wrong type."""
        return cls(**_fields(cls, content, REPLY))


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
    def of(cls, content: RecordDict) -> Self:
        """Read a reply's header; raises ValueError where a field is missing or of the wrong
        type.
        """
        return cls(**_fields(cls, content, REPLY))


def protocol_of(content: RecordDict, name: str) -> int:
    """The protocol that a request or a description says it is of; 1 where it says none."""
    record: Mapping[str, Any] = content.config_records.get(name, {})
    said = record.get("protocol", 1) if record else PROTOCOL
    return said if type(said) is int else 0


def other_protocol(peer: str, theirs: int, here: str) -> str:
    """That a peer speaks another protocol, and what mends it."""
    return (
        f"the {peer} speaks protocol {theirs} of srfed, this {here} {PROTOCOL}; install the same "
        "srfed at both"
    )


def add_refusal(content: RecordDict, reason: str) -> None:
    """Tell the node that a request goes to why it has been refused."""
    content[REFUSAL] = ConfigRecord({"reason": reason})


def read_refusal(content: RecordDict) -> str:
    """Why the server refuses this node, in its words, which are not to be trusted; empty where it
    says nothing.
    """
    record: Mapping[str, Any] = content.config_records.get(REFUSAL, {})
    reason = record.get("reason")
    return reason if isinstance(reason, str) else ""


def reply_content(
    header: ReplyHeader,
    metrics: Mapping[str, float | list[float]],
    arrays: Mapping[str, Shared | Delta | Samples] | None = None,
) -> RecordDict:
    """A reply: its header, numbers and tensors: φ_i or its change, generated images, statistics."""
    content = _content(REPLY, asdict(header), arrays)
    content[METRICS] = MetricRecord({name: value for name, value in metrics.items()})
    return content


def read_metrics(content: RecordDict) -> dict[str, float | list[float]]:
    """The numbers of a reply; empty where it has none."""
    record: Mapping[str, Any] = content.metric_records.get(METRICS, {})
    return dict(record)


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


def array_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record: for each dtype one array with all their values, and an array that
    says whose.

    Flower asks for every array of a message separately, which costs a SuperLink far more than the
    bytes do.
    """
    values: dict[str, list[NDArray[Any]]] = {}
    for (_, dtype, _), tensor in zip(layout_of(tensors), tensors.values(), strict=True):
        values.setdefault(dtype, []).append(np.asarray(tensor.detach().cpu()).ravel())
    packed = {dtype: Array(np.concatenate(parts)) for dtype, parts in values.items()}
    return ArrayRecord(
        {LAYOUT: Array(np.frombuffer(layout_bytes(layout_of(tensors)), np.uint8)), **packed}
    )


def read_layout(record: ArrayRecord) -> Layout:
    """The layout of a record; raises ValueError where it has none or is not one."""
    if LAYOUT not in record:
        raise ValueError("there is no layout")
    values = record[LAYOUT].numpy()
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(f"the layout is {values.dtype} {values.shape}")
    layout = []
    for entry in json.loads(values.tobytes()):
        name, dtype, shape = entry
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            raise ValueError(f"the layout has {entry!r:.100}")
        if not all(type(extent) is int and extent >= 0 for extent in shape):
            raise ValueError(f"the layout gives {name!r:.100} the shape {shape!r:.100}")
        layout.append((name, dtype, tuple(shape)))
    return layout


def read_tensors(content: RecordDict, name: str) -> dict[str, Tensor]:
    """The tensors of one array record, in the order of the message.

    Raises:
        ValueError: no such record, or one that is not what its layout says.
    """
    if name not in content.array_records:
        raise ValueError(f"the message has no arrays {name!r}")
    record = content.array_records[name]
    layout = read_layout(record)
    values = {dtype: array.numpy() for dtype, array in record.items() if dtype != LAYOUT}
    used = dict.fromkeys(values, 0)
    tensors: dict[str, Tensor] = {}
    for key, dtype, shape in layout:
        size = math.prod(shape)
        if (
            key in tensors
            or dtype not in values
            or str(values[dtype].dtype) != dtype
            or values[dtype].ndim != 1
        ):
            raise ValueError(f"array {key!r:.100} of {dtype!r:.20} is named twice or has no values")
        part = values[dtype][used[dtype] : used[dtype] + size]
        if len(part) != size:
            raise ValueError(f"array {key!r:.100} lacks {size - len(part)} of its {size} values")
        used[dtype] += size
        # A copy, because tensors that share memory cannot be stored side by side.
        tensors[key] = torch.from_numpy(part.reshape(shape).copy())
    spare = {
        dtype: len(values[dtype]) - count
        for dtype, count in used.items()
        if len(values[dtype]) != count
    }
    if spare:
        raise ValueError(f"there are values that no array claims: {spare}")
    return tensors


def wire_bytes(layout: Layout) -> int:
    """Bytes of a record of such tensors, as counted of a record that holds them."""
    return array_record(zeros_of(layout)).count_bytes()


def content_bytes(content: RecordDict) -> int:
    """Bytes of a message's content: tensors with their names, and the other records as
    serialised.
    """
    total = 0
    for record in content.values():
        total += record.count_bytes() if isinstance(record, ArrayRecord) else len(record.deflate())
    return total


def message_bytes(message: Message) -> int:
    """As :func:`content_bytes`; an error reply counts its reason."""
    if message.has_content():
        return content_bytes(message.content)
    return len(message.error.reason or "")


def _content(name: str, values: Mapping[str, Any], arrays: Arrays | None = None) -> RecordDict:
    content = RecordDict({name: ConfigRecord(dict(values))})
    for record, tensors in (arrays or {}).items():
        content[record] = array_record(tensors)
    return content


def _fields(cls: type[Any], content: RecordDict, name: str) -> dict[str, Any]:
    record: Mapping[str, Any] = content.config_records.get(name, {})
    values = {}
    for entry in fields(cls):
        value = record.get(entry.name)
        if type(value) is not entry.type:
            raise ValueError(f"field {entry.name!r} of the {name} is {value!r}, not {entry.type}")
        values[entry.name] = value
    return values

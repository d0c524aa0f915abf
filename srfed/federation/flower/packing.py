"""Flower's records: how requests, replies and tensors become them, and are read again.

Tensors travel as Flower arrays (``.npy`` bytes, never pickled).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from srfed.federation.layout import Layout, layout_bytes, layout_of, zeros_of
from srfed.federation.messages import (
    METRICS,
    OLD_REQUEST,
    REFUSAL,
    REPLY,
    REQUEST,
    Description,
    Failure,
    Reply,
    ReplyHeader,
    Request,
    Samples,
)
from srfed.federation.updates import Delta
from srfed.flat import joined, parts
from srfed.networks.partition import Control, Shared

LAYOUT = "layout"
"""The array of a record that says what its other arrays hold."""
EMPTY = "-"
"""How an empty text travels: mods of Flower's that count bytes take an empty one for no text."""
Arrays = Mapping[str, Mapping[str, Tensor]]


def request_content(request: Request, arrays: Arrays | None = None) -> RecordDict:
    """A request, with tensors by the name of their record."""
    return _content(REQUEST, asdict(request), arrays)


def read_request(content: RecordDict) -> Request:
    """Read a request; raises RequestRefusedError as :meth:`Request.of`."""
    records = content.config_records
    return Request.of(_read(records.get(REQUEST if REQUEST in records else OLD_REQUEST, {})))


def description_content(description: Description) -> RecordDict:
    """A client's description of itself."""
    return _content(REPLY, asdict(description))


@dataclass(frozen=True)
class _Arrays:
    """A record of tensors, not read yet."""

    content: RecordDict
    name: str

    @property
    def count(self) -> int:
        return len(self._record)

    @property
    def layout_size(self) -> int:
        return len(self._record[LAYOUT].data) if LAYOUT in self._record else 0

    @property
    def value_size(self) -> int:
        return sum(len(array.data) for key, array in self._record.items() if key != LAYOUT)

    def read(self) -> dict[str, Tensor]:
        return read_tensors(self.content, self.name)

    @property
    def _record(self) -> ArrayRecord:
        return self.content.array_records[self.name]


def unpack(message: Message) -> Reply:
    """What came back from a client, as a value of our own; its tensors are not read yet."""
    if message.has_error():
        return Reply(Failure(message.error.code, message.error.reason or ""))
    content = message.content
    return Reply(
        records=tuple(content),
        header=_read(content.config_records.get(REPLY, {})),
        numbers=read_metrics(content),
        arrays={name: _Arrays(content, name) for name in content.array_records},
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
    arrays: Mapping[str, Shared | Delta | Control | Samples] | None = None,
) -> RecordDict:
    """A reply: its header, numbers and tensors: φ_i or its change, what travels in place of c_i,
    generated images, statistics.
    """
    content = _content(REPLY, asdict(header), arrays)
    content[METRICS] = MetricRecord({name: value for name, value in metrics.items()})
    return content


def read_metrics(content: RecordDict) -> dict[str, float | list[float]]:
    """The numbers of a reply; empty where it has none."""
    record: Mapping[str, Any] = content.metric_records.get(METRICS, {})
    return dict(record)


def array_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record: for each dtype one array with all their values, and an array that
    says whose.

    Flower asks for every array of a message separately, which costs a SuperLink far more than the
    bytes do.
    """
    layout, values = layout_of(tensors), dict[str, list[Tensor]]()
    for (_, dtype, _), tensor in zip(layout, tensors.values(), strict=True):
        values.setdefault(dtype, []).append(tensor.cpu())
    packed = {
        dtype: Array(joined(members, members[0].dtype).numpy()) for dtype, members in values.items()
    }
    return ArrayRecord({LAYOUT: Array(np.frombuffer(layout_bytes(layout), np.uint8)), **packed})


def digest_of(records: Mapping[str, ArrayRecord]) -> str:
    """SHA-256 of array records, as they travel: equal where they hold the same bits."""
    digest = hashlib.sha256()
    for name, record in sorted(records.items()):
        for key, array in sorted(record.items()):
            about = [name, key, array.dtype, list(array.shape), array.stype, len(array.data)]
            digest.update(json.dumps(about).encode() + array.data)
    return digest.hexdigest()


def attempt_of(request: Request, carried: str) -> str:
    """The name of the attempt that is to answer a request to train: it follows from the question
    (client, parent, round, and the digest of what is ``carried``), so that a question that is asked
    again has one answer, and leaves nothing more behind.
    """
    question = [request.lineage, request.client, request.parent, request.round, carried]
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()
    return f"round-{request.round:05d}-{digest[:16]}"


def read_layout(record: ArrayRecord) -> Layout:
    """The layout of a record; raises ValueError where it has none or is not one."""
    if LAYOUT not in record:
        raise ValueError("there is no layout")
    values = record[LAYOUT].numpy()
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(f"the layout is {values.dtype} {values.shape}")
    return list(_layout_of_bytes(values.tobytes()))


@lru_cache(maxsize=8)
def _layout_of_bytes(text: bytes) -> Layout:
    """The messages of a run have few, so each is read once."""
    layout = []
    for entry in json.loads(text):
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
    known = {d for d, array in values.items() if str(array.dtype) == d and array.ndim == 1}
    used = dict.fromkeys(values, 0)
    named: dict[str, dict[str, tuple[int, ...]]] = {dtype: {} for dtype in values}
    names: set[str] = set()
    for key, dtype, shape in layout:
        if key in names or dtype not in known:
            raise ValueError(f"array {key!r:.100} of {dtype!r:.20} is named twice or has no values")
        size, left = math.prod(shape), len(values[dtype]) - used[dtype]
        if left < size:
            raise ValueError(f"array {key!r:.100} lacks {size - left} of its {size} values")
        used[dtype] += size
        names.add(key)
        named[dtype][key] = shape
    spare = {
        dtype: len(values[dtype]) - count
        for dtype, count in used.items()
        if len(values[dtype]) != count
    }
    if spare:
        raise ValueError(f"there are values that no array claims: {spare}")
    found: dict[str, Tensor] = {}
    for dtype, shapes in named.items():
        if shapes:
            # Flower decodes an array anew at each reading, so nobody else has this memory.
            whole = torch.from_numpy(values[dtype])
            found.update(zip(shapes, parts(whole, list(shapes.values())), strict=True))
    return {key: found[key] for key, _, _ in layout}


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
    written = {key: EMPTY if value == "" else value for key, value in values.items()}
    content = RecordDict({name: ConfigRecord(written)})
    for record, tensors in (arrays or {}).items():
        content[record] = array_record(tensors)
    return content


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "" if value == EMPTY else value for key, value in record.items()}

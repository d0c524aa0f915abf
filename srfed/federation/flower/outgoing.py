"""The reply that leaves: made anew of the values that the contract lists, and of nothing else.

What the handler has made is read, never passed on: of its header the words that are expected, of
its numbers those declared, of its arrays their values. Whatever else a record of Flower's can hold
(shapes and types as announced, a serialisation's name, further fields) is written here.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from srfed import __version__
from srfed.federation.bounds import EvaluatePlan, Number, TrainPlan, exactly
from srfed.federation.contract import DESCRIBED, Form
from srfed.federation.flower.admission import Admitted
from srfed.federation.flower.packing import (
    LAYOUT,
    array_record,
    description_content,
    read_layout,
    read_tensors,
    reply_content,
)
from srfed.federation.last_look import look
from srfed.federation.layout import Layout, layout_bytes, value_bytes
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    GENERATED,
    METRICS,
    REPLY,
    VALIDATE,
    Description,
    ReplyHeader,
)
from srfed.federation.worker import features_for, worker_for
from srfed.storage.client_store import NO_PARENT
from srfed.training.part import ClientState

LOOKED_AT = 64
"""Of so many replies of a simulation one gets the last look. It leaves no machine, and a look takes
as long as ten local steps of a small network; a handler's mistake is found all the same."""
NPY_HEADER = 256
"""Bytes that an array may have beyond its values: numpy's header takes 128."""


class NotAllowedError(Exception):
    """A reply holds something that must not leave the client."""


def rebuilt(
    message: Message, admitted: Admitted, reply: Message, states: list[ClientState]
) -> Message:
    """The reply to a message, with what the contract lists of another one's content.

    Args:
        message: the request.
        admitted: what was admitted of it.
        reply: what the handler has made.
        states: what the owner keeps, as far as the handler has dealt with it.

    Raises:
        NotAllowedError: it holds something else, or lacks something.
        PrivateError: a piece of what must not leave is among it.
    """
    kind, content = message.metadata.message_type, reply.content
    form, words = _form(kind, admitted), _words(kind, admitted)
    records = {REPLY, *form.arrays, *([METRICS] if form.numbers else [])}
    if extra := [name for name in content if name not in records]:
        what = "arrays" if isinstance(content[extra[0]], ArrayRecord) else "record"
        raise NotAllowedError(f"{what} {extra[0]!r} in a reply to {kind}")
    if lacking := [name for name in sorted(records) if name not in content]:
        raise NotAllowedError(f"a reply to {kind} without record {lacking[0]!r}")
    _check_words(content, words, kind)
    if isinstance(words, Description):
        return Message(description_content(words), reply_to=message)
    numbers = _numbers(content, form, kind)
    arrays = {name: _tensors(content, name, form.arrays[name], kind) for name in form.arrays}
    told = [value if isinstance(value, list) else [value] for value in numbers.values()]
    came = message.content
    if _is_looked_at(admitted):
        look(
            {f"{name} {key}": t for name, tensors in arrays.items() for key, t in tensors.items()},
            [number for members in told for number in members],
            states,
            admitted.task,
            lambda: [t for name in came.array_records for t in read_tensors(came, name).values()],
            images=GENERATED not in arrays,
        )
    made = reply_content(words, numbers)
    for name, tensors in arrays.items():
        made[name] = array_record(tensors)
    return Message(
        RecordDict({name: made[name] for name in (REPLY, *arrays, METRICS)}), reply_to=message
    )


def _is_looked_at(admitted: Admitted) -> bool:
    """All that leaves under an owner's agreement is; of a simulation's clients, which have none,
    one after another, beginning with the first one's first round.
    """
    turn = admitted.site.index + admitted.request.round
    return admitted.agreement is not None or turn % LOOKED_AT == 1


def description_of(admitted: Admitted) -> Description:
    """What an owner says of itself."""
    site, task = admitted.site, admitted.task
    height, width, channels = task.shape
    return Description(
        client=site.client,
        task=task.name,
        index=site.index,
        height=height,
        width=width,
        channels=channels,
        images=len(task.train),
        test_images=len(task.test),
        partition=worker_for(admitted).partition_fingerprint,
        version=__version__,
    )


def _form(kind: str, admitted: Admitted) -> Form:
    """What a reply to this kind of request may hold."""
    if kind == DESCRIBE:
        return DESCRIBED
    config, request, task = admitted.config, admitted.request, admitted.task
    worker, (height, width, channels) = worker_for(admitted), task.train.shape[1:]
    if kind == EVALUATE:
        shape, images = (height, width, channels), (len(task.train), len(task.test))
        plan = EvaluatePlan.of(
            config,
            shape,
            *images,
            request.samples,
            request.final,
            compared=request.parent != NO_PARENT,
        )
        dimension = features_for(admitted).dimension_of(channels) if plan.statistics else None
        return worker.contract.evaluated(plan, dimension)
    if kind == VALIDATE:
        return worker.contract.validated(exactly(len(task.validation)))
    return worker.contract.trained(
        TrainPlan.of(
            config, worker.partition, admitted.site.client, len(task.train), 0, request.round
        )
    )


def _words(kind: str, admitted: Admitted) -> Description | ReplyHeader:
    """The header of the reply: all of it is known beforehand."""
    site, request = admitted.site, admitted.request
    if kind == DESCRIBE:
        return description_of(admitted)
    statistics = kind == EVALUATE and admitted.config.evaluation.mode == "statistics"
    features = features_for(admitted).fingerprint if statistics else ""
    return ReplyHeader(site.client, request.attempt, request.round, features)


def _check_words(content: RecordDict, words: Description | ReplyHeader, kind: str) -> None:
    # As they travel, an empty text in its own way.
    expected: Mapping[str, Any] = (
        description_content(words) if isinstance(words, Description) else reply_content(words, {})
    ).config_records[REPLY]
    record = content[REPLY]
    if not isinstance(record, ConfigRecord):
        raise NotAllowedError(f"record {REPLY!r} of a reply to {kind} has no fields")
    if unlike := sorted(set(record) ^ set(asdict(words))):
        raise NotAllowedError(f"field {unlike[:1]} in record {REPLY!r} of a reply to {kind}")
    for key, value in expected.items():
        if type(record[key]) is not type(value) or record[key] != value:
            raise NotAllowedError(f"field {key!r} of a reply to {kind} is not {value!r}")


def _numbers(content: RecordDict, form: Form, kind: str) -> dict[str, float | list[float]]:
    """The declared numbers, each as a double of its range; one beyond it as infinity, which the
    server refuses by its name.
    """
    if not form.numbers:
        return {}
    record: Mapping[str, Any] = content.metric_records.get(METRICS, {})
    declared = form.numbers_of(record)
    if set(record) != set(declared):
        unlike = sorted(set(record) ^ set(declared))
        raise NotAllowedError(f"number {unlike[:1]} too many or missing in a reply to {kind}")
    numbers: dict[str, float | list[float]] = {}
    for name, sent in record.items():
        number = declared[name]
        if not number.fits(sent):
            raise NotAllowedError(f"another list or number as {name!r} in a reply to {kind}")
        numbers[name] = (
            [_number(name, number, member, kind) for member in sent]
            if isinstance(sent, list)
            else _number(name, number, sent, kind)
        )
    return numbers


def _number(name: str, number: Number, sent: float, kind: str) -> float:
    if number.allows(sent):
        return math.nan if math.isnan(sent) else float(sent)
    if number.whole or number.low == number.high:
        raise NotAllowedError(f"number {name!r} of a reply to {kind} is not {number}")
    return math.nan if math.isnan(sent) else math.copysign(math.inf, sent)


def _tensors(content: RecordDict, name: str, expected: Layout, kind: str) -> dict[str, Tensor]:
    """The values of a record whose names, types, shapes and their order are the contract's to the
    byte.
    """
    if not isinstance(record := content[name], ArrayRecord):
        raise NotAllowedError(f"record {name!r} of a reply to {kind} has no arrays")
    layout = np.frombuffer(layout_bytes(expected), np.uint8)
    sizes = {LAYOUT: len(layout)}
    for entry in expected:
        sizes[entry[1]] = sizes.get(entry[1], 0) + value_bytes([entry])
    if LAYOUT not in record or not np.array_equal(record[LAYOUT].numpy(), layout):
        sent, known = read_layout(record), dict.fromkeys(expected)
        wrong = next((entry for entry in sent if entry not in known), None)
        raise NotAllowedError(
            f"arrays {name!r} in a reply to {kind} are not those asked for: {wrong or sent[:1]}"
        )
    if set(record) != set(sizes):
        raise NotAllowedError(
            f"arrays {sorted(set(record) ^ set(sizes))[:3]} among {name!r} in a reply to {kind}"
        )
    for key, size in sizes.items():
        if len(record[key].data) > size + NPY_HEADER:
            raise NotAllowedError(
                f"array {key!r} among {name!r} has {len(record[key].data)} bytes, where {size} "
                "were asked for"
            )
    return read_tensors(content, name)

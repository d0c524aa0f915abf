"""The wire guard: a Flower mod that lets nothing out of a client but what the protocol lists.

It reads the finished reply, not the code that made it: an exclusive tensor, an optimizer moment of
θ_i, an array of images that the request did not ask for, an unknown number or the text of an
exception turns the reply into a bare error. The reason goes to the client's own log.
"""

import math
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from srfed.config import RunConfig, parse_config_json
from srfed.evaluation.memorisation import Memorisation
from srfed.federation.messages import (
    AUDIT,
    DESCRIBE,
    EVALUATE,
    FAILED,
    GENERATED,
    LAYOUT,
    METRICS,
    REPLY,
    SETS,
    SHARED,
    SHARED_MOMENTS,
    STATISTICS,
    TRAIN,
    Description,
    Layout,
    ReplyHeader,
    Request,
    layout_bytes,
    layout_of,
    read_layout,
)
from srfed.federation.runtime import runtime_for
from srfed.federation.screening import moment_templates
from srfed.federation.site import own_task, site_of
from srfed.federation.site_log import write_to_log
from srfed.training.local import LOSS_QUARTERS

TRAIN_METRICS = frozenset({"examples", "loss", "loss_by_quarter", "images", "seconds", "shared_steps"})
EVALUATE_METRICS = frozenset({"ssim", "ssim_timesteps", "ssim_images", "ssim_window", "seconds"}) | {
    f"{AUDIT}{space}_{field.name}" for space in ("pixels", "features") for field in fields(Memorisation)
}
MOMENT_COUNTS = frozenset(f"{name}_count" for name in SETS)
LONGEST_TEXT = 200
NPY_HEADER = 256
"""Bytes that an array may have beyond its values: numpy's header takes 128."""


class NotAllowedError(Exception):
    """A reply holds something that must not leave the client."""


def wire_guard(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Run the handler; pass its reply on only if the protocol allows every part of it."""
    try:
        reply = call_next(message, context)
        if reply.has_error():
            raise NotAllowedError("the handler made an error reply of its own")
        check_outgoing(message, context, reply.content)
        return reply
    except Exception:
        _log(message, context, traceback.format_exc())
        # The exception's text may quote data or paths, so the server learns only that there was one.
        return Message(Error(FAILED, "failed; the reason is in the client's own log"), reply_to=message)


def check_outgoing(message: Message, context: Context, content: RecordDict) -> None:
    """Compare a reply with what its request allows; raises NotAllowedError naming what it must not hold."""
    request = Request.of(message.content)
    config = parse_config_json(request.config)
    kind = message.metadata.message_type
    arrays, metrics, header = _allowed(kind, config, request, context)
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            if name not in arrays:
                raise NotAllowedError(f"arrays {name!r} in a reply to {kind}")
            _check_arrays(name, record, arrays[name], kind)
        elif isinstance(record, MetricRecord):
            extra = sorted(set(record) - metrics)
            if name != METRICS or extra:
                raise NotAllowedError(f"number {extra[:1]} in record {name!r} of a reply to {kind}")
            longest = max(LOSS_QUARTERS, 1 + len(config.evaluation.ssim_curve))
            if any(isinstance(value, list) and len(value) > longest for value in record.values()):
                raise NotAllowedError(f"a list of more than {longest} numbers in a reply to {kind}")
        elif isinstance(record, ConfigRecord):
            extra = sorted(set(record) - header)
            if name != REPLY or extra:
                raise NotAllowedError(f"field {extra[:1]} in record {name!r} of a reply to {kind}")
            for key, value in record.items():
                if not isinstance(value, (int, str)) or len(str(value)) > LONGEST_TEXT:
                    raise NotAllowedError(f"field {key!r} of a reply to {kind} is no short text or number")


def _check_arrays(name: str, record: ArrayRecord, expected: Layout, kind: str) -> None:
    """Names, dtypes, shapes and their order must be the protocol's to the byte, so that only values are free."""
    layout = np.frombuffer(layout_bytes(expected), np.uint8)
    if LAYOUT not in record or not np.array_equal(record[LAYOUT].numpy(), layout):
        sent, known = read_layout(record), dict.fromkeys(expected)
        wrong = next((entry for entry in sent if entry not in known), None)
        raise NotAllowedError(f"arrays {name!r} in a reply to {kind} are not those asked for: {wrong or sent[:1]}")
    sizes = {LAYOUT: len(layout)}
    for _, dtype, shape in expected:
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape) * np.dtype(dtype).itemsize
    if set(record) != set(sizes):
        raise NotAllowedError(f"arrays {sorted(set(record) ^ set(sizes))} among {name!r} in a reply to {kind}")
    for key, size in sizes.items():
        dtype = "uint8" if key == LAYOUT else key
        if record[key].dtype != dtype or len(record[key].data) > size + NPY_HEADER:
            raise NotAllowedError(
                f"array {key!r} among {name!r} is {record[key].dtype} with {len(record[key].data)} bytes, "
                f"where {dtype} with {size} were asked for"
            )


def _allowed(
    kind: str, config: RunConfig, request: Request, context: Context
) -> tuple[dict[str, Layout], frozenset[str], frozenset[str]]:
    """Arrays by record, metric names and header fields that a reply to this kind may hold."""
    header = frozenset(field.name for field in fields(ReplyHeader))
    if kind == DESCRIBE:
        return {}, frozenset(), frozenset(field.name for field in fields(Description))
    shape = own_task(config.data, site_of(context, config)).train.shape[1:]
    if kind == EVALUATE and config.evaluation.mode == "moments":
        dimension = runtime_for(request, shape[-1]).feature_network.dimension_of(shape[-1])
        shapes = {"mean": (dimension,), "scatter": (dimension, dimension)}
        layout: Layout = [(f"{name}.{part}", "float64", size) for name in SETS for part, size in shapes.items()]
        return {STATISTICS: layout}, EVALUATE_METRICS | MOMENT_COUNTS, header
    if kind == EVALUATE:
        counts = {"images": request.samples, "strip": config.evaluation.strip_steps if request.samples else 0}
        return {GENERATED: [(name, "uint8", (n, *shape)) for name, n in counts.items()]}, EVALUATE_METRICS, header
    if kind == TRAIN:
        runtime = runtime_for(request, shape[-1])
        shared = runtime.partition.take_shared(runtime.model.state_dict())
        arrays = {SHARED: layout_of(shared)}
        if config.training.shared_moments == "average":
            arrays[SHARED_MOMENTS] = layout_of(moment_templates(shared))
        return arrays, TRAIN_METRICS, header
    raise NotAllowedError(f"a reply to a message of unknown kind {kind!r}")


def _log(message: Message, context: Context, text: str) -> None:
    """Append to the client's own log, or to standard error where even its site is unknown."""
    site = None
    with suppress(Exception):
        site = site_of(context, parse_config_json(Request.of(message.content).config))
    write_to_log(site, message.metadata.message_type, text)

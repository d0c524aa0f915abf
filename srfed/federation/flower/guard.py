"""The wire guard: a Flower mod that lets nothing out of a client but what the protocol lists.

It reads the finished reply, not the code that made it: an exclusive tensor, an optimizer moment of
θ_i, an array of images that the request did not ask for, an unknown number or the text of an
exception turns the reply into a bare error. The reason goes to the client's own log.
"""

import math
import traceback
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from srfed.config import parse_config_json
from srfed.errors import UserError
from srfed.federation.agreement import RequestRefusedError
from srfed.federation.bounds import EvaluatePlan, TrainPlan, exactly
from srfed.federation.contract import DESCRIBED, Form
from srfed.federation.flower.admission import Admitted, admit
from srfed.federation.flower.keeping import checked_first
from srfed.federation.flower.packing import LAYOUT, read_layout, read_request
from srfed.federation.layout import Layout, layout_bytes
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    FAILED,
    LOST_STORE,
    METRICS,
    REFUSED,
    REPLY,
    VALIDATE,
)
from srfed.federation.mods import with_mods
from srfed.federation.site import Site, deployed_site, is_simulated, site_of
from srfed.federation.site_log import write_to_log
from srfed.federation.worker import features_for, worker_for
from srfed.storage.client_store import NO_PARENT

LONGEST_TEXT = 200
NPY_HEADER = 256
"""Bytes that an array may have beyond its values: numpy's header takes 128."""


class NotAllowedError(Exception):
    """A reply holds something that must not leave the client."""


def wire_guard(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Run the handler for what the owner has agreed to; pass its reply on only if every part of it
    is allowed.
    """
    try:
        admitted = admit(message, context)
        own = () if admitted.agreement is None else admitted.agreement.mods
        with checked_first() as store:
            reply: Message = with_mods(own, call_next)(message, context)
            if reply.has_error():
                raise NotAllowedError("the handler made an error reply of its own")
            check_outgoing(message.metadata.message_type, admitted, reply.content)
            store()
        return reply
    except RequestRefusedError as refusal:
        _log(
            message,
            context,
            f"refused: {refusal}" + (f" ({refusal.detail})" if refusal.detail else ""),
            once=refusal.lost,
        )
        code = LOST_STORE if refusal.lost else REFUSED
        return Message(Error(code, str(refusal)), reply_to=message)
    except UserError as error:
        _log(message, context, f"failed: {error}")
    except Exception:
        _log(message, context, traceback.format_exc())
    return _failed(message)


class GuardedApp(ClientApp):
    """A ClientApp whose mods may fail outside the guard too: that is told in the client's own log,
    and the server learns only that there was a failure. Flower itself would send the exception's
    text.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            return super().__call__(message, context)
        except Exception:
            _log(message, context, traceback.format_exc())
            return _failed(message)


def check_outgoing(kind: str, admitted: Admitted, content: RecordDict) -> None:
    """Compare a reply with what was admitted; raises NotAllowedError naming what it must not
    hold.
    """
    form = _form(kind, admitted)
    numbers = form.all_numbers
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            if name not in form.arrays:
                raise NotAllowedError(f"arrays {name!r} in a reply to {kind}")
            _check_arrays(name, record, form.arrays[name], kind)
        elif isinstance(record, MetricRecord):
            extra = sorted(set(record) - set(numbers))
            if name != METRICS or extra:
                raise NotAllowedError(f"number {extra[:1]} in record {name!r} of a reply to {kind}")
            if unlike := [key for key, sent in record.items() if not numbers[key].fits(sent)]:
                raise NotAllowedError(
                    f"another list or number as {unlike[0]!r} in a reply to {kind}"
                )
        elif isinstance(record, ConfigRecord):
            extra = sorted(set(record) - form.header)
            if name != REPLY or extra:
                raise NotAllowedError(f"field {extra[:1]} in record {name!r} of a reply to {kind}")
            for key, value in record.items():
                if not isinstance(value, (int, str)) or len(str(value)) > LONGEST_TEXT:
                    raise NotAllowedError(
                        f"field {key!r} of a reply to {kind} is no short text or number"
                    )


def _check_arrays(name: str, record: ArrayRecord, expected: Layout, kind: str) -> None:
    """Names, dtypes, shapes and their order must be the protocol's to the byte, so that only values
    are free.
    """
    layout = np.frombuffer(layout_bytes(expected), np.uint8)
    if LAYOUT not in record or not np.array_equal(record[LAYOUT].numpy(), layout):
        sent, known = read_layout(record), dict.fromkeys(expected)
        wrong = next((entry for entry in sent if entry not in known), None)
        raise NotAllowedError(
            f"arrays {name!r} in a reply to {kind} are not those asked for: {wrong or sent[:1]}"
        )
    sizes = {LAYOUT: len(layout)}
    for _, dtype, shape in expected:
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape) * np.dtype(dtype).itemsize
    if set(record) != set(sizes):
        raise NotAllowedError(
            f"arrays {sorted(set(record) ^ set(sizes))} among {name!r} in a reply to {kind}"
        )
    for key, size in sizes.items():
        dtype = "uint8" if key == LAYOUT else key
        if record[key].dtype != dtype or len(record[key].data) > size + NPY_HEADER:
            raise NotAllowedError(
                f"array {key!r} among {name!r} is {record[key].dtype} with {len(record[key].data)} "
                f"bytes, where {dtype} with {size} were asked for"
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


def _failed(message: Message) -> Message:
    # The text of an exception may quote data or paths, so the server learns only that there was
    # one.
    return Message(Error(FAILED, "failed; the reason is in the client's own log"), reply_to=message)


def _log(message: Message, context: Context, text: str, *, once: bool = False) -> None:
    """Append to the client's own log, or to standard error where even its site is unknown; what is
    said ``once`` is not said again as long as the log has it.
    """
    site = None
    # What is logged may be the very thing that keeps the site from being known; it is not lost.
    with suppress(Exception):
        site = _site(message, context)
        if once and site.says(text):
            return
    write_to_log(site, message.metadata.message_type, text)


def _site(message: Message, context: Context) -> Site:
    """Whose log it is: a deployed site knows that whatever the message says."""
    if not is_simulated(context):
        return deployed_site(context.node_config)
    return site_of(context, parse_config_json(read_request(message.content).config))

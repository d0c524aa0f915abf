"""The wire guard: a Flower mod that lets nothing out of a client but what the protocol lists.

It reads the finished reply, not the code that made it, and makes another one of the values that the
contract lists (:mod:`srfed.federation.flower.outgoing`): an exclusive tensor, an optimizer moment
of θ_i, an array of images that the request did not ask for, an unknown number or the text of an
exception turns the reply into a bare error. The reason goes to the client's own log.
"""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from srfed.config import parse_config_json
from srfed.errors import UserError
from srfed.federation.agreement import RequestRefusedError
from srfed.federation.asked import noted_asked
from srfed.federation.exits import exits_are_failures
from srfed.federation.flower.admission import admit
from srfed.federation.flower.outgoing import NotAllowedError, rebuilt
from srfed.federation.flower.packing import read_request
from srfed.federation.keeping import checked_first
from srfed.federation.last_look import looked_after
from srfed.federation.messages import DESCRIBE, FAILED, GPU_FAILED, LOST_STORE, REFUSED
from srfed.federation.mods import with_mods
from srfed.federation.site import Site, deployed_site, is_simulated, site_of
from srfed.federation.site_log import write_to_log
from srfed.memory import failure_of_gpu

FAILURE = "failed; the reason is in the client's own log"
"""All that the server is told of an exception."""


def wire_guard(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Run the handler for what the owner has agreed to; pass its reply on only if every part of it
    is allowed.
    """
    try:
        # Images that are read for the first time are kept with the first message that is answered.
        with exits_are_failures(), checked_first() as store:
            admitted = admit(message, context)
            own = () if admitted.agreement is None else admitted.agreement.mods
            with looked_after() as states:
                reply: Message = with_mods(own, call_next)(message, context)
                if reply.has_error():
                    raise NotAllowedError("the handler made an error reply of its own")
                answer = rebuilt(message, admitted, reply, states)
            kind, agreement = message.metadata.message_type, admitted.agreement
            noted: AbstractContextManager[None] = nullcontext()
            if agreement and admitted.question and kind != DESCRIBE:
                noted = noted_asked(admitted.site.folder, agreement, kind, admitted.question)
            with noted:
                store()
        return answer
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
    except Exception as error:
        _log(message, context, traceback.format_exc())
        if failure_of_gpu(error) and is_simulated(context):
            return Message(Error(GPU_FAILED, "its GPU has failed"), reply_to=message)
    return _failed(message)


class GuardedApp(ClientApp):
    """A ClientApp whose mods may fail outside the guard too: that is told in the client's own log,
    and the server learns only that there was a failure. Flower itself would send the exception's
    text.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            with exits_are_failures():
                return super().__call__(message, context)
        except Exception:
            _log(message, context, traceback.format_exc())
            return _failed(message)


def _failed(message: Message) -> Message:
    # The text of an exception may quote data or paths, so the server learns only that there was
    # one.
    return Message(Error(FAILED, FAILURE), reply_to=message)


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

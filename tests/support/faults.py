"""Clients that fail or lie."""

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from srfed.federation.flower import client_app
from srfed.federation.messages import METRICS, REPLY

Faults = list[Callable[[Message], Message | None]]
"""What becomes of a client's first, second, ... reply: changed in place, or another one."""


def app_with(
    offender: int, train: Faults | None = None, evaluate: Faults | None = None
) -> ClientApp:
    """The real handlers, without the guard: a hostile client has none."""
    app = ClientApp()

    def faulty(
        handler: Callable[[Message, Context], Message], faults: Faults | None
    ) -> Callable[..., Message]:
        left = list(faults or [])

        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            if context.node_config["partition-id"] != offender or not left:
                return reply
            return left.pop(0)(reply) or reply

        return handle

    app.query("describe")(client_app.describe)
    app.train()(faulty(client_app.train, train))
    app.evaluate()(faulty(client_app.evaluate, evaluate))
    return app


def fail(reply: Message) -> None:
    raise RuntimeError("no such luck")


Tensors = dict[str, torch.Tensor]


def set_field(name: str, value: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        reply.content.config_records[REPLY][name] = value

    return change


def set_number(name: str, value: Any) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        reply.content.metric_records[METRICS][name] = value

    return change


def without(record: str) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        del reply.content[record]

    return change

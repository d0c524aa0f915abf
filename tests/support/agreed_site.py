"""A deployed site with an owner's agreement, and what a server asks of it, in this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.deployment.agree import agree_as_rehearsed
from srfed.federation.flower.client_app import app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import request_content
from srfed.federation.messages import DESCRIBE, EVALUATE, REFUSED, SHARED, TRAIN, VALIDATE, Request
from srfed.model import build_model, build_partition
from support.tiny_run import tiny_config

CLIENT = "clinic-a"
MOMENTS = {
    "evaluation.mode": "statistics",
    "evaluation.samples": 60,
    "evaluation.samples_between": 60,
}


class AgreedSite:
    """A deployed site with the images of digit-0, and the messages that a server sends it."""

    def __init__(
        self,
        folder: Path,
        overrides: Mapping[str, Any] = MOMENTS,
        agreed: bool = True,
        client_app: ClientApp = app,
    ) -> None:
        self.config = tiny_config(overrides)
        self.state = folder / "state"
        self.data = folder / "images.npz"
        (task,) = load_tasks(self.config.data, 1)
        np.savez(self.data, train_images=task.train, test_images=task.test)
        self.grid = InlineGrid(client_app, 0)
        node_config = {"client-id": CLIENT, "data": str(self.data), "state-dir": str(self.state)}
        self.grid._contexts[1] = Context(0, 1, node_config, RecordDict(), {})
        model = build_model(self.config, 1)
        self.shared = build_partition(self.config, model).take_shared(model.state_dict())
        if agreed:
            agree_as_rehearsed(self.config, self.data, self.state, CLIENT)

    def ask(self, kind: str, config: RunConfig | str | None = None, **fields: Any) -> Message:
        asked = self.config if config is None else config
        text = asked if isinstance(asked, str) else asked.to_json()
        number = {TRAIN: 1, EVALUATE: 2, VALIDATE: 2, DESCRIBE: 0}[kind]
        values = {
            "lineage": "lineage",
            "client": CLIENT,
            "round": number,
            "attempt": f"attempt-{number}",
            **fields,
        }
        if kind == EVALUATE:
            values = {"samples": 20, **values}
        content = request_content(
            Request(text, **values), {SHARED: self.shared} if kind != DESCRIBE else None
        )
        return self.grid.send_and_receive([Message(content, 1, kind)])[0]

    @property
    def stored(self) -> list[str]:
        """What training has left behind."""
        return [
            str(path.relative_to(self.state))
            for path in self.state.rglob("*.safetensors")
            if "images-" not in path.name
        ]

    @property
    def log(self) -> str:
        return (self.state / CLIENT / "client.log").read_text()


def refusal(reply: Message) -> str:
    assert reply.has_error(), "it was served"
    assert reply.error.code == REFUSED, reply.error.reason
    return reply.error.reason or ""

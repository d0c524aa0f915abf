"""What clients and servers store."""

import torch

from srfed.storage.server_checkpoints import RunState
from srfed.training.local import ClientState


def client_state(value: float) -> ClientState:
    tensors = {"head.weight": torch.full((64, 64), value)}
    average = {"head.weight": tensors["head.weight"].clone()}
    return ClientState(
        tensors, average, {"step.head.weight": torch.tensor(value)}, {}, int(value), 1
    )


def server_state(number: int) -> RunState:
    shared, average = ({"w": torch.full((64, 64), float(number))} for _ in range(2))
    return RunState(
        "lineage", number, shared, average, attempts={"a": f"a-{number}"}, shape=(8, 8, 1)
    )

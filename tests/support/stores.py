"""What clients and servers store."""

import torch

from srfed.storage.server_checkpoints import RunState
from srfed.training.part import ClientState, Part


def client_state(value: float) -> ClientState:
    tensors = {"head.weight": torch.full((64, 64), value)}
    average = {"head.weight": tensors["head.weight"].clone()}
    moments = {"step.head.weight": torch.tensor(value)}
    return ClientState(Part(tensors, average, moments, 1), minibatches=int(value))


def server_state(number: int) -> RunState:
    shared, average = ({"w": torch.full((64, 64), float(number))} for _ in range(2))
    return RunState(
        "lineage",
        number,
        Part(shared, average),
        attempts={"a": f"a-{number}"},
        shapes={"a": (8, 8, 1)},
    )

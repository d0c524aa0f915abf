"""φ and c that come down as codes: against closed forms, over the messages of whole runs, and from
servers that do otherwise.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from srfed.config import RunConfig
from srfed.data import load_tasks
from srfed.deployment.agree import fits, in_words, propose
from srfed.deployment.check import check_site
from srfed.errors import UserError
from srfed.federation.agreement import Agreement, LeastImages
from srfed.federation.coming import decode_coming, encode_shared
from srfed.federation.control import encode_sent
from srfed.federation.flower import client_app
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import (
    content_bytes,
    read_tensors,
    request_content,
)
from srfed.federation.layout import layout_of
from srfed.federation.messages import CONTROL, EVALUATE, SHARED, TRAIN, Request
from srfed.federation.updates import norm_of
from srfed.federation.updates.quantise import SCALES
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.local import LocalTrainer
from srfed.training.part import initial_state
from support.aggregation import aggregated
from support.membership import failure
from support.tiny_run import (
    CHEAP,
    StoppingGrid,
    all_bits,
    begin,
    round_lines,
    run_in_process,
    run_on_grid,
    tiny_config,
)

MOST = {8: 127, 4: 7}
CONTROLLED: dict[str, Any] = {"training.control_variates": True}
UP: dict[str, Any] = {"updates.steps": ["quantise"], "updates.quantise_bits": 4}
SITE: dict[str, Any] = {
    "evaluation.mode": "statistics",
    "evaluation.samples": 60,
    "evaluation.samples_between": 60,
}
Tensors = dict[str, Tensor]


def bits_of(bits: int | None) -> dict[str, Any]:
    return {"updates.shared_bits": bits}


def weights_of(run: RunFolder, number: int) -> Tensors:
    """φ after a round."""
    found = read_checkpoint(run.server / f"round-{number:05d}").group("shared")
    partition = build_partition(run.config, build_model(run.config, 1))
    return {name: found[name] for name in partition.shared}


def tensors_of(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (40, 30), "odd": (3, 5, 1), "one": ()}
    return {
        **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        "zeros": torch.zeros(3),
        "empty": torch.zeros(0, 4),
        "tiny": torch.tensor([1e-45, 0.0]),
    }


# --- Codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_each_value_comes_as_a_code_beside_it_and_both_sides_have_the_same(bits: int) -> None:
    config, shared = tiny_config(bits_of(bits)), Shared(tensors_of(1))
    codes, stood_for = encode_shared(config, shared, 3)
    came = decode_coming(config.updates, codes, layout_of(shared))
    assert layout_of(came) == layout_of(shared)
    for name, tensor in shared.items():
        assert torch.equal(came[name], stood_for[name])
        if tensor.numel():
            scale = float(tensor.abs().max()) / MOST[bits]
            assert float((came[name] - tensor).abs().max()) <= 1.001 * scale + 1e-44
    again, _ = encode_shared(config, shared, 3)
    other, _ = encode_shared(config, shared, 4)
    assert all(torch.equal(codes[name], again[name]) for name in codes)
    assert not torch.equal(codes["w"], other["w"])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_comes_is_right_on_average_over_rounds(bits: int) -> None:
    config, shared = tiny_config(bits_of(bits)), Shared({"w": tensors_of(5)["w"]})
    tries, scale = 400, float(shared["w"].abs().max()) / MOST[bits]
    total = torch.zeros(shared["w"].shape, dtype=torch.float64)
    for number in range(tries):
        total += encode_shared(config, shared, number)[1]["w"].double()
    off = float((total / tries - shared["w"]).abs().max())
    assert off < 6 * scale / 2 / math.sqrt(tries)


def test_without_the_setting_the_tensors_themselves_go() -> None:
    shared = Shared(tensors_of(2))
    sent, stood_for = encode_shared(tiny_config(), shared, 1)
    assert sent is stood_for is shared


def test_a_phi_with_values_that_are_none_is_one_sentence() -> None:
    shared = Shared(tensors_of(3))
    shared["w"][0, 0] = math.nan
    assert failure(lambda: encode_shared(tiny_config(bits_of(8)), shared, 4)) == (
        "φ of round 4 has values that are not finite"
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_c_comes_right_on_average_and_no_longer_than_clipped_gradients(bits: int) -> None:
    config = tiny_config({**CONTROLLED, **bits_of(bits), "training.gradient_clip": 0.7})
    whole = {name: tensor for name, tensor in tensors_of(4).items() if name in ("w", "odd")}
    factor = 0.7 / norm_of(whole)
    control = {name: factor * tensor.double() for name, tensor in whole.items()}
    total = {name: torch.zeros_like(tensor) for name, tensor in control.items()}
    tries = 200
    for number in range(tries):
        codes = encode_sent(config, control, whole, number)
        came = decode_coming(config.updates, codes, layout_of(whole))
        assert norm_of(came) <= 0.7 * (1 + 1e-6)
        for name, tensor in came.items():
            total[name] += tensor.double() / tries
    for name, tensor in control.items():
        # Shortening takes the same part of every value away.
        share = float((total[name] * tensor).sum() / tensor.square().sum())
        scale = float(tensor.abs().max()) / MOST[bits]
        assert 0.9 < share < 1.001
        off = float((total[name] - share * tensor).abs().max())
        assert off < 6 * scale / 2 / math.sqrt(tries)


def test_a_mean_is_of_changes_from_what_came() -> None:
    """By hand, with weights 1/4 and 3/4."""
    shared, start = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.25])}
    updates = {"a": {"w": torch.tensor([2.25])}, "b": {"w": torch.tensor([0.25])}}
    weights = {"a": 0.25, "b": 0.75}
    settings = tiny_config({"federation.server_optimizer": "average"}).federation
    outcome = aggregated(settings, shared, updates, weights, {}, start)
    assert outcome.shared["w"].item() == 0.5
    assert outcome.update_norm == 0.5


# --- Whole runs ----------------------------------------------------------------------------------


class RecordingGrid(InlineGrid):
    """Keeps every request and its reply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[Message, Message]] = []

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        self.seen.append((message, reply))
        return reply

    def trained(self, number: int) -> list[tuple[Message, Message]]:
        return [
            pair
            for pair in self.seen
            if pair[0].metadata.message_type == TRAIN and pair[0].metadata.group_id == str(number)
        ]


def recorded(run: RunFolder) -> RecordingGrid:
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    return grid


def by_hand(request: Message, bits: int, shared: Mapping[str, Tensor]) -> Tensors:
    """What the codes of a request stand for."""
    codes = read_tensors(request.content, SHARED)
    scales = dict(zip(shared, codes.pop(SCALES).tolist(), strict=True))
    if bits == 4:
        for name, packed in codes.items():
            halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten().int() - 8
            codes[name] = halves[: shared[name].numel()].reshape(shared[name].shape)
    return {name: (codes[name].double() * scales[name]).float() for name in shared}


@pytest.mark.parametrize("bits", [8, 4])
def test_one_client_and_one_step_move_phi_by_the_change_of_what_came(
    tmp_path: Path, bits: int
) -> None:
    """φ^{r+1} = φ^r + Δ(φ̂), to the bit; Δ by a trainer of our own."""
    settings = {
        **CHEAP,
        **bits_of(bits),
        "federation.clients": 1,
        "federation.rounds": 2,
        "federation.server_optimizer": "average",
        "training.local_steps": 1,
        "training.optimizer": "sgd",
        "training.learning_rate": 0.05,
    }
    run = begin(tmp_path / "run", settings)
    grid = recorded(run)
    model = build_model(run.config, 1)
    partition = build_partition(run.config, model)
    images = load_tasks(run.config.data, 1)[0].train
    cpu = torch.device("cpu")
    state = initial_state(model, partition)
    trainer = LocalTrainer(
        run.config, model, partition, build_objective(run.config, cpu), "digit-0", images
    )
    for number in (1, 2):
        ((request, reply),) = grid.trained(number)
        before, after = weights_of(run, number - 1), weights_of(run, number)
        came = by_hand(request, bits, before)
        result = trainer.train(number, Shared(came), state)
        state = result.state
        sent = read_tensors(reply.content, SHARED)
        for name, tensor in before.items():
            assert torch.equal(result.shared[name], sent[name])
            change = result.shared[name].double() - came[name].double()
            assert torch.equal(after[name], (tensor.double() + change).float()), name
        assert any(not torch.equal(came[name], before[name]) for name in came)


@pytest.mark.parametrize("steps", [[], ["quantise"]], ids=["as trained", "quantised"])
def test_phi_does_not_drift_where_nothing_is_learned(tmp_path: Path, steps: list[str]) -> None:
    """At a rate that is 0 in float32 φ has the same bits after three rounds of rounding."""
    still = {"training.optimizer": "sgd", "training.learning_rate": 1e-60}
    settings = {**CHEAP, **still, **bits_of(4), "updates.steps": steps, "training.local_steps": 1}
    run = begin(tmp_path / "run", settings)
    grid = recorded(run)
    first, last = weights_of(run, 0), weights_of(run, 3)
    assert all(torch.equal(first[name], last[name]) for name in first)
    came = by_hand(grid.trained(3)[0][0], 4, first)
    assert not all(torch.equal(came[name], first[name]) for name in first)
    # Held to φ itself, what rounding has moved would be longer than any step.
    assert not any(line["refused"] or line["shortened"] for line in round_lines(run))


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 4), (4, 1 / 8)])
def test_bytes_down_fall_with_the_bits_and_all_clients_get_the_same(
    tmp_path: Path, bits: int, share: float
) -> None:
    settings = {**CHEAP, **CONTROLLED, **bits_of(bits)}
    run = begin(tmp_path / "run", {**settings, "federation.rounds": 2, "training.local_steps": 1})
    grid = recorded(run)
    count = sum(tensor.numel() for tensor in weights_of(run, 0).values())
    for number, line in enumerate(round_lines(run), start=1):
        requests = [request.content for request, _ in grid.trained(number)]
        assert line["bytes_down"] == sum(map(content_bytes, requests))
        # φ and c. Names, shapes and the configuration do not get smaller: 5 kB each of 200 kB.
        assert share < line["bytes_down"] / (3 * 2 * 4 * count) < share + 0.04
        for record in (SHARED, CONTROL):
            first, *others = (read_tensors(content, record) for content in requests)
            assert all(torch.equal(one[name], first[name]) for one in others for name in first)
    evaluations = [r for r, _ in grid.seen if r.metadata.message_type == EVALUATE]
    assert evaluations
    average = ServerCheckpoints(run.server, 9).load_last().shared.average
    for request in evaluations:
        came = read_tensors(request.content, SHARED)
        assert all(torch.equal(came[name], tensor) for name, tensor in average.items())


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    settings = {**CHEAP, **UP, **CONTROLLED, **bits_of(8)}
    whole = run_in_process(begin(tmp_path / "whole", settings))
    stopped = begin(tmp_path / "stopped", settings)
    with pytest.raises(StoppedError):
        run_on_grid(stopped, StoppingGrid)
    stop_requested.clear()
    assert all_bits(run_in_process(RunFolder.open(stopped.path))) == all_bits(whole)
    for line in round_lines(whole):
        assert line["refused"] == line["shortened"] == {}


# --- Servers that do otherwise -------------------------------------------------------------------


def asked(
    folder: Path, config: RunConfig, change: Callable[[dict[str, Tensors]], None], kind: str = TRAIN
) -> Message:
    """The reply of the client of digit-0, guarded, to a request whose arrays were changed."""
    model = build_model(config, 1)
    shared = Shared(build_partition(config, model).take_shared(model.state_dict()))
    arrays: dict[str, Any] = {SHARED: encode_shared(config, shared, 1)[0]}
    if config.training.control_variates:
        arrays[CONTROL] = encode_sent(config, {}, shared, 1)
    change(arrays)
    request = Request(config.to_json(), "lineage", "digit-0", round=1, attempt="a", samples=4)
    grid = InlineGrid(client_app.app, 1, folder)
    return grid.send_and_receive([Message(request_content(request, arrays), 1, kind)])[0]


def first(value: Any, record: str = SHARED) -> Callable[[dict[str, Tensors]], None]:
    """The first value of the first tensor set otherwise."""

    def change(arrays: dict[str, Tensors]) -> None:
        next(iter(arrays[record].values())).view(-1)[0] = value

    return change


def scales(
    edit: Callable[[Tensor], Tensor], record: str = SHARED
) -> Callable[[dict[str, Tensors]], None]:
    def change(arrays: dict[str, Tensors]) -> None:
        arrays[record][SCALES] = edit(arrays[record][SCALES])

    return change


def as_float32(arrays: dict[str, Tensors]) -> None:
    arrays[SHARED] = {
        name: tensor.float() for name, tensor in arrays[SHARED].items() if name != SCALES
    }


def as_codes(arrays: dict[str, Tensors]) -> None:
    arrays[SHARED] = encode_shared(tiny_config(bits_of(8)), Shared(arrays[SHARED]), 1)[0]


def as_codes_of_eight(arrays: dict[str, Tensors]) -> None:
    arrays[SHARED] = {
        name: tensor.to(torch.int8) if name != SCALES else tensor
        for name, tensor in arrays[SHARED].items()
    }


def control_as_float32(arrays: dict[str, Tensors]) -> None:
    arrays[CONTROL] = {
        name: tensor.float() for name, tensor in arrays[CONTROL].items() if name != SCALES
    }


HOSTILE: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensors]], None], str]] = {
    "a code that there is none of": (bits_of(8), first(-128), "φ received cannot be decoded: a co"),
    "four bits that are none": (bits_of(4), first(0), "cannot be decoded: a code of"),
    "a scale that is no number": (
        bits_of(8),
        scales(lambda s: torch.full_like(s, math.nan)),
        "is nan, not finite and at least 0",
    ),
    "a scale below 0": (bits_of(4), scales(lambda s: -s - 1), "not finite and at least 0"),
    "scales that overflow": (
        bits_of(8),
        scales(lambda s: torch.full_like(s, 3e38)),
        "has values that are not finite",
    ),
    "too few scales": (bits_of(8), scales(lambda s: s[1:]), "the φ received has .scales as"),
    "no scales": (bits_of(8), lambda arrays: arrays[SHARED].pop(SCALES), "φ has 90 tensors"),
    "float32 for codes": (bits_of(8), as_float32, "φ has 90 tensors that are not"),
    "codes for float32": ({}, as_codes, "φ has 91 tensors that are not"),
    "eight bits for four": (
        bits_of(4),
        as_codes_of_eight,
        "the φ received has",
    ),
    "a code of c that there is none of": (
        bits_of(8) | CONTROLLED,
        first(-128, CONTROL),
        "the c received cannot be decoded: a code of",
    ),
    "c as float32": (
        bits_of(8) | CONTROLLED,
        control_as_float32,
        "c has 90 tensors that are not",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_client_does_not_train_with_what_is_not_as_agreed(tmp_path: Path, what: str) -> None:
    overrides, change, words = HOSTILE[what]
    reply = asked(tmp_path, tiny_config({**CHEAP, **overrides}), change)
    assert reply.has_error()
    log = (tmp_path / "digit-0/client.log").read_text()
    assert words in log
    assert "Traceback" not in log
    assert not (tmp_path / "digit-0/lineages").exists()


def test_codes_are_not_evaluated(tmp_path: Path) -> None:
    reply = asked(tmp_path, tiny_config({**CHEAP, **bits_of(8)}), lambda arrays: None, EVALUATE)
    assert reply.has_error()
    assert "φ has 91 tensors that are not" in (tmp_path / "digit-0/client.log").read_text()


# --- What is agreed to ---------------------------------------------------------------------------


def test_the_check_and_the_agreement_say_what_comes_and_hold_the_bits(tmp_path: Path) -> None:
    config = tiny_config({**SITE, **bits_of(8), **CONTROLLED})
    (task,) = load_tasks(config.data, 1)
    data = tmp_path / "i.npz"
    np.savez(data, train_images=task.train, test_images=task.test)
    text = check_site(config, data, tmp_path, "a")
    assert "each round: 49,992 bytes (50.0 kB) come: φ, 49,632 parameters in 90 tensors, in" in text
    assert "49,992 bytes (50.0 kB) come: c of control variates, a gradient of φ, in 8 bits" in text
    assert "198,528 bytes (198.5 kB) come at an evaluation: φ's moving average" in text
    assert "198,528 bytes (198.5 kB) go: φ as trained" in text
    agreement = propose(config, data, tmp_path, "a", least=LeastImages(statistics=2, mean=1))
    assert (agreement.shared.bytes, agreement.shared.bytes_down) == (198_528, 99_984)
    assert (
        "in each round 99,984 bytes (100.0 kB): φ, and c of control variates, in 8 bits"
    ) in in_words(agreement, config)
    assert fits(agreement, config) == "fits"
    for value in (4, None):
        other = tiny_config({**SITE, **CONTROLLED, **bits_of(value)})
        assert fits(agreement, other).startswith(
            f"does NOT fit: not agreed: updates.shared_bits (asked for {json.dumps(value)}, agreed "
            "exactly 8)"
        )
    agreement.save(tmp_path / "a")
    file = tmp_path / "a" / "agreement.json"
    content = json.loads(file.read_text())
    del content["shared"]["bytes_down"]
    file.write_text(json.dumps(content))
    assert Agreement.load(tmp_path / "a").shared.bytes_down is None


def test_a_run_that_is_not_federated_has_no_codes() -> None:
    with pytest.raises(UserError, match=r"updates\.shared_bits 8 means nothing under"):
        tiny_config({**bits_of(8), "training.method": "balanced"})

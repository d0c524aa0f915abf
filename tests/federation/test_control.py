"""Control variates: against centralised training, against SCAFFOLD by hand over the messages of
whole runs, and with peers that do otherwise.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from srfed.config import RunConfig, parse_config
from srfed.data import load_tasks
from srfed.deployment.agree import agree_as_rehearsed, fits, in_words, propose
from srfed.deployment.check import check_site
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.errors import UserError
from srfed.federation import worker
from srfed.federation.agreement import LeastImages
from srfed.federation.contract import Contract
from srfed.federation.control import (
    OLDEST,
    correction,
    decode_control,
    encode_control,
    kept_control,
    own_control,
)
from srfed.federation.flower import client_app
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import (
    array_record,
    read_request,
    read_tensors,
    request_content,
    wire_bytes,
)
from srfed.federation.layout import layout_of
from srfed.federation.messages import CONTROL, EVALUATE, REFUSED, SHARED, TRAIN, Request
from srfed.federation.updates import norm_of
from srfed.federation.updates.quantise import SCALES
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.initialise import initialise
from srfed.networks.partition import Control
from srfed.runs.centralised import Centralised
from srfed.runs.loop import run_rounds
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.client_store import ClientStore
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.gradient_terms import GradientTerms
from srfed.training.optimizer import reach_of_round
from support.centralised import Draw, assert_close, ddpm_losses, leaves
from support.faults import fail
from support.membership import failure
from support.tiny_run import (
    CHEAP,
    CLIENTS,
    StoppingGrid,
    accepted_attempts,
    all_bits,
    begin,
    round_lines,
    run_in_process,
    run_on_grid,
    tiny_config,
)

ON: dict[str, Any] = {"training.control_variates": True}
RATE, T = 0.05, 100
BY_HAND: dict[str, Any] = {
    **CHEAP,
    "diffusion.timesteps": T,
    # A group of two values at one pixel is steep where they are near to equal: rounding grows.
    "model.channels": [8, 8, 8, 8],
    "model.groups": 1,
    "model.exclusive_stages": "io",
    "training.optimizer": "sgd",
    "training.learning_rate": RATE,
    "federation.server_optimizer": "average",
}
SITE: dict[str, Any] = {
    "evaluation.mode": "statistics",
    "evaluation.samples": 60,
    "evaluation.samples_between": 60,
}
Tensors = dict[str, Tensor]


def shared_of(run: RunFolder) -> Tensors:
    return ServerCheckpoints(run.server, 9).load_last().shared.weights


def largest(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return max(float((tensors[name] - others[name]).abs().max()) for name in tensors)


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Initial values with noise: layers of zeros would leave most of φ's gradients at almost 0."""

    def perturbed(network: torch.nn.Module, seed: int) -> None:
        initialise(network, seed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    monkeypatch.setattr("srfed.model.initialise", perturbed)
    worker._workers.cache_clear()
    yield
    worker._workers.cache_clear()


# --- Against centralised training ----------------------------------------------------------------


@pytest.mark.usefixtures("awake")
def test_one_step_a_round_of_everybody_is_the_centralised_step_round_after_round(
    tmp_path: Path,
) -> None:
    """Plain gradient descent without clipping: the c_i add up to c, and cancel."""
    settings = {
        **BY_HAND,
        "training.local_steps": 1,
        "training.gradient_clip": None,
        "federation.rounds": 4,
    }
    corrected = run_in_process(begin(tmp_path / "corrected", {**settings, **ON}))
    balanced = {"training.method": "balanced", "training.centralised_batch_size": 12}
    together = begin(tmp_path / "together", {**settings, **balanced})
    run_rounds(together, Centralised(together), [])
    start = ServerCheckpoints(together.server, 9)
    assert_close(shared_of(corrected), shared_of(together), atol=2e-6)
    first = read_checkpoint(start.folder / "round-00000").group("shared")
    assert largest(first, shared_of(together)) > 1e-2, "φ has moved"
    control = ServerCheckpoints(corrected.server, 9).load_last().control
    assert {tensor.dtype for tensor in control.values()} == {torch.float64}
    assert norm_of(control) > 0.1, "what has cancelled was something"


# --- Against SCAFFOLD by hand --------------------------------------------------------------------


class Recording(NoisePrediction):
    """The forward process itself, noting what it is asked."""

    draws: list[Draw]

    def loss(self, forward: Any, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        self.draws.append(Draw(images, times, noise))
        return super().loss(forward, images, times, noise)


class RecordingGrid(InlineGrid):
    """Keeps every request to train with its reply and its draws."""

    objective: Recording

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trained: list[tuple[Message, Message, list[Draw]]] = []

    def _run_client(self, message: Message) -> Message:
        self.objective.draws = []
        reply = super()._run_client(message)
        if message.metadata.message_type == TRAIN:
            self.trained.append((message, reply, self.objective.draws))
        return reply


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, awake: None) -> type[RecordingGrid]:
    def build(config: RunConfig, device: torch.device) -> Recording:
        RecordingGrid.objective = Recording(build_objective(config, device).process.schedule)
        RecordingGrid.objective.draws = []
        return RecordingGrid.objective

    monkeypatch.setattr(worker, "build_objective", build)
    build(tiny_config(), torch.device("cpu"))
    return RecordingGrid


@pytest.mark.parametrize("clip", [None, 0.5])
def test_several_steps_and_absent_clients_are_scaffold_by_hand(
    tmp_path: Path, recorded: type[RecordingGrid], clip: float | None
) -> None:
    """Karimireddy et al. 2020, Algorithm 1, but that c is the mean of the round's clients."""
    settings = {
        **BY_HAND,
        **ON,
        "training.gradient_clip": clip,
        "federation.rounds": 4,
        "federation.clients_per_round": 2,
        "federation.weights": "examples",
    }
    run = begin(tmp_path / "run", settings)
    grid = run_on_grid(run, recorded)
    assert isinstance(grid, RecordingGrid)
    model = build_model(run.config, 1)
    partition = build_partition(run.config, model)
    shared = partition.take_shared(model.state_dict())
    sizes = {task.name: len(task.train) for task in load_tasks(run.config.data, 3)}
    control = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    own: dict[str, Tensors] = {}
    place = {client: partition.take_exclusive(model.state_dict()) for client in CLIENTS}
    asked, moved = [], 0.0
    for number in range(1, 5):
        exchanges = [e for e in grid.trained if e[0].metadata.group_id == str(number)]
        trained, made = {}, {}
        for request, reply, draws in exchanges:
            client = read_request(request.content).client
            assert_close(read_tensors(request.content, SHARED), shared, atol=2e-6)
            assert_close(read_tensors(request.content, CONTROL), control, atol=1e-8)
            phi, theta = leaves(shared), leaves(place[client])
            weights = {**phi, **theta}
            total = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
            for draw in draws:
                loss = ddpm_losses(model, weights, draw).mean()
                found = torch.autograd.grad(loss, list(weights.values()))
                norm = math.sqrt(sum(float(each.double().square().sum()) for each in found))
                factor = min(1.0, clip / norm) if clip else 1.0
                with torch.no_grad():
                    for (name, tensor), each in zip(weights.items(), found, strict=True):
                        step = factor * each
                        if name in phi:
                            total[name] += step
                            step = step + control[name]
                            step -= own[client][name] if client in own else 0
                        tensor -= RATE * step
            assert len(draws) == 2
            trained[client] = {name: tensor.detach() for name, tensor in phi.items()}
            place[client] = {name: tensor.detach() for name, tensor in theta.items()}
            made[client] = decoded(reply, {n: t / len(draws) for n, t in total.items()})
            assert_close(read_tensors(reply.content, SHARED), trained[client], atol=2e-6)
        asked.append(set(trained))
        own |= made
        part = {client: sizes[client] / sum(sizes[c] for c in made) for client in made}
        mean = {n: sum(part[c] * made[c][n].double() for c in made) for n in shared}
        control = {name: torch.as_tensor(tensor).float() for name, tensor in mean.items()}
        moved = max(moved, norm_of(control))
        shared = {n: sum(part[c] * trained[c][n].double() for c in made).float() for n in shared}
    assert_close(shared_of(run), dict(sorted(shared.items())), atol=4e-6)
    assert any(one != other for one, other in pairwise(asked))
    assert moved > 0.05


def decoded(reply: Message, mean: Mapping[str, Tensor]) -> Tensors:
    """What a reply's codes stand for: each value within one scale of the mean gradient."""
    codes = read_tensors(reply.content, CONTROL)
    scales = dict(zip(mean, codes.pop(SCALES).tolist(), strict=True))
    values = {name: tensor.double() * scales[name] for name, tensor in codes.items()}
    for name, tensor in mean.items():
        assert codes[name].dtype == torch.int8
        near = 1.001 * scales[name] + 1e-6
        assert float((values[name] - tensor.double()).abs().max()) <= near, name
        assert scales[name] == pytest.approx(float(tensor.abs().max()) / 127, rel=1e-3, abs=1e-8)
    return {name: tensor.float() for name, tensor in values.items()}


# --- The terms at a client -----------------------------------------------------------------------


def terms_of(**training: Any) -> tuple[GradientTerms, dict[str, torch.nn.Parameter]]:
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    return GradientTerms(parse_config({"training": training}).training, weights), weights


def test_a_tensor_without_a_gradient_has_a_mean_of_zero_and_descends_the_correction() -> None:
    terms, weights = terms_of(control_variates=True)
    terms.begin(Control({"a": torch.full((2,), 3.0), "b": torch.full((2,), 5.0)}))
    for value in (1.0, 2.0):
        weights["a"].grad, weights["b"].grad = torch.full((2,), value), None
        terms.before_clipping()
        terms.after_clipping()
        assert weights["a"].grad.tolist() == [value + 3] * 2
        assert weights["b"].grad is not None
        assert weights["b"].grad.tolist() == [5.0] * 2
    mean = terms.mean_gradient(2)
    assert mean["a"].tolist() == [1.5] * 2
    assert mean["b"].tolist() == [0.0] * 2
    terms.begin()
    assert not any(bool(tensor.any()) for tensor in terms.mean_gradient(1).values())
    weights["a"].grad = torch.ones(2)
    terms.after_clipping()
    assert weights["a"].grad.tolist() == [1.0] * 2


def test_a_round_writes_into_the_same_memory_as_a_captured_step_needs() -> None:
    terms, _ = terms_of(control_variates=True)
    before = [t.data_ptr() for t in (*terms._correction.values(), *terms._sum.values())]
    terms.begin(Control({name: torch.ones(2) for name in ("a", "b")}))
    assert before == [t.data_ptr() for t in (*terms._correction.values(), *terms._sum.values())]


def test_without_the_setting_nothing_is_added_or_kept() -> None:
    terms, weights = terms_of()
    terms.begin()
    weights["a"].grad = torch.ones(2)
    terms.before_clipping()
    terms.after_clipping()
    assert weights["a"].grad.tolist() == [1.0, 1.0]
    assert weights["b"].grad is None
    assert terms.mean_gradient(1) == {}


# --- Codes, and how old they may be --------------------------------------------------------------


def gradient(norm: float, seed: int = 0) -> Control:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"w": (40, 30), "b": (7,), "zero": (3,)}.items()
    }
    tensors["zero"].zero_()
    factor = norm / norm_of(tensors)
    return Control({name: factor * tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_of_a_mean_as_long_as_clipping_allows_is_no_longer_and_kept_alike(
    seed: int,
) -> None:
    config, mean = tiny_config({**ON, "training.gradient_clip": 0.7}), gradient(0.7, seed)
    codes, kept = encode_control(config, mean, "a", 3)
    came = decode_control(config.training, codes, layout_of(mean))
    assert all(torch.equal(kept[name], came[name]) for name in mean)
    assert norm_of(kept) <= 0.7 * (1 + 1e-6)
    assert largest(kept, mean) < 1.01 * 0.7 / 127
    again, _ = encode_control(config, mean, "a", 3)
    other, _ = encode_control(config, mean, "a", 4)
    assert all(torch.equal(codes[name], again[name]) for name in codes)
    assert not torch.equal(codes["w"], other["w"])


def test_gradients_that_are_none_are_one_sentence() -> None:
    mean = gradient(0.5)
    mean["w"][0, 0] = math.nan
    assert failure(lambda: encode_control(tiny_config(ON), mean, "a", 3)) == (
        "the gradients of round 3 have values that are not finite"
    )


def test_a_control_variate_of_more_than_five_rounds_ago_is_zero_and_that_is_said() -> None:
    kept = kept_control(gradient(0.5), 4)
    for number in range(5, 5 + OLDEST):
        own, said = own_control(kept, number)
        assert said == ""
        assert all(torch.equal(own[name], tensor) for name, tensor in gradient(0.5).items())
    own, said = own_control(kept, 10)
    assert own == {}
    assert "is of round 4, more than 5 rounds ago; c_i begins at 0" in said
    assert own_control({"quantise": {"w": torch.ones(1)}}, 2) == (
        {},
        "no control variate is kept here; c_i begins at 0",
    )
    control = gradient(0.3, seed=1)
    assert all(torch.equal(correction(control, own)[name], control[name]) for name in control)


def failing(offender: int, *rounds: int) -> ClientApp:
    """The real handlers; one client fails in some rounds, before it does anything."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        if (
            context.node_config["partition-id"] == offender
            and int(message.metadata.group_id) in rounds
        ):
            fail(message)
        return client_app.train(message, context)

    app.query("describe")(client_app.describe)
    app.train()(train)
    app.evaluate()(client_app.evaluate)
    return app


@pytest.mark.parametrize(("back", "forgotten"), [(6, False), (7, True)])
def test_who_was_away_for_long_comes_back_with_a_control_variate_of_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: int, forgotten: bool
) -> None:
    began: dict[tuple[str, int], Any] = {}

    def recorded(memory: Any, number: int) -> Any:
        began[client[0], number] = own_control(memory, number)
        return began[client[0], number]

    client: list[str] = [""]
    monkeypatch.setattr(client_app, "own_control", recorded)
    app = failing(1, *range(2, back))

    class Named(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            client[0] = f"digit-{context.node_config['partition-id']}"
            return app(message, context)

    run = begin(tmp_path / "run", {**CHEAP, **ON, "federation.rounds": back})
    run_in_process(run, Named())
    assert [line["accepted"] for line in round_lines(run)][1:] == [
        *[["digit-0", "digit-2"]] * (back - 2),
        CLIENTS,
    ]
    own, said = began["digit-1", back]
    assert (own == {}) == forgotten
    log = (run.clients / "digit-1" / "client.log").read_text()
    assert ("is of round 1, more than 5 rounds ago" in log) == bool(said) == forgotten
    assert "round 1: no control variate is kept here; c_i begins at 0" in log
    first = accepted_attempts(run)["digit-1"]
    memory = read_checkpoint(first).group("memory")
    assert int(memory["control:.round"]) == back
    assert not any(said for (_, number), (_, said) in began.items() if 1 < number < back)


# --- Whole runs ----------------------------------------------------------------------------------

PARTIAL: dict[str, Any] = {**CHEAP, **ON, "federation.rounds": 4, "federation.clients_per_round": 2}


@pytest.mark.parametrize("steps", [[], ["clip", "quantise"]], ids=["plain", "with steps"])
def test_a_run_that_was_stopped_or_ended_early_goes_on_with_the_same_bits(
    tmp_path: Path, steps: list[str]
) -> None:
    settings = {**PARTIAL, "updates.steps": steps}
    whole = run_in_process(begin(tmp_path / "whole", settings))
    stopped = begin(tmp_path / "stopped", settings)
    with pytest.raises(StoppedError):
        run_on_grid(stopped, StoppingGrid)
    stop_requested.clear()
    assert all_bits(run_in_process(RunFolder.open(stopped.path))) == all_bits(whole)
    short = run_in_process(begin(tmp_path / "short", {**settings, "federation.rounds": 2}))
    longer = RunFolder.open(short.path).reconfigure(tiny_config(settings))
    assert all_bits(run_in_process(longer)) == all_bits(whole)
    without = {**settings, "training.control_variates": False}
    assert all_bits(run_in_process(begin(tmp_path / "without", without))) != all_bits(whole)
    assert not any(line["refused"] or line["shortened"] for line in round_lines(whole))


def test_what_both_sides_go_on_with_is_the_same_to_the_bit(tmp_path: Path) -> None:
    run = run_in_process(begin(tmp_path / "run", {**CHEAP, **ON, "federation.rounds": 2}))
    mean = ServerCheckpoints(run.server, 9).load_last().control
    kept = [
        ClientStore(run.clients, client, run.lineage, 9).load(folder.name).memory["control"]
        for client, folder in accepted_attempts(run).items()
    ]
    for name, tensor in mean.items():
        assert torch.equal(tensor, sum(own[name].double() for own in kept) * (1 / 3))
    assert all(0 < norm_of({n: own[n] for n in mean}) <= 1 + 1e-6 for own in kept)


def test_a_checkpoint_without_c_begins_at_zero_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in_process(begin(tmp_path / "run", {**CHEAP, **ON, "federation.rounds": 1}))
    checkpoints = ServerCheckpoints(run.server, 9)
    state = checkpoints.load_last()
    (run.server / "round-00001").rename(tmp_path / "before")
    checkpoints.save(replace(state, control={}))
    capsys.readouterr()
    more = tiny_config({**CHEAP, **ON, "federation.rounds": 2})
    run_in_process(RunFolder.open(run.path).reconfigure(more))
    assert "the checkpoint has no control variate; c begins at 0" in capsys.readouterr().err


# --- Peers that do otherwise ---------------------------------------------------------------------

Change = Callable[[Message], None]


def app_of(*changes: Change, guarded: bool = False) -> ClientApp:
    """The real handlers, the replies of digit-1 in the first rounds changed, a round each; a
    hostile client has no guard.
    """
    app = ClientApp(mods=[wire_guard] if guarded else [])

    def train(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        number = int(message.metadata.group_id)
        if context.node_config["partition-id"] == 1 and number <= len(changes):
            changes[number - 1](reply)
        return reply

    app.query("describe")(client_app.describe)
    app.train()(train)
    app.evaluate()(client_app.evaluate)
    return app


def edited(change: Callable[[Tensors], Tensors]) -> Change:
    def edit(reply: Message) -> None:
        reply.content[CONTROL] = array_record(change(read_tensors(reply.content, CONTROL)))

    return edit


def scales(edit: Callable[[Tensor], Tensor]) -> Change:
    return edited(lambda tensors: {**tensors, SCALES: edit(tensors[SCALES])})


def first(tensors: Tensors, value: Any) -> Tensors:
    """The first value of the first tensor set otherwise."""
    next(iter(tensors.values())).view(-1)[0] = value
    return tensors


def sent_again(reply: Message) -> None:
    reply.content[CONTROL] = array_record(read_tensors(reply.content, SHARED))


def left_out(reply: Message) -> None:
    del reply.content[CONTROL]


HOSTILE: dict[str, tuple[Change, str]] = {
    "longer than clipped gradients": (
        scales(lambda s: 1000 * s),
        "is the most that gradients clipped by training.gradient_clip can have on average",
    ),
    "a scale that is no number": (
        scales(lambda s: torch.full_like(s, math.nan)),
        "values that are not finite",
    ),
    "scales that overflow": (
        scales(lambda s: torch.full_like(s, 3e38)),
        "its control variate is impossible: tensor",
    ),
    "a scale below 0": (scales(lambda s: -s), "not finite and at least 0"),
    "a code that there is none of": (edited(lambda t: first(t, -128)), "a code of"),
    "a name that there is none of": (
        edited(lambda t: {f"x.{name}": tensor for name, tensor in t.items()}),
        "tensors are missing",
    ),
    "a tensor too few": (edited(lambda t: dict(list(t.items())[1:])), "1 tensors are missing"),
    "values for codes": (sent_again, "bytes long, where"),
    "nothing": (left_out, "it has no arrays 'control'"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """A lie a round, then an honest round; and the same with a client that is away instead."""
    folder, lies = tmp_path_factory.mktemp("hostile"), len(HOSTILE)
    settings = {**CHEAP, **ON, "training.local_steps": 1, "federation.rounds": lies + 1}
    settings |= {"federation.keep_attempts": lies + 2}
    apps = {
        "lies": app_of(*(change for change, _ in HOSTILE.values())),
        "absent": failing(1, *range(1, lies + 1)),
    }
    run, absent = (run_in_process(begin(folder / n, settings), app) for n, app in apps.items())
    return run, absent


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_control_variate_is_refused_in_words_and_leaves_no_trace(
    hostile: tuple[RunFolder, RunFolder], what: str
) -> None:
    number = list(HOSTILE).index(what) + 1
    line, absent = (round_lines(run)[number - 1] for run in hostile)
    assert list(line["refused"]) == ["digit-1"]
    assert HOSTILE[what][1] in line["refused"]["digit-1"]
    assert line["accepted"] == absent["accepted"] == ["digit-0", "digit-2"]
    states = [
        read_checkpoint(run.server / f"round-{number:05d}").manifest["sha256"] for run in hostile
    ]
    assert states[0] == states[1]


def test_after_lies_of_every_kind_all_bits_are_as_if_the_client_had_been_away(
    hostile: tuple[RunFolder, RunFolder],
) -> None:
    run, absent = hostile
    assert round_lines(run)[-1]["accepted"] == CLIENTS
    assert all_bits(run) == all_bits(absent)


def test_a_control_variate_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {**CHEAP, "federation.rounds": 1})
    run_in_process(run, app_of(sent_again))
    (line,) = round_lines(run)
    assert "nobody asked for: 'control'" in line["refused"]["digit-1"]


@pytest.mark.parametrize("on", [True, False])
def test_the_guard_lets_no_exclusive_tensor_out_as_a_control_variate(
    tmp_path: Path, on: bool
) -> None:
    run = begin(tmp_path / "run", {**CHEAP, **(ON if on else {}), "federation.rounds": 1})

    def leak(reply: Message) -> None:
        model = build_model(run.config, 1)
        own = build_partition(run.config, model).exclusive
        exclusive = {name: model.state_dict()[name] for name in own}
        codes = read_tensors(reply.content, CONTROL) if on else {}
        reply.content[CONTROL] = array_record({**codes, **exclusive})

    run_in_process(run, app_of(leak, guarded=True))
    (line,) = round_lines(run)
    assert line["refused"] == {"digit-1": "it failed; the reason is in the client's own log"}
    log = (run.clients / "digit-1/client.log").read_text()
    assert "arrays 'control' in a reply to train" in log


def asked(
    folder: Path, config: RunConfig, kind: str, change: Callable[[dict[str, Any]], None]
) -> Message:
    """The reply of the client of digit-0, guarded, to a request whose arrays were changed."""
    model = build_model(config, 1)
    shared = build_partition(config, model).take_shared(model.state_dict())
    arrays: dict[str, Any] = {SHARED: shared}
    if config.training.control_variates and kind == TRAIN:
        arrays[CONTROL] = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    change(arrays)
    request = Request(config.to_json(), "lineage", "digit-0", round=1, attempt="a", samples=4)
    grid = InlineGrid(client_app.app, 1, folder)
    return grid.send_and_receive([Message(request_content(request, arrays), 1, kind)])[0]


@pytest.mark.parametrize(
    ("overrides", "kind", "record"),
    [({}, TRAIN, CONTROL), (ON, EVALUATE, CONTROL), (ON, TRAIN, "more")],
    ids=["not asked for", "in an evaluation", "another one"],
)
def test_a_request_with_arrays_that_the_configuration_does_not_call_for_is_refused(
    tmp_path: Path, overrides: dict[str, Any], kind: str, record: str
) -> None:
    def change(arrays: dict[str, Any]) -> None:
        arrays[record] = arrays[SHARED]

    reply = asked(tmp_path, tiny_config({**CHEAP, **overrides}), kind, change)
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (REFUSED, "the request has other arrays")
    assert repr(record) in (tmp_path / "digit-0/client.log").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop(CONTROL), "the message has no arrays 'control'"),
        (
            lambda arrays: arrays.update({CONTROL: {"a": torch.zeros(1)}}),
            "c has 1 tensors that are not the partition's",
        ),
        (
            lambda arrays: first_as(arrays, torch.zeros(1)),
            "the c received has",
        ),
    ],
)
def test_a_c_that_is_not_like_phi_is_not_trained_with(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    reply = asked(tmp_path, tiny_config({**CHEAP, **ON}), TRAIN, change)
    assert reply.has_error()
    assert words in (tmp_path / "digit-0/client.log").read_text()


def first_as(arrays: dict[str, Any], tensor: Tensor) -> None:
    arrays[CONTROL][next(iter(arrays[CONTROL]))] = tensor


def test_the_bound_of_an_update_knows_of_c_and_c_i() -> None:
    shared = {"w": torch.zeros(3)}
    sgd = {"training.optimizer": "sgd", "training.learning_rate": 0.1}
    without, corrected = (
        reach_of_round(tiny_config({**sgd, **more}), 1, 2, shared) for more in ({}, ON)
    )
    assert without is not None
    assert corrected is not None
    assert corrected.largest == pytest.approx(3 * without.largest)
    assert corrected.largest_value == pytest.approx(3 * without.largest_value)


# --- What is agreed to ---------------------------------------------------------------------------


def contract_of(config: RunConfig) -> Contract:
    model = build_model(config, 1)
    return Contract.of(config, build_partition(config, model).take_shared(model.state_dict()))


def test_the_contract_the_check_and_the_agreement_say_what_comes_and_goes(tmp_path: Path) -> None:
    config = tiny_config({**SITE, **ON})
    (task,) = load_tasks(config.data, 1)
    data = tmp_path / "i.npz"
    np.savez(data, train_images=task.train, test_images=task.test)
    contract = contract_of(config)
    (codes,) = contract.control.values()
    assert list(contract.training_request) == [SHARED, CONTROL]
    assert list(contract.request) == [SHARED]
    text = check_site(config, data, tmp_path, "a")
    phi = wire_bytes(contract.shared)
    assert f"headers {2 * phi:,} and {phi + wire_bytes(codes):,} bytes" in text
    assert "198,528 bytes (198.5 kB) come: c of control variates, a gradient of φ" in text
    said = "the mean gradient of φ over the round's steps, of norm 1 at most, in 8 bits a value"
    assert f"49,992 bytes (50.0 kB) go: c_i, {said}, in 91 tensors" in text
    agreement = propose(config, data, tmp_path, "a", least=LeastImages(statistics=2, mean=1))
    assert (agreement.shared.bytes_up, agreement.shared.bytes_control) == (198_528, 49_992)
    assert f"49,992 bytes (50.0 kB): {said}" in in_words(agreement, config)
    assert fits(agreement, config) == "fits"
    agree_as_rehearsed(config, data, tmp_path, "a")


@pytest.mark.parametrize(("agreed", "other"), [(False, True), (True, False)])
def test_an_agreement_without_control_variates_refuses_them_in_words(
    tmp_path: Path, agreed: bool, other: bool
) -> None:
    own, asked_for = (
        tiny_config({**SITE, "training.control_variates": value}) for value in (agreed, other)
    )
    (task,) = load_tasks(own.data, 1)
    data = tmp_path / "i.npz"
    np.savez(data, train_images=task.train, test_images=task.test)
    agreement = propose(own, data, tmp_path, "a", least=LeastImages(statistics=2, mean=1))
    assert fits(agreement, asked_for).startswith(
        "does NOT fit: not agreed: training.control_variates (asked for "
        f"{json.dumps(other)}, agreed exactly {json.dumps(agreed)})"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.update": "alternating"}, "needs update joint, not alternating"),
        ({"training.update": "exclusive"}, "needs update joint, not exclusive"),
        ({"training.proximal": 0.1}, "needs proximal 0.0, not 0.1"),
        (
            {"training.method": "balanced"},
            "control_variates True means nothing under method balanced; allowed: False",
        ),
        (
            {
                **SITE,
                "data.dataset": "sites",
                "data.image_size": 8,
                "data.channels": 1,
                "training.gradient_clip": None,
            },
            "training.control_variates true needs training.gradient_clip under data.dataset sites",
        ),
    ],
)
def test_what_goes_with_no_control_variates_is_one_sentence(
    changes: dict[str, Any], words: str
) -> None:
    text = failure(lambda: tiny_config({**ON, **changes}))
    assert words in text


@pytest.mark.parametrize("rule", ["all", ["*"]])
def test_a_partition_without_shared_tensors_refuses_control_variates(rule: Any) -> None:
    config = tiny_config({**ON, "model.exclusive_stages": rule})
    with pytest.raises(
        UserError, match=r"needs shared tensors, and model.exclusive_stages .*none$"
    ):
        build_partition(config, build_model(config, 1))

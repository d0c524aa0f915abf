"""Steps on an update: against closed forms and plain loops, and in whole runs over the wire."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srfed.config import UpdatesConfig
from srfed.data import load_tasks
from srfed.federation.bounds import TrainPlan
from srfed.federation.contract import Contract
from srfed.federation.flower import client_app
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.packing import array_record, read_tensors
from srfed.federation.layout import layout_of
from srfed.federation.messages import SHARED, UPDATE
from srfed.federation.updates import (
    Delta,
    Length,
    decode_update,
    difference,
    encode_update,
    layout_of_update,
    longest_update,
    norm_of,
)
from srfed.federation.updates.quantise import SCALES
from srfed.model import build_model, build_objective, build_partition
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.run_folder import RunFolder
from srfed.training.local import LocalTrainer
from srfed.training.optimizer import reach_of_round
from srfed.training.part import ClientState, Part, initial_state
from support.tiny_run import (
    CHEAP,
    StoppingGrid,
    accepted_attempts,
    all_bits,
    begin,
    round_lines,
    run_in_process,
    run_on_grid,
    tiny_config,
)

INT8: dict[str, Any] = {"updates.steps": ["quantise"]}
INT4: dict[str, Any] = {"updates.steps": ["quantise"], "updates.quantise_bits": 4}
CLIP: dict[str, Any] = {"updates.steps": ["clip"], "updates.clip_norm": 0.2}
BOTH: dict[str, Any] = {**INT4, "updates.steps": ["clip", "quantise"], "updates.clip_norm": 0.2}
STEPS = {"clip": CLIP, "int8": INT8, "int4": INT4, "both": BOTH}
MOST = {8: 127, 4: 7}


def quantised(bits: int) -> UpdatesConfig:
    return UpdatesConfig.model_validate({"steps": ("quantise",), "quantise_bits": bits})


def delta_of(seed: int, shapes: tuple[tuple[int, ...], ...] = ((3, 5), (7,), ())) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(
        {f"layer.{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    )


def there_and_back(
    overrides: dict[str, Any],
    delta: Delta,
    memory: dict[str, dict[str, Tensor]] | None = None,
    round_number: int = 1,
    seed: int = 0,
) -> tuple[Delta, dict[str, dict[str, Tensor]]]:
    config = tiny_config(overrides).model_copy(update={"seed": seed})
    encoded, kept = encode_update(config, delta, memory or {}, "digit-0", round_number)
    layout = layout_of(delta)
    assert layout_of(encoded) == layout_of_update(config.updates, layout)
    decoded = decode_update(config.updates, encoded, layout)
    assert layout_of(decoded) == layout
    return decoded, kept


# --- Clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-3, 0.5, 2.0, 1e3])
def test_clipping_is_torchs_own(limit: float) -> None:
    delta = delta_of(1)
    total = torch.nn.utils.get_total_norm(list(delta.values()))
    expected = [t.grad for t in (torch.nn.Parameter(torch.zeros_like(d)) for d in delta.values())]
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in delta.values()]
    for parameter, tensor in zip(parameters, delta.values(), strict=True):
        parameter.grad = tensor.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    expected = [parameter.grad for parameter in parameters]
    clipped, kept = there_and_back({"updates.steps": ["clip"], "updates.clip_norm": limit}, delta)
    assert kept == {}
    for ours, theirs in zip(clipped.values(), expected, strict=True):
        # torch divides by the norm and 1e-6.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    after = float(torch.nn.utils.get_total_norm(list(clipped.values())))
    assert after == pytest.approx(min(limit, float(total)), rel=1e-6)


def test_an_update_that_is_short_enough_keeps_its_bits() -> None:
    delta = delta_of(2)
    clipped, _ = there_and_back({"updates.steps": ["clip"], "updates.clip_norm": 100.0}, delta)
    assert all(torch.equal(clipped[name], tensor) for name, tensor in delta.items())


# --- Quantisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_right_on_average(bits: int) -> None:
    delta = delta_of(3)
    tries = 2000
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in delta.items()}
    for number in range(tries):
        decoded, _ = there_and_back(
            {**INT8, "updates.quantise_bits": bits}, delta, round_number=number
        )
        for name, tensor in decoded.items():
            total[name] += tensor.double()
    for name, tensor in delta.items():
        scale = float(tensor.abs().max()) / MOST[bits]
        # A rounded value has a variance of at most scale² / 4; six standard deviations of the mean.
        bound = 6 * scale / 2 / math.sqrt(tries)
        assert float((total[name] / tries - tensor.double()).abs().max()) < bound


@pytest.mark.parametrize("bits", [8, 4])
def test_no_value_is_off_by_more_than_one_scale_and_the_largest_is_right(bits: int) -> None:
    delta = delta_of(4, ((40, 3), (9,)))
    decoded, _ = there_and_back({**INT8, "updates.quantise_bits": bits}, delta)
    for name, tensor in delta.items():
        largest = float(tensor.abs().max())
        assert float((decoded[name] - tensor).abs().max()) <= 1.0001 * largest / MOST[bits]
        assert float(decoded[name].abs().max()) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_rounding_takes_away_comes_with_the_next_updates(bits: int) -> None:
    """The sum of what is decoded is the sum of what went in, but for what is kept at the end."""
    memory: dict[str, dict[str, Tensor]] = {}
    went, came = (
        {name: torch.zeros_like(t, dtype=torch.float64) for name, t in delta_of(0).items()}
        for _ in range(2)
    )
    for number in range(1, 41):
        delta = delta_of(number)
        decoded, memory = there_and_back(
            {**INT8, "updates.quantise_bits": bits}, delta, memory, number
        )
        for name in delta:
            went[name] += delta[name].double()
            came[name] += decoded[name].double()
    for name in went:
        left = (went[name] - came[name]).float()
        torch.testing.assert_close(memory["quantise"][name], left, rtol=0, atol=1e-4)
        # One scale: nothing has piled up in forty rounds.
        assert float(left.abs().max()) < 5.0 / (MOST[bits] - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-7, 7), max_size=9))
def test_four_bits_are_packed_as_a_plain_loop_would(codes: list[int]) -> None:
    # With a 7 first the scale is 1, and values are their codes, whatever is drawn.
    codes = [7, *codes]
    encoded, _ = encode_update(
        tiny_config(INT4), Delta({"w": torch.tensor(codes, dtype=torch.float32)}), {}, "a", 1
    )
    padded = codes + [0] * (len(codes) % 2)
    expected = [
        (low + 8) + 16 * (high + 8) for low, high in zip(padded[::2], padded[1::2], strict=True)
    ]
    assert encoded["w"].tolist() == expected
    assert encoded[SCALES].tolist() == [1.0]


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_empty_tensors_and_tiny_values_survive(bits: int) -> None:
    delta = Delta(
        {
            "zeros": torch.zeros(3, 3),
            "empty": torch.zeros(0, 4),
            "tiny": torch.tensor([1e-45, -1e-45, 0.0]),
            "one": torch.tensor(-2.5),
        }
    )
    decoded, kept = there_and_back({**INT8, "updates.quantise_bits": bits}, delta)
    assert not decoded["zeros"].any()
    assert decoded["empty"].shape == (0, 4)
    assert float(decoded["one"]) == pytest.approx(-2.5, rel=1e-6)
    assert all(bool(t.isfinite().all()) for t in [*decoded.values(), *kept["quantise"].values()])
    torch.testing.assert_close(decoded["tiny"] + kept["quantise"]["tiny"], delta["tiny"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("overrides", [INT8, INT4, BOTH], ids=["int8", "int4", "both"])
def test_a_value_that_is_not_finite_is_said_and_not_hidden(
    overrides: dict[str, Any], value: float
) -> None:
    delta = delta_of(5)
    delta["layer.1"][2] = value
    with pytest.raises(ValueError, match=r"the scale of 'layer\.[01]' is (nan|inf)"):
        there_and_back(overrides, delta)


def test_draws_are_named_by_seed_client_and_round() -> None:
    config, delta = tiny_config(INT8), delta_of(6, ((50,),))

    def codes(seed: int = 0, client: str = "a", number: int = 1) -> list[int]:
        changed = config.model_copy(update={"seed": seed})
        return encode_update(changed, delta, {}, client, number)[0]["layer.0"].tolist()

    assert codes() == codes()
    assert (
        len({tuple(c) for c in (codes(), codes(seed=1), codes(client="b"), codes(number=2))}) == 4
    )


# --- How long an update can be -------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_no_updates_come_longer_out_than_the_bound_however_they_follow_each_other(
    bits: int,
) -> None:
    overrides = {**INT8, "updates.quantise_bits": bits}
    settings_ = tiny_config(overrides).updates
    memory: dict[str, dict[str, Tensor]] = {}
    farthest = 0.0
    for number in range(1, 60):
        # Rounds of the largest values, and of tiny ones that carry what was left of those.
        delta = Delta({"w": delta_of(number, ((400,),))["layer.0"].clamp(-1, 1)})
        if number % 3 == 0:
            delta["w"] = delta["w"] * 1e-3
        length = Length(norm_of(delta), 1.0)
        decoded, memory = there_and_back(overrides, delta, memory, number)
        bound = longest_update(settings_, length, layout_of(delta))
        assert norm_of(decoded) <= bound
        assert float(memory["quantise"]["w"].abs().max()) <= 1 / (MOST[bits] - 1)
        farthest = max(farthest, norm_of(decoded) / bound)
    assert farthest > 0.5, "the bound is of use"


def test_clipping_bounds_what_nothing_bounds() -> None:
    config = tiny_config({**CLIP, "training.optimizer": "sgd", "training.gradient_clip": None})
    contract = Contract.of(config, delta_of(0))
    reach = contract.reach(None)
    assert reach is not None
    assert reach.largest == pytest.approx(0.2, rel=1e-5)
    assert Contract.of(tiny_config(), delta_of(0)).reach(None) is None
    assert Contract.of(tiny_config(INT8), delta_of(0)).reach(None) is None


@pytest.mark.parametrize(
    "overrides", [CLIP, INT8, INT4, BOTH], ids=["clip", "int8", "int4", "both"]
)
def test_an_honest_client_is_neither_refused_nor_shortened(overrides: dict[str, Any]) -> None:
    config = tiny_config(overrides)
    model = build_model(config, 1)
    partition = build_partition(config, model)
    images = load_tasks(config.data, 1)[0].train
    shared = {n: t.clone() for n, t in partition.take_shared(model.state_dict()).items()}
    contract = Contract.of(config, shared)
    trainer = LocalTrainer(
        config, model, partition, build_objective(config, torch.device("cpu")), "digit-0", images
    )
    state, memory = initial_state(model, partition), {}
    for number in range(1, 5):
        plan = TrainPlan.of(config, partition, "digit-0", len(images), state.minibatches)
        result = trainer.train(number, shared, state)
        delta = difference(result.shared, shared)
        decoded, memory = there_and_back(overrides, delta, memory, number)
        reach = contract.reach(reach_of_round(config, number, plan.shared_steps, shared))
        assert reach is not None
        assert norm_of(decoded) <= reach.usual
        shared = {name: shared[name] + decoded[name] for name in shared}
        state = result.state


# --- The client's store --------------------------------------------------------------------------


def test_a_memory_is_stored_with_its_attempt_and_older_stores_have_none(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "client", "lineage", 3)
    tensors, average = {"head.weight": torch.ones(2)}, {"head.weight": torch.zeros(2)}
    memory = {"quantise": {"mid.weight": torch.arange(3.0), "mid.bias": torch.ones(())}}
    store.save("a-1", NO_PARENT, 1, ClientState(Part(tensors, average), memory=memory))
    store.save("b-1", NO_PARENT, 1, ClientState(Part(tensors, average)))
    loaded = store.load("a-1").memory
    assert loaded.keys() == {"quantise"}
    assert loaded["quantise"].keys() == {"mid.weight", "mid.bias"}
    assert torch.equal(loaded["quantise"]["mid.weight"], torch.arange(3.0))
    assert store.load("b-1").memory == {}


def test_a_run_of_before_there_were_steps_is_opened_and_has_none(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {"federation.rounds": 1})
    text = run.config_file.read_text()
    start = text.index("updates:")
    run.config_file.write_text(text[:start] + text[text.index("federation:") :])
    identity = json.loads(run.identity_file.read_text())
    identity["settings"] = {
        name: value for name, value in identity["settings"].items() if "updates" not in name
    }
    run.identity_file.write_text(json.dumps(identity))
    assert RunFolder.open(run.path).config.updates == UpdatesConfig()


# --- Whole runs ----------------------------------------------------------------------------------

ROUNDS = {**CHEAP, "federation.rounds": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_in_process(begin(tmp_path_factory.mktemp("plain") / "run", ROUNDS))


@pytest.mark.parametrize(
    "overrides", [CLIP, INT8, INT4, BOTH], ids=["clip", "int8", "int4", "both"]
)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    tmp_path: Path, plain: RunFolder, overrides: dict[str, Any]
) -> None:
    whole = run_in_process(begin(tmp_path / "whole", {**ROUNDS, **overrides}))
    stopped = begin(tmp_path / "stopped", {**ROUNDS, **overrides})
    with pytest.raises(StoppedError):
        run_on_grid(stopped, StoppingGrid)
    stop_requested.clear()
    resumed = run_in_process(RunFolder.open(stopped.path))
    assert all_bits(resumed) == all_bits(whole)
    assert all_bits(whole) != all_bits(plain)
    sent = [line["bytes_up"] for line in round_lines(whole)]
    assert sent == [line["bytes_up"] for line in round_lines(resumed)]
    assert not any(line["shortened"] or line["refused"] for line in round_lines(whole))


@pytest.mark.parametrize(("overrides", "share"), [(INT8, 1 / 4), (INT4, 1 / 8)], ids=["8", "4"])
def test_bytes_on_the_wire_fall_with_the_bits(
    tmp_path: Path, plain: RunFolder, overrides: dict[str, Any], share: float
) -> None:
    run = run_in_process(begin(tmp_path / "run", {**ROUNDS, **overrides}))
    for line, before in zip(round_lines(run), round_lines(plain), strict=True):
        # Names, shapes and headers do not get smaller: some 5 kB of a φ of 200 kB.
        assert share < line["bytes_up"] / before["bytes_up"] < share + 0.03
        assert line["bytes_down"] == pytest.approx(before["bytes_down"], rel=1e-3)
        assert line["update_norm"] == pytest.approx(before["update_norm"], rel=0.1)


def test_clipped_updates_are_as_long_as_agreed(tmp_path: Path) -> None:
    run = run_in_process(begin(tmp_path / "run", {**ROUNDS, **CLIP, "federation.clients": 2}))
    assert all(0 < line["update_norm"] <= 0.2 * 1.5 for line in round_lines(run))


def test_feedback_is_in_the_accepted_attempt_and_in_no_message(tmp_path: Path) -> None:
    run = run_in_process(begin(tmp_path / "run", {**ROUNDS, **INT8}))
    partition = build_partition(run.config, build_model(run.config, 1))
    for folder in accepted_attempts(run).values():
        memory = read_checkpoint(folder).group("memory")
        assert set(memory) == {f"quantise:{name}" for name in partition.shared}
        assert any(bool(tensor.any()) for tensor in memory.values())


# --- Peers that do otherwise ---------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def app_of(
    change: Callable[[Message, Message], None], number: int, *, guarded: bool = False
) -> ClientApp:
    """The real handlers, the update of digit-1 in one round changed; a hostile client has no
    guard.
    """
    app = ClientApp(mods=[wire_guard] if guarded else [])

    def train(message: Message, context: Context) -> Message:
        reply = client_app.train(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.group_id == str(number):
            change(message, reply)
        return reply

    app.query("describe")(client_app.describe)
    app.train()(train)
    app.evaluate()(client_app.evaluate)
    return app


def edited(change: Change) -> Callable[[Message, Message], None]:
    def edit(request: Message, reply: Message) -> None:
        reply.content[UPDATE] = array_record(change(read_tensors(reply.content, UPDATE)))

    return edit


def first(tensors: dict[str, Tensor], value: Any) -> dict[str, Tensor]:
    """The first value of the first tensor set otherwise."""
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    return tensors


def scales(edit: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {**tensors, SCALES: edit(tensors[SCALES])}


def plain_shared(request: Message, reply: Message) -> None:
    del reply.content[UPDATE]
    reply.content[SHARED] = array_record(read_tensors(request.content, SHARED))


def renamed(request: Message, reply: Message) -> None:
    reply.content[UPDATE] = array_record(read_tensors(request.content, SHARED))


HOSTILE: dict[str, tuple[dict[str, Any], Callable[[Message, Message], None], str]] = {
    "a code that there is none of": (INT8, edited(lambda t: first(t, -128)), "a code of"),
    "four bits that are none": (INT4, edited(lambda t: first(t, 0)), "a code of"),
    "a scale that is no number": (
        INT8,
        edited(scales(lambda s: torch.full_like(s, math.nan))),
        "values that are not finite",
    ),
    "a scale below 0": (INT4, edited(scales(lambda s: -s)), "not finite and at least 0"),
    "scales that overflow": (
        INT8,
        edited(scales(lambda s: torch.full_like(s, 3e38))),
        "values that are not finite",
    ),
    "scales that are too large": (INT8, edited(scales(lambda s: 1e6 * s)), "its update has norm"),
    "too few scales": (INT8, edited(scales(lambda s: s[1:])), "is torch.float32 (89,), not"),
    "no scales": (INT8, edited(lambda t: {n: t[n] for n in t if n != SCALES}), "are missing"),
    "codes of eight bits for four": (
        INT4,
        edited(lambda t: {n: x.to(torch.int8) if n != SCALES else x for n, x in t.items()}),
        "is torch.int8",
    ),
    "φ in place of what was agreed": (INT8, plain_shared, "nobody asked for: 'arrays'"),
    "φ as the update": (INT8, renamed, "bytes long, where 49992 were"),
    "an update that was not clipped": (
        CLIP,
        edited(lambda t: {n: x * 1000 for n, x in t.items()}),
        "its update has norm",
    ),
    "an update with values that are none": (
        CLIP,
        edited(lambda t: first(t, math.nan)),
        "values that are not finite",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_update_is_refused_in_words_and_the_round_goes_on(
    tmp_path: Path, what: str
) -> None:
    overrides, change, words = HOSTILE[what]
    run = begin(tmp_path / "run", {**ROUNDS, **overrides, "federation.rounds": 2})
    run_in_process(run, app_of(change, 1))
    line, after = round_lines(run)
    assert list(line["refused"]) == ["digit-1"]
    assert words in line["refused"]["digit-1"]
    assert line["accepted"] == ["digit-0", "digit-2"]
    assert after["accepted"] == ["digit-0", "digit-1", "digit-2"]


def test_what_pads_an_odd_count_cannot_carry_anything(tmp_path: Path) -> None:
    delta = Delta({"w": torch.ones(3)})
    config = tiny_config(INT4)
    encoded, _ = encode_update(config, delta, {}, "a", 1)
    encoded["w"][-1] = encoded["w"][-1] & 15
    with pytest.raises(ValueError, match="a code of 'w' is impossible"):
        decode_update(config.updates, encoded, layout_of(delta))


def test_the_guard_lets_no_phi_out_where_codes_were_agreed(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {**ROUNDS, **INT8, "federation.rounds": 1})
    run_in_process(run, app_of(plain_shared, 1, guarded=True))
    (line,) = round_lines(run)
    assert line["refused"] == {"digit-1": "it failed; the reason is in the client's own log"}
    assert "arrays 'arrays' in a reply to train" in (run.clients / "digit-1/client.log").read_text()


def test_a_refused_update_leaves_the_feedback_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 is refused: round 3 goes on from the memory of round 1, not of round 2."""
    began: dict[int, Any] = {}

    def recorded(config: Any, delta: Any, memory: Any, client: str, number: int) -> Any:
        if client == "digit-1":
            began[number] = memory
        return encode_update(config, delta, memory, client, number)

    monkeypatch.setattr(client_app, "encode_update", recorded)
    run = begin(tmp_path / "run", {**ROUNDS, **INT8})
    run_in_process(run, app_of(edited(scales(lambda s: torch.full_like(s, math.nan))), 2))
    assert [list(line["refused"]) for line in round_lines(run)] == [[], ["digit-1"], []]
    assert began[1] == {}
    assert began[2]["quantise"].keys() == began[3]["quantise"].keys()
    for name, tensor in began[2]["quantise"].items():
        assert torch.equal(began[3]["quantise"][name], tensor)

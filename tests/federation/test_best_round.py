"""The best round by the owners' validation images: found, kept at both sides, and the result."""

import math
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srfed import simulate
from srfed.config import ResourcesConfig, RunConfig
from srfed.data import load_tasks
from srfed.errors import DamagedError, UserError
from srfed.evaluation.generation import generate
from srfed.federation.bounds import LARGEST_LOSS
from srfed.federation.contract import Contract
from srfed.federation.flower import client_app
from srfed.federation.flower.exchange import StoppedError, stop_requested
from srfed.federation.flower.federated import Federated
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.in_process import run_in_process as train_in_process
from srfed.federation.flower.packing import (
    array_record,
    read_layout,
    read_request,
    read_tensors,
    reply_content,
    request_content,
    unpack,
)
from srfed.federation.messages import (
    EVALUATE,
    EXAMPLES,
    FAILED,
    GENERATED,
    METRICS,
    REPLY,
    SHARED,
    VALIDATE,
    ReplyHeader,
    Request,
)
from srfed.federation.screening import RefusedError, screen_validation
from srfed.model import shared_of
from srfed.observer import Observer
from srfed.reporting.summary import summarise
from srfed.runs.best_round import hold_to_owners, judge_round
from srfed.runs.centralised import Centralised
from srfed.runs.loop import run_rounds
from srfed.runs.run import TrainedRun
from srfed.storage.checkpoint import read_arrays
from srfed.storage.manifest import STATE_FILE
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import BestRound, RunState, ServerCheckpoints
from srfed.studies.best_rounds import TOGETHER, BestRounds, best_file, best_rounds, read_history
from support.errors import message_of
from support.faults import Faults, app_with, set_field, set_number
from support.membership import SOON, ChangingGrid
from support.stores import server_state, write_as_before
from support.tiny_run import (
    CLIENTS,
    all_bits,
    records,
    round_lines,
    run_on_grid,
    server_bits,
    stop_after_a_round,
    store_of,
    tiny_config,
)
from support.wire import RecordingGrid

# The rate rises until training breaks: the best round is an early one, and not by a hair.
SETTINGS: dict[str, Any] = {
    "data.images_per_task": 14,
    "data.validation_images": 4,
    "training.batch_size": 4,
    "training.ema_decay": 0.0,
    "training.learning_rate": 0.1,
    "training.warmup_rounds": 6,
    "federation.rounds": 6,
    "federation.keep_attempts": 2,
    "federation.server_optimizer": "average",
    "evaluation.every": 3,
    "evaluation.samples": 6,
    "evaluation.samples_between": 6,
    "evaluation.ssim_images": 0,
    "evaluation.memorisation_quantile": 0,
    "sampling.steps": 1,
}
BEST = {**SETTINGS, "federation.result": "best", "federation.validate_every": 2}
CPU = ResourcesConfig(device="cpu")
FOUND = 2
"""The best round of these settings."""


def begin(path: Path, settings: dict[str, Any]) -> RunFolder:
    """A run of the seed whose noise the second implementation has."""
    return RunFolder.create(path, tiny_config(settings).model_copy(update={"seed": 1}))


def train(run: RunFolder, *observers: Observer) -> RunFolder:
    train_in_process(run, observers)
    return run


class Notices(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_notice(self, text: str) -> None:
        self.said.append(text)


def result_of(run: RunFolder) -> dict[str, Any]:
    """What the last evaluation says of the round that it has judged."""
    line = MetricsLog(run.metrics).evaluations()[-1]
    assert line["final"]
    return dict(line["result"])


def best_of(run: RunFolder) -> BestRound:
    best = ServerCheckpoints(run.server, 2).load_last().best
    assert best is not None
    return best


def validations(run: RunFolder) -> dict[int, dict[str, Any]]:
    return {
        line["round"]: line["validation"]
        for line in MetricsLog(run.metrics).rounds()
        if line["validation"] is not None
    }


def validated(run: RunFolder) -> list[Any]:
    """What is on record of the validations, and the best round without the names of attempts."""
    best = best_of(run)
    return [validations(run), best.round, best.loss, best.losses, sorted(best.attempts)]


def with_second_implementation(run: RunFolder, trained: Callable[[Observer], object]) -> RunFolder:
    tasks = load_tasks(run.config.data, run.config.federation.clients)
    trained(BestRounds(run, tasks, 2, apart=False))
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run, whose result is the last round, with the studies' own search for the best."""
    run = begin(tmp_path_factory.mktemp("other") / "run", SETTINGS)
    return with_second_implementation(run, lambda seeker: train(run, seeker))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RecordingGrid]:
    run = begin(tmp_path_factory.mktemp("best") / "run", BEST)
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    return run, grid


@pytest.fixture(scope="module")
def best(recorded: tuple[RunFolder, RecordingGrid]) -> RunFolder:
    return recorded[0]


@pytest.fixture
def copy(best: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(best.path, tmp_path / "copy")
    return RunFolder.open(tmp_path / "copy")


def assert_same_as_second_implementation(run: RunFolder, other: RunFolder) -> None:
    history = read_history(other)
    assert {n: line["loss_by_client"] for n, line in validations(run).items()} == history
    found = best_rounds(history, {TOGETHER: CLIENTS})[TOGETHER]
    assert found == result_of(run)["round"] == best_of(run).round == FOUND
    assert result_of(run)["loss"] == pytest.approx(np.mean(list(history[found].values())))
    assert result_of(run)["last"] == pytest.approx(np.mean(list(history[6].values())))
    arrays, about = read_arrays(best_file(other, TOGETHER))
    assert int(about["round"]) == FOUND
    trained, last = TrainedRun(run.path, CPU), TrainedRun(other.path, CPU)
    assert (trained.round, last.round) == (FOUND, 6)
    for owner in ("shared", *CLIENTS):
        ours, lasts = (
            one.shared if owner == "shared" else one.exclusive_of(one.find_task(owner))
            for one in (trained, last)
        )
        assert any(not torch.equal(lasts[name], tensor) for name, tensor in ours.items())
        assert ours, owner
        for name, tensor in ours.items():
            assert np.array_equal(tensor.numpy(), arrays[f"{owner}:{name}"])


def test_round_and_weights_are_those_of_a_second_implementation(
    best: RunFolder, other: RunFolder
) -> None:
    assert_same_as_second_implementation(best, other)


def test_looking_for_the_best_round_does_not_touch_training(
    best: RunFolder, other: RunFolder
) -> None:
    assert all_bits(best) == all_bits(other)


def test_the_last_evaluation_judges_the_best_round_and_others_the_round_at_hand(
    recorded: tuple[RunFolder, RecordingGrid], other: RunFolder
) -> None:
    run, grid = recorded
    trained = TrainedRun(run.path, CPU)
    last = ServerCheckpoints(other.server, 2).load_last().shared.average
    asked = {
        read_request(message.content).round: read_tensors(message.content, SHARED)
        for message in grid.requests
        if message.metadata.message_type == EVALUATE
    }
    assert set(asked) == {3, 6}
    judged = trained.shared
    for number, same in ((3, False), (6, True)):
        equal = all(torch.equal(asked[number][name], tensor) for name, tensor in judged.items())
        assert equal == same, number
    assert not all(torch.equal(asked[6][name], tensor) for name, tensor in last.items())
    final = [
        reply
        for reply in grid.replies
        if reply.metadata.message_type == EVALUATE and reply.metadata.group_id == "6"
    ]
    assert len(final) == 3
    for reply in final:
        info = trained.find_task(reply.content.config_records[REPLY]["client"])  # type: ignore[arg-type]
        expected = generate(
            trained.denoiser(info),
            trained.objective.process,
            run.config.sampling,
            count=2,
            shape=trained.shape_of(info),
            seed=run.config.seed,
            task=info.client,
        ).images
        sent = read_tensors(reply.content, GENERATED)["images"].numpy()
        assert np.abs(sent.astype(int) - expected.astype(int)).max() <= 1


def test_what_is_asked_and_told(recorded: tuple[RunFolder, RecordingGrid]) -> None:
    run, grid = recorded
    contract = Contract.of(run.config, shared_of(run.config, [1])[1])
    rounds = []
    for message in grid.requests:
        request = read_request(message.content)
        if message.metadata.message_type == VALIDATE:
            rounds.append(request.round)
            down = {n: read_layout(r) for n, r in message.content.array_records.items()}
            assert down == contract.request
        attempts = best_of(run).attempts
        if request.round > FOUND:
            assert (request.best, request.best_round) == (attempts[request.client], FOUND)
        else:
            assert (request.best, request.best_round) == ("none", 0)
    assert rounds == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    for reply in grid.replies:
        if reply.metadata.message_type == VALIDATE:
            assert set(reply.content) == {REPLY, METRICS}
            assert set(reply.content.metric_records[METRICS]) == {"loss", EXAMPLES}
            assert reply.content.metric_records[METRICS][EXAMPLES] == 4


def test_both_sides_keep_the_best_round_and_no_other(best: RunFolder) -> None:
    assert ServerCheckpoints(best.server, 2).rounds() == [FOUND, 5, 6]
    for client in CLIENTS:
        kept = sorted(path.name[:11] for path in store_of(best, client).iterdir())
        assert kept == ["round-00002", "round-00004", "round-00005", "round-00006"]
        assert (store_of(best, client) / best_of(best).attempts[client]).is_dir()


def test_curves_and_table_say_which_round_was_taken(best: RunFolder) -> None:
    loss, last = (validations(best)[number]["loss"] for number in (FOUND, 6))
    words = f"best round by validation: 2 of 6, loss {loss:.4f}; last {last:.4f}"
    assert words in summarise(MetricsLog(best.metrics), 1.0)
    events = EventAccumulator(str(best.tensorboard))
    events.Reload()
    assert [one.step for one in events.Scalars("validation/mean")] == [2, 4, 6]
    assert [one.value for one in events.Scalars("validation/best_round")] == [2, 2, 2]
    for client in CLIENTS:
        (told, *_) = events.Scalars(f"validation_by_client/{client}")
        assert told.value == pytest.approx(validations(best)[2]["loss_by_client"][client])


# --- Stopped, killed, gone on with ---------------------------------------------------------------


class StoppingGrid(InlineGrid):
    """Somebody stops the run when the first client has told its loss after round 4."""

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        if message.metadata.message_type == VALIDATE and message.metadata.group_id == "4":
            stop_requested.set()
        return reply


def test_a_run_that_is_stopped_while_it_validates_finds_the_same_round(
    best: RunFolder, tmp_path: Path
) -> None:
    run = begin(tmp_path / "run", BEST)
    with pytest.raises(StoppedError):
        run_on_grid(run, StoppingGrid)
    assert server_bits(run)["round"] == 3
    stop_requested.clear()
    train(RunFolder.open(run.path))
    assert all_bits(run) == all_bits(best)
    assert records(run) == records(best)
    assert validated(run) == validated(best)


def test_a_killed_command_finds_the_same_round(best: RunFolder, tmp_path: Path) -> None:
    config = tmp_path / "best.yaml"
    content = begin(tmp_path / "unused", BEST).config
    config.write_text(content.to_yaml())
    command = [sys.executable, "-m", "srfed", "simulate", "--config", str(config)]
    command += ["--run-dir", str(tmp_path / "run")]
    stop_after_a_round(command, signal.SIGKILL)
    assert simulate.main(["--resume", str(tmp_path / "run")]) == 0
    run = RunFolder.open(tmp_path / "run")
    assert all_bits(run) == all_bits(best)
    assert validated(run) == validated(best)


def test_a_run_goes_on_from_its_last_round_and_not_from_the_best(
    best: RunFolder, tmp_path: Path
) -> None:
    run = train(begin(tmp_path / "run", {**BEST, "federation.rounds": 4}))
    assert result_of(run)["round"] == TrainedRun(run.path, CPU).round == FOUND
    train(RunFolder.open(run.path).reconfigure(best.config))
    assert all_bits(run) == all_bits(best)
    assert validated(run) == validated(best)
    assert records(run)[-1] == records(best)[-1]


@pytest.mark.parametrize("back", [1, 2])
def test_a_run_that_goes_back_has_its_best_round_still(
    copy: RunFolder, best: RunFolder, back: int
) -> None:
    for number in ServerCheckpoints(copy.server, 2).rounds()[-back:]:
        shutil.rmtree(copy.server / f"round-{number:05d}")
    train(copy)
    assert all_bits(copy) == all_bits(best)
    assert validated(copy) == validated(best)
    TrainedRun(copy.path, CPU)


def test_a_best_round_whose_checkpoint_is_lost_is_named_and_begins_anew(copy: RunFolder) -> None:
    path = copy.server / f"round-{FOUND:05d}"
    (path / STATE_FILE).write_bytes(b"spoilt")
    with pytest.raises(DamagedError, match=f"remove {path} to have the last round in its"):
        TrainedRun(copy.path, CPU)
    shutil.rmtree(path)
    assert TrainedRun(copy.path, CPU).round == 6
    shutil.rmtree(copy.server / "round-00006")
    notices = Notices()
    train(copy, notices)
    assert any("checkpoint of round 2, the best by validation, is gone" in s for s in notices.said)
    assert result_of(copy)["round"] == TrainedRun(copy.path, CPU).round == 6


def test_a_checkpoint_of_before_opens(tmp_path: Path) -> None:
    checkpoints = ServerCheckpoints(tmp_path, 2)
    checkpoints.save(server_state(3))
    write_as_before(tmp_path / "round-00003", 2, without=["best", "validation"])
    state = checkpoints.load_last()
    assert (state.round, state.best, state.validation) == (3, None, {})
    assert checkpoints.load_best(state) is state


def test_the_server_keeps_the_best_rounds_checkpoint_as_long_as_a_kept_one_names_it(
    tmp_path: Path,
) -> None:
    checkpoints = ServerCheckpoints(tmp_path, 2)
    named = [None, 1, 1, 1, 5, 5, 5, 5]
    rounds = []
    for number, round_number in enumerate(named):
        found = None if round_number is None else BestRound(round_number, 0.5, {"a": 0.5}, {})
        checkpoints.save(replace(server_state(number), best=found))
        rounds.append(checkpoints.rounds())
    # Round 5 is the best when it is saved: whoever goes back to round 3 needs round 1.
    assert rounds[3:] == [[1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7]]


# --- Who counts ----------------------------------------------------------------------------------


def state_of(number: int, clients: str = "ab", **fields: Any) -> RunState:
    base = server_state(number)
    attempts = {client: f"{client}-{number}" for client in clients}
    return RunState(base.lineage, number, base.shared, attempts=attempts, **fields)


def test_the_mean_is_over_last_known_losses_and_ties_are_the_first_rounds() -> None:
    tell = Notices()
    state, told = judge_round(state_of(1), {"a": 0.4, "b": 0.6}, tell)
    assert told.loss == 0.5
    assert state.best == BestRound(1, 0.5, {"a": 0.4, "b": 0.6}, {"a": "a-1", "b": "b-1"})

    def at(number: int, losses: dict[str, float], missing: dict[str, str]) -> tuple[Any, Any]:
        before = state_of(number, validation=state.validation, best=state.best)
        return judge_round(before, losses, tell, missing=missing)

    after, told = at(2, {"a": 0.2}, {"b": "not connected"})
    assert (told.loss, told.missing) == (0.2, {"b": "not connected"})
    assert (after.best.round, after.best.loss) == (2, pytest.approx(0.4))
    assert after.best.losses == {"a": 0.2, "b": 0.6}
    after, _ = at(3, {"a": 0.5, "b": 0.5}, {})
    assert after.best.round == 1, "not better, and later"
    assert tell.said == []
    after, told = at(4, {}, {"a": "no reply in time", "b": "not connected"})
    assert (after.best, after.validation, told.loss) == (state.best, state.validation, None)
    assert tell.said == ["round 4: no owner has told its validation loss"]


def test_the_best_begins_anew_when_an_owner_comes_and_says_so() -> None:
    tell = Notices()
    known = {"a": 0.1, "b": 0.1}
    found = BestRound(2, 0.1, known, {"a": "a-2", "b": "b-2"})
    assert hold_to_owners(state_of(3, validation=known, best=found), tell).best is found
    joined = hold_to_owners(state_of(3, "abc", validation=known, best=found), tell)
    assert joined.best is None
    assert tell.said.pop() == (
        "round 3: the best round by validation begins anew: earlier rounds have no θ_i of c"
    )
    state, _ = judge_round(joined, {"a": 0.4, "b": 0.4, "c": 0.4}, tell)
    assert state.best is not None
    assert (state.best.round, state.best.loss) == (3, pytest.approx(0.4))
    # One that took part, and whose loss was never known: means over others cannot be compared.
    silent = state_of(3, validation=known, best=found)
    state, _ = judge_round(silent, {**known, "c": 0.9}, tell)
    assert state.best is not None
    assert state.best.round == 3
    assert tell.said == [
        "round 3: the best round by validation begins anew: there was no loss of c before"
    ]


FEW = {"federation.rounds": 4, "evaluation.every": 0}


def test_a_client_that_joins_later_has_a_model_in_the_best_round(
    tmp_path: Path, without_pauses: None
) -> None:
    waiting = {"federation.join_timeout": SOON}
    run = begin(tmp_path / "run", {**BEST, **FEW, **waiting})
    grid = ChangingGrid(run, connected=lambda finished: {1, 2, 3} if finished > 1 else {1, 2})
    notices = Notices()
    run_rounds(run, Federated(grid, run), [notices])
    assert any("earlier rounds have no θ_i of digit-2" in text for text in notices.said)
    assert best_of(run).round > FOUND, "of two owners, whom it served better"
    assert set(best_of(run).attempts) == set(CLIENTS)
    assert set(validations(run)[FOUND]["loss_by_client"]) == {"digit-0", "digit-1"}


def test_clients_that_were_not_chosen_are_asked_too(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {**BEST, **FEW, "federation.clients_per_round": 2})
    train(run)
    for line in MetricsLog(run.metrics).rounds():
        assert len(line["accepted"]) == 2
    assert {n: set(v["loss_by_client"]) for n, v in validations(run).items()} == {
        2: set(CLIENTS),
        4: set(CLIENTS),
    }
    trained = TrainedRun(run.path, CPU)
    state = ServerCheckpoints(run.server, 2).load_last()
    assert set(best_of(run).attempts) == set(state.attempts), "begun anew with the last to come"
    for info in trained.tasks:
        trained.exclusive_of(info)


# --- Lies and failures ---------------------------------------------------------------------------


def honest() -> Message:
    header = ReplyHeader("digit-0", "round-00002-0", 2)
    return Message(reply_content(header, {"loss": 0.5, EXAMPLES: 4.0}), 1, VALIDATE)


def with_tensor(reply: Message) -> None:
    reply.content["more"] = array_record({"a": torch.zeros(2)})


def with_second_numbers(reply: Message) -> None:
    reply.content["more"] = MetricRecord({"loss": 0.5})


def without_numbers(reply: Message) -> None:
    del reply.content[METRICS]


LIES: dict[str, tuple[Callable[[Message], None], str]] = {
    "below zero": (set_number("loss", -0.1), "its number 'loss' is -0.1, not from 0 to 1e"),
    "infinite": (set_number("loss", math.inf), "its number 'loss' is inf"),
    "too large": (set_number("loss", 2 * LARGEST_LOSS), "its number 'loss' is 2"),
    "a list": (set_number("loss", [0.5, 0.5]), "its number 'loss' is a list of 2"),
    "fewer images": (
        set_number(EXAMPLES, 3.0),
        "its number 'num-examples' is 3.0, not a whole number",
    ),
    "half an image": (set_number(EXAMPLES, 4.5), "its number 'num-examples' is 4.5"),
    "another number": (set_number("test", 0.5), "1 numbers that nobody asked for: 'test'"),
    "no number": (without_numbers, "its number 'loss' is None"),
    "a tensor": (with_tensor, "1 records that nobody asked for: 'more'"),
    "more numbers": (with_second_numbers, "1 records that nobody asked for: 'more'"),
    "another client": (set_field("client", "digit-1"), "it answers as 'digit-1'"),
    "an older attempt": (set_field("attempt", "round-00001-0"), "'round-00001-0', not for this"),
    "another field": (set_field("note", "hello"), "1 fields that nobody asked for: 'note'"),
}


def screened(message: Message) -> float | None:
    contract = Contract(tiny_config(BEST), [])
    expected = ReplyHeader("digit-0", "round-00002-0", 2)
    return screen_validation(unpack(message), expected, contract).loss


@pytest.mark.parametrize("what", LIES)
def test_what_no_honest_client_says_is_refused(what: str) -> None:
    lie, words = LIES[what]
    reply = honest()
    assert screened(reply) == 0.5
    lie(reply)
    with pytest.raises(RefusedError) as caught:
        screened(reply)
    assert words in str(caught.value)


def test_a_number_that_is_not_told_is_silence() -> None:
    reply = honest()
    set_number("loss", math.nan)(reply)
    assert screened(reply) is None


def validating(faults: dict[int, Faults]) -> ClientApp:
    """The real handlers without the guard, of whom some lie when they are asked for their loss."""
    app = app_with(0)

    @app.evaluate("validate")
    def validate(message: Message, context: Context) -> Message:
        reply = client_app.validate(message, context)
        left = faults.get(int(str(context.node_config["partition-id"])), [])
        return (left.pop(0)(reply) if left else None) or reply

    return app


def untouched(reply: Message) -> None:
    pass


def test_clients_that_lie_are_named_and_count_with_what_they_said_before(
    best: RunFolder, tmp_path: Path
) -> None:
    run = begin(tmp_path / "run", {**BEST, **FEW})
    faults = {
        1: [untouched, set_number("loss", -1.0)],
        2: [untouched, set_number("loss", math.nan)],
    }
    run_on_grid(run, InlineGrid, validating(faults))
    expected = {n: line["loss_by_client"] for n, line in validations(best).items()}
    told = validations(run)
    assert told[2]["loss_by_client"] == expected[2]
    assert told[4]["loss_by_client"] == {"digit-0": expected[4]["digit-0"]}
    (lie,) = told[4]["refused"].items()
    assert lie[0] == "digit-1"
    assert "its number 'loss' is -1.0, not from 0 to 1e" in lie[1]
    assert told[4]["missing"] == {"digit-2": "its owner tells no mean of so few images"}
    known = {**expected[2], "digit-0": expected[4]["digit-0"]}
    assert result_of(run)["last"] == pytest.approx(np.mean(list(known.values())))
    assert all(line["accepted"] == CLIENTS for line in round_lines(run)), "their updates are in φ"


def test_the_guard_lets_nothing_else_out(best: RunFolder, tmp_path: Path) -> None:
    """Losses image by image, and tensors of θ_i."""

    def by_image(reply: Message) -> None:
        reply.content.metric_records[METRICS]["loss"] = [0.5, 0.4, 0.3, 0.2]

    def exclusive(reply: Message) -> None:
        reply.content["exclusive"] = array_record({"head.conv.weight": torch.zeros(2)})

    def other_count(reply: Message) -> None:
        reply.content.metric_records[METRICS]["seconds"] = 1.0

    shared = TrainedRun(best.path, CPU).shared
    for leak in (untouched, by_image, exclusive, other_count):
        app = ClientApp(mods=[wire_guard])

        @app.evaluate("validate")
        def validate(message: Message, context: Context, leak: Any = leak) -> Message:
            reply = client_app.validate(message, context)
            leak(reply)
            return reply

        reply = _ask(app, tmp_path, best.config, shared)
        assert reply.has_content() == (leak is untouched), leak
        assert leak is untouched or reply.error.code == FAILED


def _ask(app: ClientApp, folder: Path, config: RunConfig, shared: Any, **fields: Any) -> Message:
    values = {"round": 2, "attempt": "round-00002-x", **fields}
    request = Request(config.to_json(), "lineage", "digit-0", **values)
    grid = InlineGrid(app, 1, folder)
    message = Message(request_content(request, {SHARED: shared}), 1, VALIDATE)
    return grid.send_and_receive([message])[0]


@pytest.mark.parametrize("settings", [{"federation.result": "last"}, {}])
def test_a_loss_that_is_not_due_is_not_told(
    best: RunFolder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = tiny_config({**BEST, **settings})
    shared = TrainedRun(best.path, CPU).shared
    reply = _ask(client_app.app, tmp_path, config, shared, round=2 if settings else 3)
    assert reply.error.reason == "not agreed: federation.validate_every"


def test_a_run_in_which_nobody_tells_a_loss_ends_with_its_last_round(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", {**BEST, "federation.rounds": 1, "federation.clients": 2})
    notices, silent = Notices(), set_number("loss", math.nan)
    train_in_process(run, [notices], validating({0: [silent], 1: [silent]}))
    assert notices.said == ["round 1: no owner has told its validation loss"]
    assert MetricsLog(run.metrics).evaluations()[-1]["result"] is None
    assert TrainedRun(run.path, CPU).round == 1


# --- Centralised, Ray, settings ------------------------------------------------------------------


def central(path: Path, settings: dict[str, Any], *observers: Observer) -> RunFolder:
    settings = {**settings, "training.method": "balanced", "training.centralised_batch_size": 12}
    run = begin(path, settings)
    run_rounds(run, Centralised(run), observers)
    return run


def test_centralised_training_finds_its_best_round_likewise(tmp_path: Path) -> None:
    run = central(tmp_path / "best", BEST)
    settings = {
        **SETTINGS,
        "training.method": "balanced",
        "training.centralised_batch_size": 12,
    }
    other = begin(tmp_path / "other", settings)
    with_second_implementation(
        other, lambda seeker: run_rounds(other, Centralised(other), [seeker])
    )
    assert_same_as_second_implementation(run, other)
    assert all_bits(run) == all_bits(other)
    before = validated(run)
    shutil.rmtree(run.server / "round-00006")
    run_rounds(run, Centralised(run), ())
    assert all_bits(run) == all_bits(other)
    assert validated(run) == before
    score = MetricsLog(run.metrics).evaluations()[-1]["score"]
    assert score != MetricsLog(other.metrics).evaluations()[-1]["score"], "of other weights"


@pytest.mark.slow
def test_ray_finds_the_same_round(best: RunFolder, tmp_path: Path) -> None:
    config = tmp_path / "best.yaml"
    config.write_text(best.config.to_yaml())
    arguments = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    assert simulate.main([*arguments, "--set", "resources.backend=ray"]) == 0
    run = RunFolder.open(tmp_path / "run")
    assert all_bits(run) == all_bits(best)
    assert validated(run) == validated(best)


def test_a_best_round_needs_validation_images() -> None:
    text = message_of(lambda: tiny_config({"federation.result": "best"}))
    assert "federation.result best needs data.validation_images, and it is 0; allowed: 2" in text
    text = message_of(lambda: tiny_config({**BEST, "federation.validate_every": 0}))
    assert "federation.validate_every" in text


@pytest.mark.parametrize("key", ["federation.result", "federation.validate_every"])
def test_a_run_cannot_change_its_mind(best: RunFolder, key: str) -> None:
    value: Any = "last" if key == "federation.result" else 3
    config = best.config.model_copy(
        update={
            "federation": best.config.federation.model_copy(
                update={key.removeprefix("federation."): value}
            )
        }
    )
    with pytest.raises(UserError, match=f"begun with another configuration: {key}: "):
        best.reconfigure(config)

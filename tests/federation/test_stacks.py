"""Clients whose rounds are trained as one program: their bits follow from the run alone, and a
failure is one client's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import Context, Message

from srfed.config import load_config, parse_config
from srfed.errors import UserError
from srfed.federation.flower.client_app import guarded_app
from srfed.federation.flower.exchange import StoppedError
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.ray import run_on_ray
from srfed.federation.flower.stacking import PARTITIONS, shared_out
from srfed.federation.messages import EVALUATE, TRAIN
from srfed.federation.together import answer_together, done_in_turn
from srfed.storage.run_folder import RunFolder
from support.tiny_run import (
    CHEAP,
    CLIENTS,
    all_bits,
    begin,
    records,
    round_lines,
    run_in_process,
    run_on_grid,
    tiny_config,
)

SETTINGS: dict[str, Any] = {
    **CHEAP,
    "federation.rounds": 2,
    "federation.compare": "alone",
    "model.exclusive_stages": 1,
    "model.owned": ["vector", "film"],
    "training.control_variates": True,
    "training.local_steps": 1,
    "updates.steps": ["clip", "quantise"],
    "evaluation.memorisation_quantile": 0.0,
}
MIDDLE = 1


class StoppingGrid(InlineGrid):
    """The run is stopped when the first stack of round 2 has trained, and before it is heard."""

    def _run_client(self, message: Message) -> Message:
        reply = super()._run_client(message)
        if message.metadata.message_type == "train.stack" and message.metadata.group_id == "2":
            raise StoppedError
        return reply


class RecordingGrid(InlineGrid):
    """Keeps what kinds of messages came, each with its clients' places."""

    asked: ClassVar[list[tuple[str, list[int]]]] = []

    def _run_client(self, message: Message) -> Message:
        places = message.content.config_records.get(PARTITIONS, {}).get(PARTITIONS, [])
        assert isinstance(places, list)
        self.asked.append((message.metadata.message_type, [int(str(place)) for place in places]))
        return super()._run_client(message)


def failing(times: int, kind: str = TRAIN) -> Callable[..., Message]:
    """A mod that makes so many of the middle client's answers fail once they are made."""
    left = [None] * times

    def mod(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
        reply = call_next(message, context)
        middle = context.node_config["partition-id"] == MIDDLE
        if message.metadata.message_type == kind and middle and left:
            left.pop()
            raise RuntimeError("no such luck")
        return reply

    return mod


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_in_process(
        begin(tmp_path_factory.mktemp("whole") / "run", {**SETTINGS, "resources.stack": 2})
    )


def test_a_stopped_run_a_client_asked_again_and_another_stack_have_the_same_bits(
    whole: RunFolder, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "resources.stack": 3, "federation.on_missing": "wait"}
    run = begin(tmp_path / "run", settings)
    with pytest.raises(StoppedError):
        run_on_grid(run, StoppingGrid, guarded_app([failing(1)]))
    assert [line["round"] for line in round_lines(run)] == [1]
    assert all_bits(run_in_process(RunFolder.open(run.path))) == all_bits(whole)
    assert all(len(line["accepted"]) == 3 for line in round_lines(whole))


def test_a_stack_is_not_one_by_one_to_the_bit_and_is_so_to_rounding(
    whole: RunFolder, tmp_path: Path
) -> None:
    alone = run_in_process(begin(tmp_path / "run", {**SETTINGS, "federation.rounds": 1}))
    (one, *_), (other, *_) = round_lines(alone), round_lines(whole)
    assert one["loss_by_client"] == pytest.approx(other["loss_by_client"], rel=1e-5)
    assert one["loss_by_client"] != other["loss_by_client"]


def test_more_owners_than_a_cpu_adds_up_alike_are_more_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From eight owners on the first convolution of grey images would have other bits."""
    monkeypatch.setattr(RecordingGrid, "asked", [])
    few = {"evaluation.samples": 18, "evaluation.samples_between": 18}
    cheap = {**CHEAP, **few, "federation.rounds": 1, "federation.clients": 9}
    runs = [begin(tmp_path / f"{n}", {**cheap, "resources.stack": n}) for n in (3, 9)]
    for run in runs:
        run_on_grid(run, RecordingGrid)
    trained = [places for kind, places in RecordingGrid.asked if kind == "train.stack"]
    assert trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert all_bits(runs[0]) == all_bits(runs[1])
    first, second = (records(run)[-1] for run in runs)
    assert first == second


@pytest.mark.slow
def test_stacks_in_rays_processes_have_the_bits_of_those_in_one(tmp_path: Path) -> None:
    """Two processes share five owners out otherwise than one does, pictures included."""
    few = {"federation.rounds": 1, "federation.clients": 5, "evaluation.samples": 20}
    settings = {**CHEAP, **few, "model.exclusive_stages": 1}
    inline = run_in_process(begin(tmp_path / "inline", {**settings, "resources.stack": 5}))
    ray = {"resources.backend": "ray", "resources.cpus": 2, "resources.stack": 2}
    several = begin(tmp_path / "ray", {**settings, **ray})
    run_on_ray(several)
    assert all_bits(several) == all_bits(inline)
    one, other = (records(run)[-1] for run in (inline, several))
    # A request has its run's settings in it, in words of another length.
    assert one.pop("bytes_down") != other.pop("bytes_down")
    assert one["kind"] == "evaluation"
    assert one == other


def test_an_evaluation_asks_stacks_and_one_clients_failure_is_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordingGrid, "asked", [])
    settings = {**CHEAP, "federation.rounds": 1, "evaluation.samples": 18}
    alone = begin(tmp_path / "alone", settings)
    whole = begin(tmp_path / "whole", {**settings, "resources.stack": 3})
    short = begin(tmp_path / "short", {**settings, "resources.stack": 3})
    run_on_grid(alone, InlineGrid)
    run_on_grid(whole, RecordingGrid)
    assert RecordingGrid.asked[-1] == ("evaluate.stack", [0, 1, 2])
    run_on_grid(short, InlineGrid, guarded_app([failing(1, EVALUATE)]))
    one, other, less = (records(run)[-1] for run in (alone, whole, short))
    assert less["refused"].keys() == {"digit-1"}
    assert "no such luck" in (short.clients / "digit-1" / "client.log").read_text()
    for client, score in less["score_by_client"].items():
        assert score == other["score_by_client"][client]
    # Other bits of φ too, so pictures may be off by more than a level.
    assert one["score"] == pytest.approx(other["score"], rel=0.02)


def test_one_clients_failure_is_not_the_others(tmp_path: Path) -> None:
    settings = {**SETTINGS, "resources.stack": 3, "federation.rounds": 1}
    run = run_in_process(begin(tmp_path / "run", settings), guarded_app([failing(1)]))
    (line,) = round_lines(run)
    assert line["accepted"] == ["digit-0", "digit-2"]
    assert list(line["refused"]) == ["digit-1"]
    assert "no such luck" in (run.clients / "digit-1" / "client.log").read_text()
    log = run.clients / "digit-0" / "client.log"
    assert not log.exists() or "no such luck" not in log.read_text()


QUITTING = """
from own_network import Mixer
class Quitting(Mixer):
    def forward(self, x, time, tasks=None):
        raise SystemExit("the network quits")
"""


def test_a_network_that_exits_fails_its_clients_and_not_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "quitting_network.py").write_text(QUITTING)
    content = tiny_config({**CHEAP, "resources.stack": 3}).model_dump(mode="json")
    content["model"] = {"network": "quitting_network:Quitting", "exclusive_stages": 1}
    run = RunFolder.create(tmp_path / "run", parse_config(content))
    with pytest.raises(UserError, match="round 1 has 0 accepted updates"):
        run_in_process(run)
    for client in CLIENTS:
        log = (run.clients / client / "client.log").read_text()
        assert "ExitError: SystemExit was raised: the network quits" in log


def test_clients_take_turns_and_each_has_its_own_outcome() -> None:
    """No torch in it: two ask for something once, one twice, one fails before and one after."""
    order: list[str] = []

    def client(name: str, times: int) -> Callable[[], str]:
        def answer() -> str:
            if name == "before":
                raise ValueError(name)
            got = [done_in_turn(f"{name}{k}") for k in range(times)]
            order.append(name)
            if name == "after":
                raise ValueError(name)
            return f"{name}: {got}"

        return answer

    stacks: list[list[str]] = []

    def train(jobs: list[str]) -> list[object]:
        stacks.append(jobs)
        return [KeyError("x") if job == "c0" else job.upper() for job in jobs]

    names = {"a": 1, "before": 1, "b": 2, "c": 1, "after": 1}
    found = answer_together([client(name, times) for name, times in names.items()], train)
    assert stacks == [["a0", "b0", "c0", "after0"], ["b1"]]
    assert order == ["a", "after", "b"]
    assert [found[0], found[2]] == ["a: ['A0']", "b: ['B0', 'B1']"]
    assert [type(found[k]) for k in (1, 3, 4)] == [ValueError, KeyError, ValueError]


def test_when_training_is_interrupted_nobody_is_left_waiting() -> None:
    ended: list[BaseException] = []

    def answer() -> None:
        try:
            done_in_turn(None)
        except BaseException as error:
            ended.append(error)
            raise

    def train(jobs: list[None]) -> list[None]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_together([answer, answer], train)
    assert len(ended) == 2
    assert not any(isinstance(error, Exception) for error in ended)


def test_stacks_are_as_equal_as_can_be() -> None:
    assert [len(stack) for stack in shared_out([str(k) for k in range(10)], 4)] == [3, 3, 4]
    assert shared_out(["a", "b"], 8) == [["a", "b"]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["resources.stack=0"], "resources.stack = "),
        (["resources.stack=-1"], "resources.stack = "),
        (["resources.stack=2.5"], "resources.stack = "),
        (["resources.stack=many"], "resources.stack = "),
        (["resources.stack=11"], "resources.stack 11 is above federation.clients 10"),
        (
            ["resources.stack=2", "training.method=balanced", "training.batch_size=30"],
            "resources.stack 2 needs training.method federated, not balanced; allowed: auto, 1",
        ),
        (
            ["resources.stack=2", "model.dropout=0.1"],
            "resources.stack 2 needs model.dropout 0, and it is 0.1",
        ),
        (
            ["resources.stack=2", "data.dataset=sites", "evaluation.mode=statistics"],
            "resources.stack 2 is for simulations",
        ),
    ],
)
def test_an_impossible_stack_is_refused_in_one_sentence(settings: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)

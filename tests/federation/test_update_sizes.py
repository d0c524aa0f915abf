"""Updates of an implausible size: refused, or shortened and named."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from srfed.data import load_tasks
from srfed.federation.flower.client_app import app as real_app
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import array_record, read_tensors
from srfed.federation.messages import DESCRIBE, EXAMPLES, METRICS, REPLY, SHARED, TRAIN
from srfed.storage.run_folder import RunFolder
from support.faults import Tensors
from support.membership import MIDDLE, ROUNDS, SETTINGS, SOON, ChangingGrid, failure, resume, start
from support.tiny_run import CLIENTS, all_bits, begin, round_lines, server_bits

pytestmark = pytest.mark.usefixtures("without_pauses")


def answering(change: Callable[[int, Tensors, Tensors], Tensors], index: int = MIDDLE) -> ClientApp:
    """A client that answers another φ than it has trained: of the round, the φ received, and the φ
    trained.
    """

    class Answering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = real_app(message, context)
            if (
                message.metadata.message_type == TRAIN
                and context.node_config["partition-id"] == index
            ):
                before, after = (read_tensors(one.content, SHARED) for one in (message, reply))
                reply.content[SHARED] = array_record(
                    change(int(message.metadata.group_id), before, after)
                )
            return reply

    return Answering()


def enlarging(factors: dict[int, float]) -> ClientApp:
    """The middle client's updates, in some rounds, are so many times as large as they should be."""

    def change(number: int, before: Tensors, after: Tensors) -> Tensors:
        factor = factors.get(number, 1.0)
        return (
            {name: before[name] + factor * (after[name] - before[name]) for name in before}
            if factor != 1
            else after
        )

    return answering(change)


def norm(before: Tensors, after: Tensors) -> float:
    return (
        sum(float((after[name] - before[name]).double().square().sum()) for name in before) ** 0.5
    )


def test_an_update_beyond_what_adam_can_move_is_refused_and_leaves_no_trace(
    tmp_path: Path, without: Callable[..., RunFolder]
) -> None:
    run = begin(tmp_path / "run", SETTINGS)
    start(run, ChangingGrid(run, enlarging({2: 1000.0})))
    refused = round_lines(run)[1]["refused"]
    assert list(refused) == ["digit-1"]
    assert "is the most that a round can move φ" in refused["digit-1"]
    assert all_bits(run) == all_bits(without(MIDDLE, 2))


def test_a_client_that_is_alone_in_its_round_is_held_to_the_same(
    half: RunFolder, tmp_path: Path
) -> None:
    run = resume(half, tmp_path / "run", {"federation.join_timeout": SOON})
    text = failure(
        lambda: start(run, ChangingGrid(run, enlarging({2: 1000.0}), connected=lambda _: {2}))
    )
    assert "digit-1: its update has norm" in text
    assert "round 2 has 0 accepted updates" in text
    assert server_bits(run)["round"] == 1


def test_an_update_longer_than_one_rate_a_step_is_shortened_to_that_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[float] = []
    values: list[int] = []

    def change(number: int, before: Tensors, after: Tensors) -> Tensors:
        longer = {name: before[name] + 8 * (after[name] - before[name]) for name in before}
        sent.append(norm(before, longer))
        values.append(sum(tensor.numel() for tensor in before.values()))
        return longer

    alone = {
        "federation.clients": 1,
        "federation.rounds": 1,
        "federation.server_optimizer": "average",
    }
    run = begin(tmp_path / "run", {**SETTINGS, **alone})
    start(run, InlineGrid(answering(change, 0), 1, run.clients))
    line = round_lines(run)[0]
    limit = run.config.training.learning_rate * values[0] ** 0.5
    assert sent[0] > 2 * limit
    assert line["update_norm"] == pytest.approx(limit, rel=2e-3)
    assert line["shortened"]["digit-0"] == pytest.approx(limit / sent[0], rel=2e-3)
    assert "round 1: digit-0: its update is" in capsys.readouterr().err


def test_beside_an_owner_who_returns_what_it_got_the_other_is_accepted_every_round(
    tmp_path: Path,
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, "federation.clients": 2})
    start(run, InlineGrid(answering(lambda _number, before, _after: before), 2, run.clients))
    assert [line["accepted"] for line in round_lines(run)] == [CLIENTS[:2]] * ROUNDS
    assert [line["shortened"] for line in round_lines(run)] == [{}] * ROUNDS


@pytest.mark.parametrize(("clip", "accepted"), [(1.0, ["digit-0", "digit-2"]), (None, CLIENTS)])
def test_plain_sgd_is_bounded_by_its_clipping_alone(
    tmp_path: Path, clip: float | None, accepted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "training.optimizer": "sgd",
        "training.learning_rate": 0.1,
        "training.gradient_clip": clip,
    }
    run = begin(tmp_path / "run", {**SETTINGS, **changes, "federation.rounds": 1})
    start(run, ChangingGrid(run, enlarging({1: 1000.0})))
    assert round_lines(run)[0]["accepted"] == accepted
    assert ("updates have no bound" in capsys.readouterr().err) == (clip is None)


EPOCHS = {
    "data.images_per_task": None,
    "federation.rounds": 1,
    "federation.server_optimizer": "average",
    "training.local_steps": None,
    "training.local_epochs": 1,
    "training.batch_size": 16,
}


class Claiming(ClientApp):
    """The middle client claims so many images, and moves every value of φ by so much."""

    def __init__(self, images: int, by: float) -> None:
        super().__init__()
        self._images, self._by = images, by

    def __call__(self, message: Message, context: Context) -> Message:
        reply = real_app(message, context)
        if context.node_config["partition-id"] != MIDDLE:
            return reply
        if message.metadata.message_type == DESCRIBE:
            reply.content.config_records[REPLY]["images"] = self._images
        if message.metadata.message_type == TRAIN:
            before = read_tensors(message.content, SHARED)
            reply.content[SHARED] = array_record({n: t + self._by for n, t in before.items()})
            numbers = reply.content.metric_records[METRICS]
            numbers[EXAMPLES], numbers["shared_steps"] = self._images, self._images // 16
        return reply


def test_a_claim_of_a_million_images_widens_no_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **EPOCHS})
    start(run, ChangingGrid(run, Claiming(10**6, 1.0)))
    line, rate = round_lines(run)[0], run.config.training.learning_rate
    # The others take 8 steps, of which ten times as many are believed: as far as in those.
    factor = line["shortened"]["digit-1"]
    assert list(line["shortened"]) == ["digit-1"]
    assert factor == pytest.approx(80 * rate, rel=0.01)
    assert "believed of the 62500 that its claim of 1000000 images makes" in capsys.readouterr().err
    # Nor does it make the moving average forget everything.
    assert server_bits(run)["shared_steps"] < 80
    # Nor is it on record: as many minibatches of 16 as are believed, and what the others have seen.
    tasks = load_tasks(run.config.data, 3)
    others = sum(len(tasks[index].train) // 16 * 16 for index in (0, 2))
    assert line["images"] == others + 80 * 16
    assert line["images_per_second"] == pytest.approx(line["images"] / line["seconds"])


def test_with_the_number_of_images_configured_nobody_can_claim_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", {**SETTINGS, **EPOCHS, "data.images_per_task": 32})
    start(run, ChangingGrid(run, Claiming(33, 0.0)))
    assert round_lines(run)[0]["accepted"] == ["digit-0", "digit-2"]
    assert (
        "'digit-1': it has 33 training images, and data.images_per_task" in capsys.readouterr().err
    )

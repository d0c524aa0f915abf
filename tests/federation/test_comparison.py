"""What joining is worth: each owner's model alone, trained in the same rounds and compared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

import srfed
from srfed.config import ResourcesConfig
from srfed.data import load_tasks
from srfed.data.images import Images
from srfed.diffusion.process import Process
from srfed.errors import UserError
from srfed.evaluation.metrics.denoising_loss import denoising_losses, mean_loss
from srfed.federation.agreement import AgreedSamples, LeastImages, weak_numbers
from srfed.federation.bounds import EvaluatePlan
from srfed.federation.comparison import FILE, MEMORY
from srfed.federation.flower import client_app
from srfed.federation.flower.guard import wire_guard
from srfed.model import build_model, build_objective
from srfed.networks.partition import Exclusive, Shared
from srfed.records import Comparison
from srfed.reporting.joining import joining_in_words, joining_table
from srfed.runs.run import TrainedRun
from srfed.storage.client_store import ClientStore
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.alone import Alone, begin_alone, from_memory, to_memory
from srfed.training.part import ClientState, Part, load_tensors
from support.errors import message_of
from support.faults import app_with, set_number
from support.tiny_run import CLIENTS, all_bits, begin, run_in_process, tiny_config

SETTINGS: dict[str, Any] = {
    "federation.rounds": 4,
    "federation.keep_attempts": 9,
    "data.images_per_task": 40,
    "data.validation_images": 6,
    "evaluation.every": 2,
    "evaluation.ssim_images": 0,
    "evaluation.memorisation_quantile": 0,
}
COMPARED = {**SETTINGS, "federation.compare": "alone"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_in_process(begin(tmp_path_factory.mktemp("compared") / "run", COMPARED))


def alone_of(run: RunFolder, client: str, number: int | None = None) -> Alone:
    """What a client has kept of its model alone after its last attempt, or that of a round."""
    attempts = [ServerCheckpoints(run.server, 9).load_last().attempts[client]]
    if number is not None:
        attempts = [
            path.name
            for path in (run.clients / client).glob("lineages/*/*/")
            if path.name.startswith(f"round-{number:05d}")
        ]
    store = ClientStore(run.clients, client, run.lineage, 9)
    return from_memory(store.load(attempts[0]).memory[MEMORY])


def comparisons(run: RunFolder) -> list[dict[str, Any]]:
    return [line["comparisons"] for line in MetricsLog(run.metrics).evaluations()]


def loss_of(run: RunFolder, tensors: dict[str, Tensor], images: Images, client: str) -> float:
    """The denoising loss of a whole model."""
    config = run.config
    network = build_model(config, images.shape[-1])
    load_tensors(network, tensors)
    objective = build_objective(config, torch.device("cpu"))
    process: Process = objective.process
    denoiser = objective.denoiser(network.eval())
    return mean_loss(denoising_losses(denoiser, process, images, task=client, seed=config.seed))


def test_the_model_alone_is_that_of_a_run_where_nothing_is_shared(
    compared: RunFolder, tmp_path: Path
) -> None:
    nothing = run_in_process(begin(tmp_path / "run", {**SETTINGS, "model.exclusive_stages": "all"}))
    for client in CLIENTS:
        alone = alone_of(compared, client)
        attempts = ServerCheckpoints(nothing.server, 9).load_last().attempts
        expected = (
            ClientStore(nothing.clients, client, nothing.lineage, 9)
            .load(attempts[client])
            .exclusive.weights
        )
        found = {**alone.core.weights, **alone.state.exclusive.weights}
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_the_federations_bits_are_those_without_a_comparison(
    compared: RunFolder, tmp_path: Path
) -> None:
    other = run_in_process(begin(tmp_path / "run", SETTINGS))
    ours, theirs = (ServerCheckpoints(run.server, 9).load_last() for run in (compared, other))
    assert all(
        torch.equal(ours.shared.weights[name], tensor)
        for name, tensor in theirs.shared.weights.items()
    )
    lines = [MetricsLog(run.metrics).rounds() for run in (compared, other)]
    for with_it, without in zip(*lines, strict=True):
        assert with_it["loss"] == without["loss"]
        assert with_it["bytes_up"] - without["bytes_up"] == 0, "no tensor more travels"


def test_the_figures_are_those_of_the_two_models_on_the_held_out_images(
    compared: RunFolder,
) -> None:
    run = TrainedRun(compared.path, ResourcesConfig(device="cpu"))
    tasks = load_tasks(compared.config.data, 3)
    last = comparisons(compared)[-1]
    for info, task in zip(run.tasks, tasks, strict=True):
        alone, figures = alone_of(compared, info.client), last[info.client]
        together = {**run.shared, **run.exclusive_of(info)}
        for name, tensors in (("together", together), ("alone", dict(alone.best))):
            expected = loss_of(compared, tensors, task.test, info.client)
            assert figures[name] == pytest.approx(expected, rel=1e-9)
        ratio = figures["alone"] / figures["together"]
        assert figures["ratio"] == pytest.approx(ratio)
        assert figures["low"] < ratio < figures["high"]
        assert figures["alone_round"] == alone.best_round
        kept = json.loads((compared.clients / info.client / FILE).read_text())
        assert kept["round"] == 4
        assert kept["ratio"] == figures["ratio"]


def test_the_model_alone_is_the_one_of_its_best_round_by_the_images_set_aside(
    compared: RunFolder,
) -> None:
    tasks = {task.name: task for task in load_tasks(compared.config.data, 3)}
    for client in CLIENTS:
        losses = {}
        for number in range(1, 5):
            averages = alone_of(compared, client, number).averages
            losses[number] = loss_of(compared, averages, tasks[client].validation, client)
        alone = alone_of(compared, client)
        assert alone.best_round == min(losses, key=lambda number: losses[number])
        assert alone.best_loss == pytest.approx(min(losses.values()), rel=1e-9)


def test_a_later_round_that_is_worse_is_not_taken() -> None:
    begun = from_memory(to_memory(_some()))
    first = begun.judged(1, 0.5)
    assert first.judged(2, 0.6) is first
    assert first.judged(3, math.nan) is first
    assert first.judged(2, 0.4).best_round == 2
    last = begun.judged(1, None).judged(2, None)
    assert (last.best_round, last.best_loss) == (2, math.inf)
    torch.testing.assert_close(dict(last.best), dict(begun.averages))


def _some() -> Alone:
    exclusive = {"head": torch.arange(3.0)}
    state = ClientState(
        Part(Exclusive(exclusive), Exclusive(exclusive), {"exp_avg.head": torch.ones(3)}, 7),
        {"exp_avg.core": torch.zeros(2)},
        11,
    )
    return begin_alone(Shared({"core": torch.ones(2)}), state)


def test_what_is_kept_comes_back_whole() -> None:
    alone = _some().judged(3, 0.25)
    again = from_memory(to_memory(alone))
    assert (again.best_round, again.best_loss) == (3, 0.25)
    assert (again.state.minibatches, again.state.exclusive.steps) == (11, 7)
    assert {*again.best} == {"core", "head"}
    assert {*again.state.exclusive.moments, *again.state.shared_moments} == {
        "exp_avg.head",
        "exp_avg.core",
    }


def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(
    compared: RunFolder, tmp_path: Path
) -> None:
    first = run_in_process(begin(tmp_path / "run", {**COMPARED, "federation.rounds": 2}))
    again = run_in_process(first.reconfigure(tiny_config(COMPARED)))
    assert all_bits(again) == all_bits(compared)
    assert comparisons(again)[-1] == comparisons(compared)[-1]


def test_figures_that_are_not_told_stay_with_the_owner(compared: RunFolder, tmp_path: Path) -> None:
    run = run_in_process(begin(tmp_path / "run", {**COMPARED, "federation.compare_told": False}))
    assert comparisons(run) == [{}, {}]
    for client in CLIENTS:
        kept, told = (
            json.loads((folder.clients / client / FILE).read_text()) for folder in (run, compared)
        )
        assert kept == told


@pytest.mark.parametrize(
    ("told", "name", "value", "reason"),
    [
        (True, "comparison_x", 1.0, "comparison_x"),
        (False, "comparison_alone", 1.0, "comparison_alone"),
        (True, "comparison_alone", -1.0, "'comparison_alone' is -1.0, not from 1e-09 to 1e+06"),
        (True, "comparison_low", math.nan, "'comparison_low' is nan"),
        (True, "comparison_alone_round", 1.5, "'comparison_alone_round' is 1.5"),
    ],
)
def test_figures_that_nobody_asked_for_or_that_cannot_be_are_refused(
    tmp_path: Path, told: bool, name: str, value: float, reason: str
) -> None:
    settings = {**COMPARED, "federation.compare_told": told, "federation.rounds": 1}
    run = begin(tmp_path / "run", settings)
    run_in_process(run, app_with(1, evaluate=[set_number(name, value)]))
    (line,) = MetricsLog(run.metrics).evaluations()
    assert reason in line["refused"]["digit-1"]
    assert ("digit-0" in line["comparisons"]) is told
    assert "digit-1" not in line["comparisons"]


def test_the_guard_lets_no_figures_out_that_are_not_to_be_told(tmp_path: Path) -> None:
    settings = {**COMPARED, "federation.compare_told": False, "federation.rounds": 1}
    run = begin(tmp_path / "run", settings)

    def telling(message: Message, context: Context) -> Message:
        reply: Message = client_app.evaluate(message, context)
        set_number("comparison_alone", 1.0)(reply)
        return reply

    app = ClientApp(mods=[wire_guard])
    app.query("describe")(client_app.describe)
    app.train()(client_app.train)
    app.evaluate()(telling)
    with pytest.raises(UserError, match="no client gave samples"):
        run_in_process(run, app)
    assert MetricsLog(run.metrics).evaluations() == []
    for client in CLIENTS:
        assert "comparison_alone" in (run.clients / client / "client.log").read_text()


def test_settings_that_cannot_be() -> None:
    text = message_of(
        tiny_config, {**COMPARED, "training.method": "one_task", "federation.clients": 3}
    )
    assert "federation.compare alone needs training.method federated, not one_task" in text
    with pytest.raises(UserError, match="leaves none: everybody is alone"):
        srfed.train(tiny_config({**COMPARED, "model.exclusive_stages": "all"}))


def test_an_owner_wants_enough_images_behind_a_figure_that_leaves() -> None:
    least, samples = LeastImages(statistics=2, mean=8), AgreedSamples(final=20, between=20)
    config = tiny_config({**COMPARED, "evaluation.mode": "statistics"})
    found = dict(weak_numbers(config, least, (40, 5), samples))
    assert "on 5 test images, 8 is the least" in found["federation.compare_told"]
    kept = tiny_config({**COMPARED, "federation.compare_told": False})
    assert "federation.compare_told" not in dict(weak_numbers(kept, least, (40, 5), samples))
    assert EvaluatePlan.of(config, (8, 8, 1), 40, 5, 20, True, compared=True).compared
    assert not EvaluatePlan.of(kept, (8, 8, 1), 40, 5, 20, True, compared=True).compared


def test_a_verdict_needs_the_whole_interval_on_one_side() -> None:
    pays, still_open, costs = (
        Comparison(alone, 0.1, low, high, 3)
        for alone, low, high in ((0.11, 1.05, 1.15), (0.101, 0.99, 1.03), (0.09, 0.85, 0.95))
    )
    assert [one.verdict for one in (pays, still_open, costs)] == ["pays", "open", "costs"]
    words = joining_in_words([pays, still_open, costs])
    mean = np.exp(np.mean(np.log([1.1, 1.01, 0.9])))
    assert f"{mean:.3f} times" in words
    assert "it pays for 1 of 3, it is open for 1 of 3, it costs for 1 of 3" in words
    lines = joining_table({"a": pays, "long-name": costs})
    assert lines[1] == "a            0.1100    0.1000  1.100 (1.050 to 1.150): it pays"

"""Whole runs: the grids agree to the bit, arrival order changes nothing, every part of the dial
works.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from flwr.app import Message

from srfed.config import FederationConfig
from srfed.federation.aggregation import UpdateSum, client_weights
from srfed.federation.flower.in_process import InlineGrid
from srfed.model import build_model, build_partition
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.aggregation import aggregated
from support.tiny_run import (
    CHEAP,
    CLIENTS,
    accepted_attempts,
    all_bits,
    begin,
    records,
    round_lines,
    run_in_process,
    run_on_grid,
    stop_after_a_round,
    tiny_config,
)

# --- Ray ----------------------------------------------------------------------------------------


MEMORIES: dict[str, Any] = {"training.control_variates": True, "updates.shared_bits": 8}
"""What both sides have to keep from round to round beside the weights."""


class RayRuns(NamedTuple):
    """One whole run of the real command on Ray, and one that SIGTERM stopped, which Ray would like
    to have itself.
    """

    whole: RunFolder
    output: str
    stopped: RunFolder
    stop_code: int
    stop_message: str


def ray_command(tiny_yaml: Path, folder: Path, *settings: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "srfed",
        "simulate",
        "--config",
        str(tiny_yaml),
        "--backend",
        "ray",
    ]
    return [
        *command,
        "--run-dir",
        str(folder),
        *(part for setting in settings for part in ("--set", setting)),
    ]


@pytest.fixture(scope="module")
def ray_runs(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> RayRuns:
    """The suite's only two Ray runs; the first meets a RAY_ADDRESS at which there is nobody any
    more.
    """
    folder = tmp_path_factory.mktemp("ray")
    done = subprocess.run(
        ray_command(tiny_yaml, folder / "whole", "federation.rounds=2"),
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"},
    )
    assert done.returncode == 0, done.stderr
    endless = ray_command(
        tiny_yaml,
        folder / "stopped",
        "federation.rounds=9999",
        "evaluation.every=0",
        *(f"{name}={json.dumps(value)}" for name, value in MEMORIES.items()),
    )
    code, message = stop_after_a_round(endless, signal.SIGTERM)
    return RayRuns(
        RunFolder.open(folder / "whole"),
        done.stdout,
        RunFolder.open(folder / "stopped"),
        code,
        message,
    )


@pytest.mark.slow
def test_ray_and_in_process_grids_give_the_same_bits_and_records(
    ray_runs: RayRuns, two_rounds: RunFolder
) -> None:
    inline = two_rounds
    assert all_bits(ray_runs.whole) == all_bits(inline)
    assert set(all_bits(inline)) == {"server", *CLIENTS}
    # The request carries the configuration, whose backend differs: so do a few bytes of traffic.
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("bytes")} for line in records(run)]
        for run in (ray_runs.whole, inline)
    ]
    assert lines[0] == lines[1]
    for round_number in (2,):
        for kind in ("round", "reverse-process"):
            name = f"samples/{kind}-{round_number:05d}.png"
            assert (ray_runs.whole.path / name).read_bytes() == (inline.path / name).read_bytes()


@pytest.mark.slow
def test_a_ray_run_prints_a_line_a_round_and_the_table(ray_runs: RayRuns) -> None:
    lines = ray_runs.output.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("round")] == ["1/2", "2/2"]
    assert any(line.startswith("evaluation 2: fd_embedded") for line in lines)
    assert any(line.startswith("all tasks") for line in lines)


@pytest.mark.slow
def test_a_ray_run_stopped_by_sigterm_goes_on_in_process_with_the_same_bits(
    ray_runs: RayRuns, tmp_path: Path
) -> None:
    assert ray_runs.stop_code == 143
    assert f"--resume {ray_runs.stopped.path}" in ray_runs.stop_message
    assert "Traceback" not in ray_runs.stop_message
    done = len(round_lines(ray_runs.stopped))
    config = ray_runs.stopped.config
    config = config.model_copy(
        update={
            "federation": config.federation.model_copy(update={"rounds": done + 1}),
            "resources": config.resources.model_copy(update={"backend": "inline"}),
        }
    )
    resumed = run_in_process(ray_runs.stopped.reconfigure(config))
    settings = {**MEMORIES, "federation.rounds": done + 1, "evaluation.every": 0}
    whole = run_in_process(begin(tmp_path / "run", settings))
    assert all_bits(resumed) == all_bits(whole)


# --- One process --------------------------------------------------------------------------------


class LastFirstGrid(InlineGrid):
    """The last client that was asked answers first."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        last = [message_id for message_id in self._waiting if message_id in set(message_ids)][-1:]
        return super().pull_messages(last)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_the_order_in_which_replies_arrive_changes_no_bit(tmp_path: Path, weights: str) -> None:
    # Momentum is kept in float64, where another order of summation would show.
    settings = {
        **CHEAP,
        "evaluation.ssim_images": 1,
        "federation.server_optimizer": "momentum",
        "federation.weights": weights,
        "federation.rounds": 2,
    }
    first = run_in_process(begin(tmp_path / "first", settings))
    run = begin(tmp_path / "last", settings)
    run_on_grid(run, LastFirstGrid)
    assert all_bits(first) == all_bits(run)
    assert records(first) == records(run)


def test_another_seed_gives_other_bits(finished_run: RunFolder, tmp_path: Path) -> None:
    config = finished_run.config.model_copy(update={"seed": 1})
    other = run_in_process(RunFolder.create(tmp_path / "run", config))
    ours, theirs = all_bits(finished_run), all_bits(other)
    assert all(ours[name]["sha256"] != theirs[name]["sha256"] for name in ours)


@pytest.mark.parametrize("stages", ["none", "io", 4, "all", ["head", "up.0.*"]])
def test_every_position_of_the_dial_runs_with_its_evaluation(
    tmp_path: Path, stages: object
) -> None:
    run = run_in_process(
        begin(
            tmp_path / "run",
            {
                **CHEAP,
                "evaluation.ssim_images": 1,
                "evaluation.memorisation_quantile": 0.05,
                "model.exclusive_stages": stages,
                "federation.rounds": 1,
                "training.update": "alternating",
            },
        )
    )
    model = build_model(run.config, 1)
    partition = build_partition(run.config, model)
    shared = read_checkpoint(run.server / "round-00001").group("shared")
    assert set(shared) == set(partition.shared)
    for folder in accepted_attempts(run).values():
        assert set(read_checkpoint(folder).group("exclusive")) == set(partition.exclusive)
    evaluation = records(run)[-1]
    assert evaluation["kind"] == "evaluation"
    assert sorted(evaluation["score_by_client"]) == sorted(evaluation["ssim_by_client"]) == CLIENTS


def test_every_client_keeps_a_state_of_its_own(tmp_path: Path) -> None:
    settings = {"federation.rounds": 1, "evaluation.samples": 6, "training.shared_moments": "keep"}
    run = run_in_process(begin(tmp_path / "run", settings))
    states = [read_checkpoint(folder) for folder in accepted_attempts(run).values()]
    for group in ("exclusive", "exclusive_average", "exclusive_moments", "shared_moments"):
        assert (
            len(
                {
                    hashlib.sha256(repr(sorted_bytes(s.group(group))).encode()).digest()
                    for s in states
                }
            )
            == 3
        )
    assert {state.manifest["parent"] for state in states} == {"none"}
    assert {state.manifest["steps"] for state in states} == {2}


def sorted_bytes(tensors: dict[str, torch.Tensor]) -> list[tuple[str, bytes]]:
    return [(name, tensors[name].numpy().tobytes()) for name in sorted(tensors)]


def test_an_evaluation_may_ask_a_few_clients_that_are_drawn_by_round_and_seed(
    tmp_path: Path,
) -> None:
    few = {**CHEAP, "evaluation.clients": 2, "evaluation.every": 1, "evaluation.samples_between": 4}
    run = run_in_process(begin(tmp_path / "run", {**few, "federation.rounds": 4}))
    judged = [line["score_by_client"] for line in MetricsLog(run.metrics).evaluations()]
    assert [len(scores) for scores in judged] == [2, 2, 2, 2]
    assert len({tuple(scores) for scores in judged}) > 1, "the same two every time"
    assert [line["samples"] for line in MetricsLog(run.metrics).evaluations()] == [4, 4, 4, 6]
    # Which two does not depend on how many evaluations were before.
    alone = run_in_process(
        begin(tmp_path / "alone", {**few, "federation.rounds": 4, "evaluation.every": 3})
    )
    later = [line["score_by_client"] for line in MetricsLog(alone.metrics).evaluations()]
    assert later == judged[2:]


def test_a_round_with_fewer_clients_draws_different_ones_and_leaves_the_others_alone(
    tmp_path: Path,
) -> None:
    run = run_in_process(
        begin(
            tmp_path / "run",
            {"federation.clients_per_round": 1, "federation.rounds": 4, "evaluation.every": 0},
        )
    )
    drawn = [line["accepted"] for line in round_lines(run)]
    assert all(len(clients) == 1 for clients in drawn)
    assert len({clients[0] for clients in drawn}) > 1
    for client, folder in accepted_attempts(run).items():
        last = max(number for number, clients in enumerate(drawn, 1) if clients == [client])
        assert folder.name.startswith(f"round-{last:05d}")


# --- Aggregation --------------------------------------------------------------------------------


def test_weights_are_equal_or_by_number_of_images_never_by_number_of_batches() -> None:
    images = {"b": 300, "a": 100}
    assert client_weights("uniform", images) == {"a": 0.5, "b": 0.5}
    assert client_weights("examples", images) == {"a": 0.25, "b": 0.75}


def test_the_mean_is_summed_in_float64_as_the_ids_come() -> None:
    start = {"w": torch.zeros(1)}
    total = UpdateSum(FederationConfig(weights="uniform"), start)
    # Otherwise ordered, or in float32, the 1 would be lost.
    for client, value in (("a", 2.0**60), ("b", -(2.0**60)), ("c", 1.0)):
        total.add(client, {"w": torch.tensor([value])}, 10, {"w": torch.tensor([2 * value])})
    mean = total.mean()
    assert mean.change["w"].dtype == torch.float64
    assert mean.change["w"].item() == pytest.approx(1 / 3)
    assert mean.control["w"].item() == pytest.approx(2 / 3)
    assert mean.squares == pytest.approx(2.0**121 / 3)


@pytest.mark.parametrize("rule", ["uniform", "examples"])
@pytest.mark.parametrize("largest", [0.2, 0.3, 0.8, 1.0])
def test_a_sum_is_the_mean_with_the_weights_that_there_are_in_the_end(
    rule: Literal["uniform", "examples"], largest: float
) -> None:
    """Whoever has too many examples is held back, which is known only when all are there."""
    settings = FederationConfig(weights=rule, largest_weight=largest)
    generator = torch.Generator().manual_seed(3)
    start = {"w": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}
    examples = {"a": 3, "b": 900, "c": 40, "d": 900, "e": 2, "f": 350, "g": 41}
    updates = {
        client: {n: t + torch.randn(t.shape, generator=generator) for n, t in start.items()}
        for client in examples
    }
    total = UpdateSum(settings, start)
    for number, client in enumerate(sorted(examples), 1):
        total.add(client, updates[client], examples[client])
        known = dict(sorted(examples.items())[:number])
        weights = client_weights(rule, known, largest)
        mean = total.mean()
        assert mean.weights == weights
        for name, tensor in start.items():
            moved = {c: updates[c][name].double() - tensor.double() for c in known}
            expected = sum(weights[c] * moved[c] for c in known)
            torch.testing.assert_close(mean.change[name], expected, rtol=1e-12, atol=1e-12)
        squares = {
            c: sum(
                float((updates[c][n].double() - t.double()).square().sum())
                for n, t in start.items()
            )
            for c in known
        }
        assert mean.squares == pytest.approx(sum(weights[c] * squares[c] for c in known))


def reference_server(
    kind: str, deltas: list[float], rate: float, m: float, v: float, tau: float
) -> list[float]:
    """Hsu et al. (2019) and Reddi et al. (2021), Algorithm 2, with plain numbers."""
    value, first, second, path = 1.0, 0.0, 0.0, []
    for delta in deltas:
        if kind == "average":
            value += rate * delta
        elif kind == "momentum":
            first = m * first + delta
            value += rate * first
        else:
            first = m * first + (1 - m) * delta
            second = v * second + (1 - v) * delta**2
            value += rate * first / (second**0.5 + tau)
        path.append(value)
    return path


@pytest.mark.parametrize("kind", ["average", "momentum", "adam"])
def test_server_optimizers_follow_their_papers(kind: str) -> None:

    settings = tiny_config(
        {
            "federation.server_optimizer": kind,
            "federation.server_learning_rate": 0.5,
            "federation.server_momentum": 0.8,
            "federation.server_second_moment": 0.95,
            "federation.server_epsilon": 0.01,
        }
    ).federation
    shared = {"w": torch.ones(1, dtype=torch.float64)}
    optimizer: dict[str, torch.Tensor] = {}
    deltas, path = [0.3, -0.2, 0.7], []
    for delta in deltas:
        outcome = aggregated(
            settings, shared, {"a": {"w": shared["w"] + delta}}, {"a": 1.0}, optimizer
        )
        shared, optimizer = outcome.shared, outcome.optimizer
        path.append(shared["w"].item())
    assert path == pytest.approx(reference_server(kind, deltas, 0.5, 0.8, 0.95, 0.01), rel=1e-12)


@pytest.mark.parametrize(
    ("moves", "expected"), [((1.0, 1.0), 0.0), ((1.0, -1.0), 1.0), ((0.0, 0.0), 0.0)]
)
def test_disagreement_is_0_for_equal_moves_and_1_for_moves_that_cancel(
    moves: tuple[float, float], expected: float
) -> None:

    updates = {name: {"w": torch.full((3,), move)} for name, move in zip("ab", moves, strict=True)}
    outcome = aggregated(
        tiny_config().federation, {"w": torch.zeros(3)}, updates, {"a": 0.5, "b": 0.5}, {}
    )
    assert outcome.disagreement == pytest.approx(expected)
    assert outcome.update_norm == pytest.approx(abs(sum(moves) / 2) * 3**0.5)


def test_the_averaged_core_moves_by_local_steps_not_by_rounds(tmp_path: Path) -> None:
    settings = {"federation.rounds": 1, "training.ema_warmup": False, "training.ema_decay": 0.9}
    run = run_in_process(begin(tmp_path / "run", settings))
    start, end = (read_checkpoint(run.server / f"round-{number:05d}") for number in (0, 1))
    for name, tensor in end.group("shared").items():
        expected = start.group("shared")[name].lerp(tensor, 1 - 0.9**2)  # two local steps a round
        torch.testing.assert_close(end.group("shared_average")[name], expected)
    assert not torch.equal(end.group("shared_average")[name], start.group("shared")[name])

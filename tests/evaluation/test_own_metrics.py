"""Metrics of one's own, and a run's numbers as a table."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import srfed
from srfed.data import load_tasks
from srfed.evaluation.metrics.own import OwnMetrics
from srfed.reporting.frame import tidy
from support.errors import message_of
from support.tiny_run import CHEAP, CLIENTS, tiny_config

SETTINGS = {**CHEAP, "federation.rounds": 1, "evaluation.samples": 9, "training.local_steps": 1}


def gap(real: np.ndarray, generated: np.ndarray) -> float:
    return abs(float(real.mean()) - float(generated.mean()))


class Heard:
    """A metric that keeps what it is given, and then spoils it."""

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, real: np.ndarray, generated: np.ndarray) -> np.float32:
        self.given.append((real.copy(), generated.copy()))
        value = gap(real, generated)
        real[:] = generated[:] = 0
        return np.float32(value)


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def run(heard: Heard, tmp_path_factory: pytest.TempPathFactory) -> srfed.Run:
    folder = tmp_path_factory.mktemp("own") / "run"
    return srfed.train(tiny_config(SETTINGS), run_dir=folder, metrics={"spoils": heard, "gap": gap})


def test_a_metric_is_given_held_out_and_generated_images(heard: Heard, run: srfed.Run) -> None:
    tasks = load_tasks(run.config.data, 3)
    *owners, (real, generated) = heard.given
    for task, (own, samples) in zip(tasks, owners, strict=True):
        assert np.array_equal(own, task.test)
        assert np.array_equal(samples, run.sample(task.name, 3, seed=run.config.seed))
    assert np.array_equal(real, np.concatenate([task.test for task in tasks]))
    assert generated.shape == (9, 8, 8, 1)


def test_what_it_returns_is_wherever_a_score_is(heard: Heard, run: srfed.Run) -> None:
    (line,) = [line for line in run.metrics() if line["kind"] == "evaluation"]
    values = [gap(real, generated) for real, generated in heard.given]
    expected = {"all": values[-1], "by_client": dict(zip(CLIENTS, values, strict=False))}
    assert line["own"]["gap"] == expected, "the metric before it has spoiled nothing"
    assert line["own"]["spoils"]["all"] == pytest.approx(values[-1])
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert events.Scalars("own/gap")[0].value == pytest.approx(values[-1])
    assert events.Scalars("own_gap_by_client/digit-1")[0].value == pytest.approx(values[1])
    page = (run.path / "report.html").read_text()
    assert "<th>gap</th>" in page
    assert f"<td>{values[1]:.4f}</td>" in page
    assert "gap, a metric of one&#39;s own" in page


def test_a_tidy_row_is_one_number_of_the_log(run: srfed.Run) -> None:
    lines = run.metrics()
    rows = tidy(lines)
    assert all(list(r) == ["kind", "round", "final", "metric", "owner", "value"] for r in rows)
    found = {(r["kind"], r["metric"], r["owner"]): r["value"] for r in rows}
    assert len(found) == len(rows)
    a_round, evaluation = lines
    assert found["round", "loss", "digit-2"] == a_round["loss_by_client"]["digit-2"]
    assert found["round", "loss", "all"] == a_round["loss"]
    assert found["evaluation", "fd_embedded", "all"] == evaluation["score"]
    assert found["evaluation", "fd_embedded_real_images", "all"] == evaluation["floor"]
    assert (
        found["evaluation", "recognised", "digit-0"]
        == (evaluation["recognised_by_client"]["digit-0"])
    )
    assert (
        found["evaluation", "gap", "digit-0"] == (evaluation["own"]["gap"]["by_client"]["digit-0"])
    )


def test_pandas_is_asked_for_in_a_sentence(run: srfed.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    text = message_of(run.frame)
    assert "Run.frame() needs pandas" in text
    assert 'pip install "srfed[pandas]"' in text


@pytest.mark.skipif(find_spec("pandas") is None, reason="pandas is not installed")
def test_a_frame_pivots_to_a_column_an_owner(run: srfed.Run) -> None:
    frame = run.frame()
    losses = frame[frame.metric == "loss"].pivot(index="round", columns="owner", values="value")
    assert list(losses.columns) == ["all", *CLIENTS]
    assert losses.loc[1, "all"] == run.metrics()[0]["loss"]


def test_owners_whose_images_differ_in_shape_have_no_score_together() -> None:
    images = {"a": np.zeros((2, 8, 8, 1), np.uint8), "b": np.ones((2, 9, 8, 1), np.uint8)}
    found = OwnMetrics({"gap": gap}, tiny_config())(images, {"a": images["a"], "b": images["b"]})
    assert found["gap"].all is None
    assert found["gap"].by_client == {"a": 0.0, "b": 0.0}


def wrong(real: Any, generated: Any) -> float:
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("metrics", "settings", "words"),
    [
        ({"a b": gap}, {}, "metrics has the name 'a b'; allowed: letters"),
        ({"gap": 3}, {}, "metrics['gap'] is of type int; allowed: a function of (real, generated)"),
        ({"gap": gap}, {"evaluation.mode": "statistics"}, "evaluation.mode = statistics keeps"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_before_anything_is_written(
    metrics: Any, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = tiny_config({**SETTINGS, **settings})
    text = message_of(lambda: srfed.train(config, run_dir=tmp_path / "run", metrics=metrics))
    assert words in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("returned", [wrong, lambda real, generated: "much"])
def test_a_metric_that_fails_is_named(returned: Any) -> None:
    images = {"a": np.zeros((2, 8, 8, 1), np.uint8)}
    text = message_of(lambda: OwnMetrics({"mine": returned}, tiny_config())(images, images))
    assert text.startswith("metrics['mine'] fails on the images of a: ValueError: ")


def test_one_party_with_all_images_has_them_too_and_what_is_no_number_is_null(
    tmp_path: Path,
) -> None:
    config = tiny_config({**SETTINGS, "training.method": "one_task", "federation.clients": 1})
    run = srfed.train(config, run_dir=tmp_path / "run", metrics={"gap": lambda r, g: np.nan})
    assert run.metrics()[-1]["own"]["gap"] == {"all": None, "by_client": {"digit-0": None}}
    assert "<th>gap</th>" in (run.path / "report.html").read_text()

"""The memorisation audit on its way from the clients to the reports: only its numbers travel."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from srfed.api import train_run
from srfed.commands import evaluate
from srfed.data import load_tasks
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.memorisation import audit
from srfed.federation.flower import client_app
from srfed.federation.flower.packing import read_metrics
from srfed.federation.messages import EVALUATE, METRICS
from srfed.reporting.curves import shown_on_terminal
from srfed.runs.run import TrainedRun
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.tiny_run import CLIENTS, begin, run_in_process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = {"evaluation.memorisation_quantile": 0.2}
    return run_in_process(begin(tmp_path_factory.mktemp("audited") / "run", settings))


def test_the_last_evaluation_reports_every_clients_audit(run: RunFolder) -> None:
    between, last = MetricsLog(run.metrics).evaluations()
    assert between["audits"] == {}
    assert sorted(last["audits"]) == CLIENTS
    trained = TrainedRun(run.path, run.config.resources)
    network = EmbeddedFeatures()
    for info, task in zip(trained.tasks, load_tasks(run.config.data, 3), strict=True):
        samples = generate(
            trained.denoiser(info),
            trained.objective.process,
            run.config.sampling,
            count=10,
            shape=trained.shapes[0],
            seed=run.config.seed,
            task=info.client,
            strip_steps=3,
        ).images
        expected = audit(samples, task.train, task.test, network, quantile=0.2)
        found = last["audits"][info.client]
        assert found.pop("fires") == expected.fires
        assert found == pytest.approx(expected.to_numbers())


def test_an_audit_that_cannot_be_made_says_why_to_its_owner_and_that_there_is_none_to_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One client's held-out images are all training images too; another's two are not."""
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 2
    held_out = np.concatenate([images[:4:2], 255 - images[1:5:2]])
    np.savez(
        tmp_path / "own.npz",
        train_images=images,
        train_labels=labels,
        test_images=held_out,
        test_labels=np.array([0, 0, 1, 1]),
    )
    settings = {
        "data.dataset": "npz",
        "data.dir": str(tmp_path / "own.npz"),
        "federation.clients": 2,
        "federation.rounds": 1,
    }
    run = run_in_process(begin(tmp_path / "run", settings))
    (last,) = MetricsLog(run.metrics).evaluations()
    assert list(last["audits"]) == ["class-1"]
    log = (run.clients / "class-0" / "client.log").read_text()
    assert "round 1: no memorisation audit: all 2 held-out images are training images too" in log
    assert not (run.clients / "class-1" / "client.log").exists()
    assert (
        "  no memorisation audit: class-0; a client's own log says why\n" in capsys.readouterr().out
    )

    assert evaluate.main(["--run", str(run.path), "--samples", "12"]) == 0
    said = capsys.readouterr().out
    assert "no memorisation audit of class-0: all 2 held-out images are training images too" in said
    assert "memorisation: 0." in said, "the other task's"

    central = {**settings, "training.method": "pooled", "model.exclusive_stages": "none"}
    pooled = begin(tmp_path / "central", central)
    train_run(pooled, shown_on_terminal(pooled))
    assert (
        "class-0: no memorisation audit: all 2 held-out images are training"
        in capsys.readouterr().err
    )


def test_suspicious_pairs_stay_with_their_owner(run: RunFolder) -> None:
    for client in CLIENTS:
        assert [path.name for path in (run.clients / client / "memorisation").iterdir()] == [
            "round-00003.png"
        ]


def test_quantile_zero_switches_it_off(tmp_path: Path) -> None:
    run = run_in_process(
        begin(tmp_path / "run", {"evaluation.memorisation_quantile": 0.0, "federation.rounds": 1})
    )
    (last,) = MetricsLog(run.metrics).evaluations()
    assert last["audits"] == {}
    assert not (run.clients / "digit-0" / "memorisation").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"memorisation_pixels_share": 2.0}, "'memorisation_pixels_share' is 2.0, not from 0 to 1"),
        ({"memorisation_features_tolerance": -1.0}, "'memorisation_features_tolerance' is -1.0"),
        ({"memorisation_pixels_median": 1.0}, "nobody asked for: 'memorisation_pixels_median'"),
        ({"memorisation_pixels_threshold": float("nan")}, "'memorisation_pixels_threshold' is nan"),
        ({"memorisation_pixels_share": None}, "'memorisation_pixels_share' is None"),
        (
            {"memorisation_pixels_generated": 1e300},
            "'memorisation_pixels_generated' is 1e+300, not 10",
        ),
        ({"memorisation_features_training": 1.0}, "'memorisation_features_training' is 1.0, not 1"),
        (
            {"memorisation_features_quantile": 0.4},
            "'memorisation_features_quantile' is 0.4, not 0.05",
        ),
    ],
)
def test_a_malformed_audit_is_refused(
    tmp_path: Path, changes: dict[str, float | None], expected: str
) -> None:
    app = ClientApp()
    app.query("describe")(client_app.describe)
    app.train()(client_app.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        reply = client_app.evaluate(message, context)
        if context.node_config["partition-id"] == 1:
            metrics: dict[str, Any] = {**read_metrics(reply.content), **changes}
            kept = {name: value for name, value in metrics.items() if value is not None}
            reply.content[METRICS] = MetricRecord(kept)
        return reply

    run = run_in_process(begin(tmp_path / "run", {"federation.rounds": 1}), app)
    (last,) = MetricsLog(run.metrics).evaluations()
    assert list(last["refused"]) == ["digit-1"]
    assert expected in last["refused"]["digit-1"]


def test_only_numbers_of_the_audit_are_in_the_reply(tmp_path: Path) -> None:
    replies: list[Message] = []
    app = ClientApp()
    app.query("describe")(client_app.describe)
    app.train()(client_app.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        replies.append(client_app.evaluate(message, context))
        return replies[-1]

    run_in_process(
        begin(tmp_path / "run", {"federation.rounds": 1, "evaluation.mode": "statistics"}), app
    )
    assert len(replies) == 3
    for reply in replies:
        assert reply.metadata.message_type == EVALUATE
        assert [
            name for name, record in reply.content.items() if isinstance(record, ArrayRecord)
        ] == ["statistics"]
        numbers = {
            n: v for n, v in read_metrics(reply.content).items() if n.startswith("memorisation_")
        }
        assert len(numbers) == 20
        assert all(isinstance(value, float) for value in numbers.values())
        assert json.dumps(numbers)

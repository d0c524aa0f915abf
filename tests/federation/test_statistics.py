"""Evaluation by feature statistics: the score is that of the images, and no image leaves; sites'
own models.
"""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from srfed.commands import sample
from srfed.config import ResourcesConfig, RunConfig
from srfed.data import Task, load_tasks, to_model_range
from srfed.deployment.agree import agree_as_rehearsed
from srfed.errors import UserError
from srfed.evaluation.features.load import FeatureNetwork, load_feature_network
from srfed.evaluation.generation import generate
from srfed.federation.bounds import EvaluatePlan
from srfed.federation.contract import Contract
from srfed.federation.flower import client_app
from srfed.federation.flower.client_app import app as real_app
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.in_process import InlineGrid
from srfed.federation.flower.packing import array_record, read_tensors, request_content, unpack
from srfed.federation.flower.server_app import run_federation
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    GENERATED,
    METRICS,
    REPLY,
    SETS,
    SHARED,
    STATISTICS,
    TRAIN,
    ReplyHeader,
    Request,
)
from srfed.federation.screening import RefusedError, screen_statistics
from srfed.federation.site import STATE_DIR_VARIABLE
from srfed.model import build_model, build_partition
from srfed.reporting.pictures import draw_grid
from srfed.runs.run import TrainedRun, TrainedSite
from srfed.storage.client_store import NO_PARENT
from srfed.storage.manifest import STATE_FILE
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.site_model import SiteModel, save_site_model
from support.errors import message_of
from support.faults import app_with, fail, set_field, set_number, without
from support.images import save
from support.stores import write_as_before
from support.tiny_run import CLIENTS, all_bits, begin, run_in_process, run_on_grid, tiny_config
from support.wire import RecordingGrid, is_bare_error, log_of

MOMENTS = {"evaluation.mode": "statistics"}
SETTINGS: dict[str, Any] = {"data.images_per_task": 16, "training.local_steps": 1}
CPU = ResourcesConfig(device="cpu")


class Recorded(NamedTuple):
    run: RunFolder
    grid: RecordingGrid

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return MetricsLog(self.run.metrics).evaluations()

    def replies(self, number: int) -> dict[str, Message]:
        """The evaluations' replies after a round, by client."""
        chosen = [
            reply
            for reply in self.grid.replies
            if reply.metadata.message_type == EVALUATE and reply.metadata.group_id == str(number)
        ]
        return {ReplyHeader.of(unpack(reply).header).client: reply for reply in chosen}


def recorded(path: Path, settings: dict[str, Any]) -> Recorded:
    run = begin(path, settings)
    grid = run_on_grid(run, RecordingGrid)
    assert isinstance(grid, RecordingGrid)
    return Recorded(run, grid)


@pytest.fixture(scope="module")
def by_samples(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(tmp_path_factory.mktemp("samples") / "run", SETTINGS)


@pytest.fixture(scope="module")
def by_moments(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return recorded(tmp_path_factory.mktemp("statistics") / "run", {**SETTINGS, **MOMENTS})


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_feature_network("embedded")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return load_tasks(tiny_config(SETTINGS).data, 3)


def generated_by(replies: dict[str, Message], name: str = "images") -> dict[str, np.ndarray]:
    return {
        client: read_tensors(reply.content, GENERATED)[name].numpy()
        for client, reply in replies.items()
    }


# --- The score -----------------------------------------------------------------------------------


def test_both_modes_give_the_same_scores_and_bits(
    by_samples: Recorded, by_moments: Recorded
) -> None:
    assert all_bits(by_moments.run) == all_bits(by_samples.run)
    assert [line["round"] for line in by_moments.evaluations] == [2, 3]
    for ours, theirs in zip(by_moments.evaluations, by_samples.evaluations, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-6)
        assert ours["floor"] == pytest.approx(theirs["floor"], rel=1e-6)
        assert sorted(ours["score_by_client"]) == CLIENTS
        assert ours["score_by_client"] == pytest.approx(theirs["score_by_client"], rel=1e-6)
        for name in (
            "final",
            "score_name",
            "samples",
            "references",
            "ssim",
            "ssim_by_client",
            "ssim_window",
        ):
            assert ours[name] == theirs[name], name
        assert ours["refused"] == ours["missing"] == {}


def test_the_scores_are_torch_fidelitys_of_the_pooled_features(
    by_samples: Recorded, by_moments: Recorded, network: FeatureNetwork, tasks: list[Task]
) -> None:
    def distance(first: list[np.ndarray], second: list[np.ndarray]) -> float:
        features = [
            np.concatenate([network(images) for images in part]) for part in (first, second)
        ]
        statistics = [
            {"mu": part.mean(axis=0), "sigma": np.cov(part, rowvar=False)} for part in features
        ]
        return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])

    images, line = generated_by(by_samples.replies(3)), by_moments.evaluations[-1]
    test = {task.name: task.test for task in tasks}
    assert line["samples"] == sum(map(len, images.values())) == 30
    assert line["references"] == sum(map(len, test.values()))
    assert line["score"] == pytest.approx(
        distance(list(images.values()), list(test.values())), rel=1e-6
    )
    assert line["floor"] == pytest.approx(
        distance([task.train for task in tasks], list(test.values())), rel=1e-6
    )
    for client in CLIENTS:
        expected = distance([images[client]], [test[client]])
        assert line["score_by_client"][client] == pytest.approx(expected, rel=1e-6)


# --- No image leaves -----------------------------------------------------------------------------


def test_no_image_and_no_images_features_are_in_any_message(
    by_samples: Recorded, by_moments: Recorded, network: FeatureNetwork, tasks: list[Task]
) -> None:
    haystack = by_moments.grid.data
    parts = {f"{name}.{part}" for name in SETS for part in ("mean", "scatter")}
    assert parts <= by_moments.grid.names
    assert not {"images", "strip"} & by_moments.grid.names
    generated = [
        images
        for number in (2, 3)
        for name in ("images", "strip")
        for images in generated_by(by_samples.replies(number), name).values()
    ]
    # The search finds what travels in the other mode, and what travels in this one.
    assert all(image.tobytes() in by_samples.grid.data for images in generated for image in images)
    assert network(tasks[0].train).mean(axis=0).tobytes() in haystack
    searched = 0
    for images in (*generated, *(images for task in tasks for images in (task.train, task.test))):
        features = network(images)
        for image, scaled, own in zip(images, to_model_range(images), features, strict=True):
            searched += 1
            for needle in (image, scaled.numpy(), own, own.astype(np.float32)):
                assert needle.tobytes() not in haystack
    assert searched > 30 + 12 + 3 * (16 + 30)


def test_the_owner_finds_the_pictures_and_the_server_has_none(
    by_samples: Recorded, by_moments: Recorded
) -> None:
    assert not by_moments.run.samples.exists() or not list(by_moments.run.samples.iterdir())
    assert len(list(by_samples.run.samples.iterdir())) == 4
    for number in (2, 3):
        images, strips = (
            generated_by(by_samples.replies(number), name) for name in ("images", "strip")
        )
        for client in CLIENTS:
            rows = {client: images[client][:4], "x_T to x_0": strips[client]}
            with Image.open(
                by_moments.run.clients / client / "samples" / f"round-{number:05d}.png"
            ) as picture:
                np.testing.assert_array_equal(np.asarray(picture), draw_grid(rows))
            assert not (by_samples.run.clients / client / "samples").exists()


def test_traffic_is_six_small_arrays_a_client(by_moments: Recorded) -> None:
    payload = 3 * 3 * 8 * (64 + 64 * 64)
    for line in by_moments.evaluations:
        assert payload < line["bytes_up"] < payload + 3 * 4096


# --- The guard -----------------------------------------------------------------------------------

Handler = Callable[[Message, Context], Message]
Change = Callable[[Message], None]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Message]:
    """One request to the client of digit-0, whose handler's reply is changed, and what leaves the
    client.
    """
    monkeypatch.setenv(STATE_DIR_VARIABLE, str(tmp_path))

    def send(kind: str, change: Change, *, guarded: bool, mode: str = "statistics") -> Message:
        handler: Handler = {TRAIN: client_app.train, EVALUATE: client_app.evaluate}[kind]

        def changed(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            change(reply)
            return reply

        app = ClientApp(mods=[wire_guard] if guarded else [])
        getattr(app, kind)()(changed)
        config = tiny_config({**SETTINGS, "evaluation.mode": mode, "evaluation.ssim_images": 0})
        model = build_model(config, 1)
        shared = build_partition(config, model).take_shared(model.state_dict())
        attempt = f"attempt-{guarded}"
        # A round is trained once, whatever the attempt is called.
        number = 2 if guarded and kind == TRAIN else 1
        request = Request(
            config.to_json(), "lineage", "digit-0", round=number, attempt=attempt, samples=4
        )
        content = request_content(request, {SHARED: shared})
        return InlineGrid(app, 1).send_and_receive([Message(content, 1, kind)])[0]

    return send


def statistics(**changes: np.ndarray | None) -> Change:
    """Other statistics in the place of some, "_" for the dot in a name; None takes one away."""

    def change(reply: Message) -> None:
        tensors = read_tensors(reply.content, STATISTICS)
        for name, values in changes.items():
            key = name.replace("_", ".")
            if values is None:
                del tensors[key]
            else:
                tensors[key] = torch.from_numpy(values)
        reply.content[STATISTICS] = array_record(tensors)

    return change


def and_images(*names: str) -> Change:
    """Images beside the statistics, as they would travel in the other mode."""

    def change(reply: Message) -> None:
        reply.content[GENERATED] = array_record(
            {name: torch.zeros(4, 8, 8, 1, dtype=torch.uint8) for name in names}
        )

    return change


def instead(reply: Message) -> None:
    del reply.content[STATISTICS]
    and_images("images", "strip")(reply)


def with_statistics(reply: Message) -> None:
    reply.content[STATISTICS] = array_record({"train.mean": torch.zeros(64, dtype=torch.float64)})


LEAKS: dict[str, tuple[str, str, Change]] = {
    "images and strip": (EVALUATE, "statistics", and_images("images", "strip")),
    "images": (EVALUATE, "statistics", and_images("images")),
    "a strip": (EVALUATE, "statistics", and_images("strip")),
    "images instead of statistics": (EVALUATE, "statistics", instead),
    "images among the statistics": (
        EVALUATE,
        "statistics",
        statistics(images=np.zeros((4, 8, 8, 1))),
    ),
    "features in place of a scatter": (
        EVALUATE,
        "statistics",
        statistics(train_scatter=np.zeros((142, 64))),
    ),
    "a larger scatter": (EVALUATE, "statistics", statistics(test_scatter=np.zeros((65, 65)))),
    "a smaller scatter": (EVALUATE, "statistics", statistics(test_scatter=np.zeros((63, 63)))),
    "a scatter in single precision": (
        EVALUATE,
        "statistics",
        statistics(test_scatter=np.zeros((64, 64), np.float32)),
    ),
    "a mean for each image": (EVALUATE, "statistics", statistics(generated_mean=np.zeros((4, 64)))),
    "one statistic less": (EVALUATE, "statistics", statistics(generated_mean=None)),
    "a number that nobody asked for": (EVALUATE, "statistics", set_number("pixel", 0.5)),
    "statistics beside the samples": (EVALUATE, "samples", with_statistics),
    "counts beside the samples": (EVALUATE, "samples", set_number("train_count", 16.0)),
    "statistics with an update": (TRAIN, "statistics", with_statistics),
    "images with an update": (TRAIN, "statistics", and_images("images")),
}


@pytest.mark.parametrize("what", LEAKS)
def test_the_guard_lets_nothing_but_the_asked_for_statistics_out(
    ask: Callable[..., Message], tmp_path: Path, what: str
) -> None:
    kind, mode, change = LEAKS[what]
    assert ask(kind, change, guarded=False, mode=mode).has_content(), "without the guard it leaves"
    assert is_bare_error(ask(kind, change, guarded=True, mode=mode))
    assert "NotAllowedError" in log_of(tmp_path)


def test_the_guard_lets_honest_statistics_out(ask: Callable[..., Message]) -> None:
    guarded, free = (
        ask(EVALUATE, lambda reply: None, guarded=guarded).content for guarded in (True, False)
    )
    assert list(guarded) == list(free)
    one, other = (read_tensors(content, STATISTICS) for content in (guarded, free))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- Replies that are not what was asked for
# --------------------------------------------------------


def filled(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value)


def edited(name: str, place: tuple[int, ...], value: float) -> Change:
    """One entry of a statistic, changed in a copy."""

    def change(reply: Message) -> None:
        values = read_tensors(reply.content, STATISTICS)[name].numpy()
        values[place] = value
        statistics(**{name.replace(".", "_"): values})(reply)

    return change


def indefinite(name: str) -> Change:
    """A symmetric scatter with a covariance larger than the two variances allow."""

    def change(reply: Message) -> None:
        values = read_tensors(reply.content, STATISTICS)[name].numpy()
        values[3, 4] = values[4, 3] = 2 * np.sqrt(values[3, 3] * values[4, 4]) + 1
        statistics(**{name.replace(".", "_"): values})(reply)

    return change


FAULTS: dict[str, tuple[Change, str]] = {
    "another network": (set_field("features", "0" * 64), "another network"),
    "no network": (set_field("features", ""), "another network"),
    "another client": (set_field("client", "digit-1"), "answers as 'digit-1'"),
    "one image more": (set_number("generated_count", 11.0), "'generated_count' is 11.0, not 10"),
    "one image less": (set_number("generated_count", 9.0), "'generated_count' is 9.0, not 10"),
    "more images than it said at first": (
        set_number("train_count", 1e9),
        "'train_count' is 1000000000.0, not 16",
    ),
    "part of an image": (set_number("train_count", 16.5), "'train_count' is 16.5, not 16"),
    "one test image": (set_number("test_count", 1.0), "'test_count' is 1.0, not"),
    "less than none": (set_number("train_count", -16.0), "'train_count' is -16.0, not 16"),
    "no number of images": (set_number("test_count", float("nan")), "'test_count'"),
    "infinitely many": (set_number("train_count", float("inf")), "'train_count'"),
    "a list of numbers": (set_number("train_count", [16.0]), "'train_count'"),
    "NaN in a mean": (edited("test.mean", (3,), np.nan), "not finite"),
    "infinity in a scatter": (edited("train.scatter", (3, 4), np.inf), "not finite"),
    "asymmetric": (
        edited("generated.scatter", (3, 4), 1e3),
        "statistics of generated features are none: scatter",
    ),
    "a negative variance": (
        edited("test.scatter", (5, 5), -1.0),
        "statistics of test features are none: scatter",
    ),
    "a negative eigenvalue": (
        indefinite("generated.scatter"),
        "statistics of generated features are none: scatter is none: it has a negative eigenvalue",
    ),
    "a mean below any feature's": (edited("test.mean", (3,), -0.5), "features are from 0 to"),
    "a mean above any feature's": (edited("test.mean", (3,), 50.0), "features are from 0 to"),
    "a scatter wider than the features": (
        edited("train.scatter", (3, 3), 1e5),
        "statistics of train features are none: scatter is none of values from 0 to",
    ),
    "a missing mean": (statistics(train_mean=None), "1 tensors are missing ['train.mean']"),
    "a missing scatter": (statistics(test_scatter=None), "1 tensors are missing ['test.scatter']"),
    "images besides": (statistics(images=np.zeros((4, 8, 8, 1))), "1 unknown ['images']"),
    "wrong shape": (
        statistics(test_scatter=filled(0.0, 64)),
        "'test.scatter' is torch.float64 (64,)",
    ),
    "other dimensions": (
        statistics(train_mean=filled(0.0, 63)),
        "'train.mean' is torch.float64 (63,)",
    ),
    "single precision": (statistics(test_mean=filled(0.0, 64).astype(np.float32)), "torch.float32"),
    "no statistics": (without(STATISTICS), "no arrays 'statistics'"),
    "no numbers": (without(METRICS), "'seconds' is None"),
    "images instead": (instead, "nobody asked for: 'generated'"),
    "SSIM above 1": (set_number("ssim", [1.5, 0.5]), "'ssim' is 1.5, not from -1 to 1"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faulty_statistics_are_refused_with_the_reason(
    by_moments: Recorded, network: FeatureNetwork, tasks: list[Task], what: str
) -> None:
    honest = by_moments.replies(3)["digit-0"]
    header = ReplyHeader.of(unpack(honest).header)
    plan = EvaluatePlan.of(
        by_moments.run.config, (8, 8, 1), 16, len(tasks[0].test), 10, final=True, compared=False
    )
    asked = (
        ReplyHeader(header.client, header.attempt, header.round),
        Contract(by_moments.run.config, []),
        plan,
        64,
        network.fingerprint,
        network.highest,
    )
    accepted = screen_statistics(unpack(honest), *asked).statistics
    assert accepted is not None
    assert (accepted.generated.count, accepted.train.count) == (10, 16)
    change, expected = FAULTS[what]
    faulty = copy.deepcopy(honest)
    change(faulty)
    with pytest.raises(RefusedError) as caught:
        screen_statistics(unpack(faulty), *asked)
    assert expected in str(caught.value)


EXTREMES: list[tuple[Change, str]] = [
    (statistics(test_mean=filled(1e200, 64)), "a mean whose square is no number"),
    (statistics(train_scatter=np.diag(filled(1e308, 64))), "a scatter whose sum is no number"),
    (set_number("test_count", 1e300), "more images than there are atoms"),
]


@pytest.mark.parametrize("number", range(len(EXTREMES)), ids=[what for _, what in EXTREMES])
def test_statistics_of_an_impossible_size_do_not_stop_the_run(tmp_path: Path, number: int) -> None:
    """Every value is finite by itself; what the server makes of them is not."""
    settings = {
        **SETTINGS,
        **MOMENTS,
        "federation.rounds": 1,
        "evaluation.samples": 6,
        "evaluation.ssim_images": 0,
    }
    run = begin(tmp_path / "run", settings)
    run_in_process(run, app_with(1, evaluate=[EXTREMES[number][0]]))
    (line,) = MetricsLog(run.metrics).evaluations()
    assert list(line["refused"]) == ["digit-1"]
    assert sorted(line["score_by_client"]) == ["digit-0", "digit-2"]
    assert 0 < line["score"] < 1e6


def test_the_score_is_that_of_the_clients_that_were_not_refused(tmp_path: Path) -> None:
    settings = {**SETTINGS, **MOMENTS, "evaluation.every": 1, "evaluation.samples_between": 30}
    chosen = ["another network", "asymmetric", "one image more"]
    faults = [FAULTS[what][0] for what in chosen]
    faulty = run_in_process(begin(tmp_path / "faulty", settings), app_with(1, evaluate=faults))
    failed = run_in_process(
        begin(tmp_path / "failed", settings), app_with(1, evaluate=[fail] * len(faults))
    )
    lines, references = (MetricsLog(run.metrics).evaluations() for run in (faulty, failed))
    for what, line, reference in zip(chosen, lines, references, strict=True):
        assert FAULTS[what][1] in line["refused"]["digit-1"]
        assert sorted(line["score_by_client"]) == ["digit-0", "digit-2"]
        for name in (
            "score",
            "score_by_client",
            "floor",
            "ssim",
            "ssim_by_client",
            "samples",
            "references",
        ):
            assert line[name] == reference[name], name
    assert all_bits(faulty) == all_bits(failed)


def claiming(images: int) -> ClientApp:
    """The middle client says in its description and in its statistics that it holds out so many
    images, of the mean and covariance of those that it has.
    """

    class Claiming(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = real_app(message, context)
            if context.node_config["partition-id"] != 1:
                return reply
            if message.metadata.message_type == DESCRIBE:
                reply.content.config_records[REPLY]["test_images"] = images
            if message.metadata.message_type == EVALUATE:
                tensors = read_tensors(reply.content, STATISTICS)
                numbers = reply.content.metric_records[METRICS]
                scatter = tensors["test.scatter"].numpy()
                scatter = scatter * (images - 1) / (float(str(numbers["test_count"])) - 1)
                statistics(test_scatter=scatter)(reply)
                numbers["test_count"] = float(images)
            return reply

    return Claiming()


def test_a_claim_of_a_billion_images_weighs_no_more_than_the_largest_weight(
    tmp_path: Path,
    network: FeatureNetwork,
    tasks: list[Task],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {
        **SETTINGS,
        **MOMENTS,
        "federation.rounds": 1,
        "federation.largest_weight": 0.5,
        "evaluation.memorisation_quantile": 0,
    }
    run = begin(tmp_path / "run", settings)
    run_in_process(run, claiming(10**9))
    (line,) = MetricsLog(run.metrics).evaluations()
    assert (line["refused"], line["missing"]) == ({}, {})
    features = [network(task.test) for task in tasks]
    others = len(features[0]) + len(features[2])
    weights = np.concatenate(
        [np.full(len(one), others / len(one) if i == 1 else 1.0) for i, one in enumerate(features)]
    )
    pooled = np.concatenate(features)
    reference = np.average(pooled, axis=0, weights=weights)
    covariance = np.cov(pooled, rowvar=False, aweights=weights, ddof=0)
    assert line["references"] == 2 * others
    train = np.concatenate([network(task.train) for task in tasks])
    real = {"mu": train.mean(axis=0), "sigma": np.cov(train, rowvar=False)}
    expected = fid_statistics_to_metric(real, {"mu": reference, "sigma": covariance}, verbose=False)
    assert line["floor"] == pytest.approx(float(expected[KEY_METRIC_FID]), rel=2e-2)
    said = f"its 1000000000 held-out images count as {others} among the others'"
    assert said in capsys.readouterr().err


# --- Sites with images of their own
# ----------------------------------------------------------------

SITES: dict[str, Any] = {
    "data.dataset": "sites",
    "data.image_size": 8,
    "data.channels": 1,
    **MOMENTS,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"evaluation.mode": "samples"},
            ["evaluation.mode samples needs reference images", "allowed: statistics"],
        ),
    ],
)
def test_a_run_of_sites_needs_statistics(change: dict[str, Any], expected: list[str]) -> None:
    assert tiny_config(SITES).data.dataset == "sites"
    text = message_of(tiny_config, {**SITES, **change})
    assert all(part in text for part in expected), text


def test_sites_cannot_be_simulated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srfed", "simulate", "--run-dir", str(tmp_path / "run")]
    for key, value in SITES.items():
        command += ["--set", f"{key}={value}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert "sites" in result.stderr
    assert not (tmp_path / "run").exists()


class Sites(InlineGrid):
    """Nodes that are told what a deployed site's SuperNode is told."""

    def __init__(self, run: RunFolder, data: dict[str, Path]) -> None:
        super().__init__(real_app, 0)
        for node, (client, path) in enumerate(data.items(), 1):
            agree_as_rehearsed(run.config, path, run.clients, client)
            config = {"client-id": client, "data": str(path), "state-dir": str(run.clients)}
            self._contexts[node] = Context(0, node, config, RecordDict(), {})


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Three sites with the digits' images: two folders, whose splits are spelt in two ways, and an
    .npz file.
    """
    root = tmp_path_factory.mktemp("sites")
    paths = [root / "lower", root / "upper", root / "own.npz"]
    first, second, third = load_tasks(tiny_config().data, 3)
    for path, task, spelt in ((paths[0], first, str.lower), (paths[1], second, str.upper)):
        for part in ("train", "test"):
            for number, image in enumerate(getattr(task, part)):
                save(path / spelt(part) / f"{number:04d}.png", image[..., 0])
    np.savez(paths[2], train_images=third.train, test_images=third.test)
    run = begin(root / "run", {**SETTINGS, **SITES})
    os.environ.pop(STATE_DIR_VARIABLE, None)
    run_federation(Sites(run, dict(zip(CLIENTS, paths, strict=True))), run)
    return run


def test_sites_with_the_images_of_a_simulation_train_and_score_as_it_does(
    deployed: RunFolder, by_moments: Recorded
) -> None:
    assert all_bits(deployed) == all_bits(by_moments.run)
    for ours, theirs in zip(
        MetricsLog(deployed.metrics).evaluations(), by_moments.evaluations, strict=True
    ):
        for name in (
            "score",
            "score_by_client",
            "floor",
            "ssim",
            "ssim_by_client",
            "samples",
            "references",
        ):
            assert ours[name] == theirs[name], name
    assert MetricsLog(deployed.metrics).tasks() == MetricsLog(by_moments.run.metrics).tasks()
    assert not deployed.samples.exists() or not list(deployed.samples.iterdir())


def images_of(trained: TrainedRun | TrainedSite, client: str) -> np.ndarray:
    return generate(
        trained.denoiser(trained.find_task(client)),
        trained.objective.process,
        trained.config.sampling,
        count=6,
        shape=trained.shapes[0],
        seed=5,
        task=client,
    ).images


@pytest.mark.parametrize("client", CLIENTS)
def test_a_sites_own_model_samples_as_the_runs_does(
    deployed: RunFolder, by_samples: Recorded, client: str
) -> None:
    site, run = TrainedSite(deployed.clients / client, CPU), TrainedRun(by_samples.run.path, CPU)
    assert (site.round, site.shapes[0], site.tasks[0].client) == (3, (8, 8, 1), client)
    ours = images_of(site, client)
    np.testing.assert_array_equal(ours, images_of(run, client))
    assert all((images_of(run, other) != ours).any() for other in CLIENTS if other != client)
    assert site.find_task("0") == site.find_task(client)
    with pytest.raises(
        UserError, match=r"--task 'digit-7' is not at this site; it has 0 \(digit-\d\)"
    ):
        site.find_task("digit-7")


def test_the_command_samples_from_a_sites_store(
    deployed: RunFolder, by_samples: Recorded, tmp_path: Path
) -> None:
    options = [
        "--n",
        "6",
        "--seed",
        "5",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "grid.png"),
        "--npz",
    ]
    store = deployed.clients / "digit-2"
    assert sample.main(["--store", str(store), *options, str(tmp_path / "site.npz")]) == 0
    run = str(by_samples.run.path)
    assert (
        sample.main(["--run", run, "--task", "digit-2", *options, str(tmp_path / "run.npz")]) == 0
    )
    with np.load(tmp_path / "site.npz") as site, np.load(tmp_path / "run.npz") as reference:
        np.testing.assert_array_equal(site["images"], reference["images"])
        assert site["tasks"].tolist() == ["digit-2"] * 6


def test_a_site_keeps_the_model_of_the_last_evaluation_only(deployed: RunFolder) -> None:
    for client in CLIENTS:
        models = deployed.clients / client / "models"
        (model,) = models.glob("*/*")
        assert model.parent.name == deployed.lineage
        assert re.fullmatch(r"round-00003-\d", model.name)


# --- The store of a site's model
# ---------------------------------------------------------------------

CONFIG: RunConfig = tiny_config({**SITES})


def store_model(
    folder: Path, number: int, value: float, lineage: str = "lineage", line: str = NO_PARENT
) -> None:
    shared, exclusive = (
        {"core.weight": torch.full((3,), value)},
        {"head.weight": torch.full((2,), -value)},
    )
    save_site_model(folder, CONFIG, lineage, number, (8, 8, 1), shared, exclusive, line)


def stored_value(folder: Path) -> tuple[int, float]:
    stored = SiteModel(folder)
    shared, exclusive = stored.tensors
    assert torch.equal(shared["core.weight"], torch.full((3,), -exclusive["head.weight"][0].item()))
    assert (stored.client, stored.shape, stored.config) == (folder.name, (8, 8, 1), CONFIG)
    return stored.round, shared["core.weight"][0].item()


def test_the_newest_model_counts_and_older_rounds_are_dropped(tmp_path: Path) -> None:
    store = tmp_path / "clinic"
    for number in (2, 12, 4):  # a run that was rolled back evaluates an earlier round again
        store_model(store, number, float(number))
        assert stored_value(store) == (number, number)
        (model,) = (store / "models" / "lineage").iterdir()
        assert model.name.startswith(f"round-{number:05d}-")
    store_model(store, 4, 9.0)
    assert stored_value(store) == (4, 9.0), "the same round, evaluated again"


def test_the_model_of_another_run_stays_and_the_newest_is_opened(tmp_path: Path) -> None:
    store = tmp_path / "clinic"
    for number, (lineage, value) in enumerate((("z-first", 1.0), ("a-second", 2.0)), 1):
        store_model(store, 3, value, lineage)
        # A copy of the store, or a clock that went back, gives the later one an earlier time.
        state = store / "models" / lineage / f"round-00003-{number}" / STATE_FILE
        os.utime(state, (1e9 - value, 1e9 - value))
    assert stored_value(store) == (3, 2.0)
    store_model(store, 2, 5.0, "z-first")
    assert stored_value(store) == (2, 5.0)
    assert len(list((store / "models").glob("*/*"))) == 2


def test_a_model_goes_when_its_own_line_of_descent_has_a_later_one(tmp_path: Path) -> None:
    """A message with a round from the future and no parent must not cost the site its model."""
    store = tmp_path / "clinic"
    store_model(store, 30, 1.0, line="round-00001")
    store_model(store, 10**6, 2.0)
    assert {path.name for path in (store / "models" / "lineage").iterdir()} == {
        "round-00030-1",
        "round-1000000-2",
    }
    store_model(store, 32, 3.0, line="round-00001")
    assert {path.name for path in (store / "models" / "lineage").iterdir()} == {
        "round-00032-3",
        "round-1000000-2",
    }
    assert stored_value(store) == (32, 3.0)


def test_models_lie_in_the_store_and_nowhere_else(tmp_path: Path) -> None:
    store = tmp_path / "clinic"
    for lineage in ("../../elsewhere", str(tmp_path / "elsewhere"), ".."):
        with pytest.raises(UserError, match="is no name for a store"):
            store_model(store, 3, 1.0, lineage)
    assert list(tmp_path.iterdir()) == []


def test_models_of_an_older_version_are_read_where_it_is_clear_which_is_the_newest(
    tmp_path: Path,
) -> None:
    store = tmp_path / "clinic"
    for lineage in ("a", "b"):
        store_model(store, 3, 1.0, lineage)
        (model,) = (store / "models" / lineage).iterdir()
        write_as_before(model, None, without=["number", "line"])
        model.rename(model.with_name("round-00003"))
        if lineage == "a":
            assert stored_value(store) == (3, 1.0)
    assert "which does not record the newest" in message_of(SiteModel, store)
    store_model(store, 4, 2.0, "a")
    assert stored_value(store) == (4, 2.0)
    assert {path.name for path in (store / "models").glob("*/*")} == {
        "round-00003",
        "round-00004-1",
    }


def spoil(model: Path, damage: str) -> None:
    state = model / STATE_FILE
    match damage:
        case "half a state":
            state.write_bytes(state.read_bytes()[:-9])
        case "no state":
            state.unlink()
        case "a bit":
            state.write_bytes(state.read_bytes()[:-1] + b"\xff")
        case "half a manifest":
            state.write_bytes(state.read_bytes()[:99])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("half a state", "is damaged"),
        ("no state", "has no model"),
        ("a bit", "is damaged"),
        ("half a manifest", "is damaged"),
    ],
)
def test_a_damaged_or_missing_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, expected: str
) -> None:
    store = tmp_path / "clinic"
    store_model(store, 3, 1.0)
    spoil(store / "models" / "lineage" / "round-00003-1", damage)
    text = message_of(SiteModel, store)
    assert str(store) in text
    assert expected in text
    assert sample.main(["--store", str(store), "--out", str(tmp_path / "grid.png")]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {text}"]

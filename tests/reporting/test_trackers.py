"""HParams, Weights & Biases and MLflow are handed what metrics.jsonl has."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import srfed
from srfed.records import OwnScore
from srfed.reporting.tensorboard import TensorBoard
from srfed.reporting.values import hyperparameters
from support.errors import message_of
from support.records import evaluation_record, round_record
from support.tiny_run import tiny_config

CONFIG = tiny_config({"training.gradient_clip": None})


class Said(SimpleNamespace):
    """What a stand-in was told."""


def stand_in_for_wandb(said: Said) -> ModuleType:
    """As far as it is used, after wandb 0.31."""
    said.logged, said.settings, said.ended = [], {}, []

    class Run:
        def log(self, data: dict[str, Any], step: int) -> None:
            said.logged.append((step, data))

        def finish(self, exit_code: int | None = None) -> None:
            said.ended.append(exit_code)

    def init(**settings: Any) -> Run:
        said.settings = settings
        return Run()

    module: Any = ModuleType("wandb")
    module.init, module.Image = init, lambda picture: ("image", picture.shape)
    return module  # type: ignore[no-any-return]


def observe(observer: srfed.Observer, *, final: bool = True) -> None:
    """What a short run tells an observer."""
    observer.on_begin([], 0)
    observer.on_round(round_record(1))
    own = {"sharpness": OwnScore(0.5, {"client-a": 0.25, "client-b": 0.75})}
    observer.on_evaluation(evaluation_record(1, final=final, own=own))
    observer.on_end()


def test_the_tab_hparams_has_the_settings_and_knows_the_curves(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, CONFIG, 0, lambda text: None)
    board.add_round(round_record(1))
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    parts = {
        name: plugin_data_pb2.HParamsPluginData.FromString(content)
        for name, content in found.items()
    }
    settings = parts["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["training.learning_rate"].number_value == CONFIG.training.learning_rate
    assert settings["federation.server_optimizer"].string_value == "extrapolate"
    assert settings["training.gradient_clip"].string_value == "None"
    assert "resources.backend" not in settings, "it decides nothing"
    metrics = parts["_hparams_/experiment"].experiment.metric_infos
    assert {one.name.tag for one in metrics} == {"loss/mean", "fd_embedded/all"}


def test_weights_and_biases_is_told_every_number_at_its_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Said()
    monkeypatch.setitem(sys.modules, "wandb", stand_in_for_wandb(said))
    observe(srfed.WeightsAndBiases(CONFIG, pictures=True, project="p", mode="offline"))
    assert (said.settings["name"], said.settings["project"]) == ("tiny", "p")
    assert said.settings["config"] == hyperparameters(CONFIG)
    (first, a_round), (second, evaluation), (third, picture) = said.logged
    assert (first, second, third) == (1, 1, 1)
    assert a_round["loss/mean"] == 1.0
    assert a_round["loss_by_client/client-b"] == 0.75
    assert evaluation["fd_embedded/all"] == 12.3456
    assert evaluation["own/sharpness"] == 0.5
    assert evaluation["own_sharpness_by_client/client-b"] == 0.75
    assert picture["samples"][0] == "image"
    assert said.ended == [0]
    observe(srfed.WeightsAndBiases(CONFIG), final=False)
    assert said.ended == [0, 1], "the run was stopped"
    assert len(said.logged) == 5, "no picture unless asked for"


def test_a_service_that_fails_ends_its_numbers_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Said()
    module: Any = stand_in_for_wandb(said)
    monkeypatch.setitem(sys.modules, "wandb", module)
    observer = srfed.WeightsAndBiases(CONFIG)
    observer.on_begin([], 0)
    monkeypatch.setattr(observer, "add_numbers", lambda values, step: 1 / 0)
    with pytest.warns(UserWarning, match="WeightsAndBiases: ZeroDivisionError: .*the run goes on"):
        observer.on_round(round_record(1))
    observer.on_round(round_record(2))
    observer.on_end()

    def unreachable(**settings: Any) -> None:
        raise ConnectionError("no route\nto host")

    module.init = unreachable
    text = message_of(lambda: srfed.WeightsAndBiases(CONFIG).on_begin([], 0))
    assert text == "WeightsAndBiases cannot begin: ConnectionError: no route to host"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    made = {"wandb": srfed.WeightsAndBiases, "mlflow": srfed.MLflow}[name]
    text = message_of(lambda: made(CONFIG))
    assert f"needs {name}, which cannot be loaded" in text
    assert f'pip install "srfed[{name}]"' in text


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_itself_takes_it_offline(tmp_path: Path) -> None:
    observe(srfed.WeightsAndBiases(CONFIG, pictures=True, mode="offline", dir=str(tmp_path)))
    assert list(tmp_path.rglob("*.wandb"))


class Entity(SimpleNamespace):
    """MLflow's Param(key, value) and Metric(key, value, timestamp, step)."""

    def __init__(self, key: str, value: Any, timestamp: int = 0, step: int = 0) -> None:
        super().__init__(key=key, value=value, timestamp=timestamp, step=step)


def stand_in_for_mlflow(said: Said) -> ModuleType:
    """As far as it is used, after mlflow 3.17."""
    said.params, said.metrics, said.ended, said.images = {}, {}, [], []

    class Client:
        def __init__(self, tracking_uri: str | None = None) -> None:
            said.uri = tracking_uri

        def get_experiment_by_name(self, name: str) -> None:
            said.experiment = name

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            said.run = (experiment, run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id="id"))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            said.params |= {one.key: one.value for one in params}
            said.metrics |= {(one.key, one.step): one.value for one in metrics}

        def log_image(self, run: str, image: np.ndarray, artifact_file: str) -> None:
            said.images.append(artifact_file)

        def set_terminated(self, run: str, status: str) -> None:
            said.ended.append(status)

    module: Any = ModuleType("mlflow")
    module.MlflowClient = Client
    module.entities = SimpleNamespace(Param=Entity, Metric=Entity)
    return module  # type: ignore[no-any-return]


def test_mlflow_is_told_every_number_at_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said()
    monkeypatch.setitem(sys.modules, "mlflow", stand_in_for_mlflow(said))
    observe(srfed.MLflow(CONFIG, tracking_uri="file:x", pictures=True))
    assert (said.uri, said.experiment, said.run) == ("file:x", "srfed", ("7", "tiny"))
    assert said.params["training.batch_size"] == "16"
    assert said.metrics["loss/mean", 1] == 1.0
    assert said.metrics["ssim_rec/t_50", 1] == 0.875
    assert said.metrics["own/sharpness", 1] == 0.5
    assert ("loss_by_timestep/quarter_4", 1) not in said.metrics, "it is not a number"
    assert said.images == ["samples/round-00001.png"]
    observe(srfed.MLflow(CONFIG), final=False)
    assert said.ended == ["FINISHED", "KILLED"]
    assert len(said.images) == 1


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself_takes_it(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db" if find_spec("sqlalchemy") else tmp_path.as_uri()
    observe(srfed.MLflow(CONFIG, tracking_uri=uri))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("srfed")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["fd_embedded/all"] == 12.3456
    assert run.data.params["training.batch_size"] == "16"
    assert math.isclose(run.data.metrics["own/sharpness"], 0.5)
    assert run.info.status == "FINISHED"

"""Studies, for real on the smallest settings: every case once, resumed, and with everything in the
table.
"""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from simulations import table1
from srfed.errors import UserError
from srfed.files import held
from srfed.reporting.pictures import draw_grid
from srfed.storage.metrics_log import MetricsLog
from srfed.studies.cases import Case, change, mean_and_spread, run_cases


def make_table(folder: Path) -> None:
    arguments = [
        "--dataset",
        "digits",
        "--preset",
        "tiny",
        "--pool",
        str(folder / "pool"),
        "--out",
        str(folder),
    ]
    assert table1.main(arguments) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    make_table(folder)
    return folder


@pytest.mark.slow
def test_the_table_has_every_method_at_one_budget(finished: Path) -> None:
    with (finished / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    config = table1.configuration("digits", "tiny", None, "auto")
    listed = table1.methods(config)
    assert [row["name"] for row in rows] == [method.name for method in listed]
    assert {row["images_trained"] for row in rows} == {str(10 * 4 * 16)}
    assert len({row["config_hash"] for row in rows}) == len(rows)
    sizes = {
        row["name"]: (int(row["shared_parameters"]), int(row["exclusive_parameters"]))
        for row in rows
    }
    assert sizes["DDPM, pooled"][1] == 0
    assert sizes["local training"][0] == 0
    assert sum(sizes["SR-DDPM, federated, joint"]) == sizes["DDPM, pooled"][0]
    travelled = {row["name"]: int(row["bytes_per_client_and_round"]) for row in rows}
    for name, (shared, _) in sizes.items():
        if "pooled" in name or "centralised" in name:
            assert travelled[name] == 0
        else:
            assert travelled[name] >= 2 * 4 * shared
    text = (finished / "table.md").read_text()
    assert all(f"| {method.name} |" in text for method in listed)


@pytest.mark.slow
def test_the_pictures_are_the_samples_that_were_scored(finished: Path) -> None:
    config = table1.configuration("digits", "tiny", None, "auto")
    rows = {}
    for method in table1.methods(config):
        run = Case(method.name, change(config, **method.settings), 100, 1).folder(finished / "pool")
        (scored,) = run.glob("evaluations/*/samples.safetensors")
        picture = (
            finished / f"samples-{method.name.lower().replace(', ', '-').replace(' ', '-')}.png"
        )
        samples = load_file(scored)
        assert np.array_equal(np.asarray(Image.open(picture)), draw_grid(samples)), method.name
        rows[method.name] = np.concatenate([images[:2] for images in samples.values()])
    assert np.array_equal(np.asarray(Image.open(finished / "methods.png")), draw_grid(rows))


@pytest.mark.slow
def test_a_second_call_trains_nothing(finished: Path) -> None:
    runs = sorted(finished.glob("pool/digits-*/server/round-*"))
    assert len(runs) == 2 * 10, "a checkpoint before the only round and one after it"
    before = {path: path.stat().st_mtime_ns for path in runs}
    scores = (finished / "scores.csv").read_text()
    make_table(finished)
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert (finished / "scores.csv").read_text() == scores


@pytest.mark.slow
def test_a_stopped_case_goes_on(tmp_path: Path) -> None:
    config = change(
        table1.configuration("digits", "tiny", None, "auto"),
        training__learning_rate_schedule="constant",
    )
    longer = change(config, federation__rounds=2)
    run_cases([Case("short", config, 20, 1)], tmp_path, 1)
    folder = Case("long", longer, 20, 1).folder(tmp_path)
    assert folder == Case("short", config, 20, 1).folder(tmp_path), (
        "the number of rounds does not decide a round's bits"
    )
    run_cases([Case("long", longer, 20, 1)], tmp_path, 1)
    assert [line["round"] for line in MetricsLog(folder / "metrics.jsonl").rounds()] == [1, 2]


@pytest.mark.slow
def test_a_study_that_is_told_to_stop_stops_its_runs(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from srfed.studies.cases import Case, change, run_cases
from simulations.table1 import configuration
from srfed.interrupts import run_command
base = configuration("digits", "tiny", None, "auto")
config = change(base, training__learning_rate_schedule="constant", federation__rounds=99999)
case, out = Case("endless", config, 20), Path({str(tmp_path)!r})
print(case.folder(out), flush=True)
raise SystemExit(run_command(lambda: print(run_cases([case], out, 1))))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as study_process:
        assert study_process.stdout is not None
        run = Path(study_process.stdout.readline().strip())
        log = tmp_path / "logs" / f"{run.name}.log"
        while study_process.poll() is None and not (log.exists() and "round" in log.read_text()):
            time.sleep(0.2)
        study_process.terminate()
        study_process.communicate(timeout=100)
    assert study_process.returncode == 128 + signal.SIGTERM
    assert log.read_text().splitlines()[-1] == "interrupted"
    with held(tmp_path / "locks" / run.name / "lock", wait=False):
        pass


@pytest.mark.slow
def test_a_case_that_fails_says_why_and_leaves_the_others(tmp_path: Path) -> None:
    config = table1.configuration("digits", "tiny", None, "auto")
    wrong = change(config, data__dataset="npz", data__dir=str(tmp_path / "nowhere.npz"))
    with pytest.raises(UserError, match=r"wrong \(seed 0\) failed: .*nowhere\.npz"):
        run_cases([Case("right", config, 20, 1), Case("wrong", wrong, 20, 1)], tmp_path / "pool", 1)
    assert (Case("right", config, 20, 1).folder(tmp_path / "pool") / "outcome.json").exists()


def test_methods_are_chosen_by_words_or_by_their_whole_name() -> None:
    listed = table1.methods(table1.configuration("digits", "tiny", None, "auto"))
    names = [
        method.name for method in table1.choose(listed, ["fedavg", "SR-DDPM, federated, joint"])
    ]
    assert names == ["SR-DDPM, federated, joint", "FedAvg, conditional", "FedAvg, unconditional"]
    assert table1.choose(listed, None) == listed
    with pytest.raises(UserError, match=r"'GAN' is in no method's name; there are DDPM, pooled; "):
        table1.choose(listed, ["local", "GAN"])


def test_spread_is_the_standard_deviation_over_seeds() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_and_spread([0.5]) == "0.500"


def test_an_impossible_change_is_refused() -> None:
    config = table1.configuration("digits", "tiny", None, "auto")
    with pytest.raises(UserError, match=r"training.batch_size"):
        change(config, training__batch_size=0)


@pytest.mark.parametrize("dataset", table1.DATASETS)
@pytest.mark.parametrize("preset", sorted(table1.PRESETS))
def test_every_preset_gives_equal_budgets(dataset: str, preset: str) -> None:
    base = table1.configuration(dataset, preset, None, "auto")
    budgets = set()
    for method in table1.methods(base):
        config = change(base, **method.settings)
        training = config.training
        steps = (training.local_steps or 0) + (training.exclusive_steps or 0)
        budgets.add(
            config.federation.clients * config.federation.rounds * steps * training.batch_size
        )
    assert len(budgets) == 1

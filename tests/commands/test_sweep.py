"""--seeds and --sweep: the runs are those of single commands, and the table is of their scores."""

import csv
import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml

import srfed
from srfed.errors import UserError
from srfed.reporting.spread import Trained, spread_table
from srfed.runs.sweep import Variant, variants
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from support.commands import run_here
from support.errors import message_of
from support.records import evaluation_record, round_record
from support.tiny_run import CHEAP, all_bits, tiny_config

SETTINGS = {**CHEAP, "federation.rounds": 1, "federation.clients": 1, "sampling.steps": 1}


def sweep(folder: Path, config: Path) -> "CompletedProcess[str]":
    return run_here(
        *("simulate", "--config", config, "--run-dir", folder, "--seeds", "3,4"),
        *("--sweep", "training.learning_rate=0.01"),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    path.write_text(yaml.safe_dump(json.loads(tiny_config(SETTINGS).to_json())))
    return path


def test_every_value_runs_with_every_seed_and_what_is_finished_is_not_run_again(
    config: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    done = sweep(root, config)
    assert done.returncode == 0, done.stderr
    folders = [f"training.learning_rate-0.01/seed-{seed}" for seed in (3, 4)]
    assert all((root / folder / "report.html").exists() for folder in folders)
    # One of them is the run of a single command.
    one = json.loads(tiny_config({**SETTINGS, "training.learning_rate": 0.01}).to_json())
    alone = srfed.train(
        srfed.RunConfig.model_validate_json(json.dumps({**one, "seed": 4})),
        run_dir=tmp_path / "alone",
    )
    last = RunFolder.open(root / folders[1])
    bits = all_bits(last)
    assert bits == all_bits(RunFolder.open(alone.path))
    losses = [MetricsLog(root / f / "metrics.jsonl").rounds()[-1]["loss"] for f in folders]
    table = (root / "summary.txt").read_text()
    assert f"{np.mean(losses):.4g} ± {np.std(losses, ddof=1):.2g}" in table
    assert table in done.stdout
    rows = list(csv.DictReader((root / "scores.csv").read_text().splitlines()))
    assert [float(row["training loss"]) for row in rows] == losses
    settings = [(row["training.learning_rate"], row["seed"]) for row in rows]
    assert settings == [("0.01", "3"), ("0.01", "4")]
    # Stopped before the last one had its first checkpoint.
    shutil.rmtree(last.server)
    shutil.rmtree(last.clients)
    again = sweep(root, config)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished already") == 1
    assert all_bits(last) == bits
    assert (root / "summary.txt").read_text() == table


def test_a_run_alone_has_no_spread_and_a_score_that_nobody_has_no_column(tmp_path: Path) -> None:
    runs = []
    for number, loss in enumerate((0.5, 0.75, 0.25)):
        folder = RunFolder.create(tmp_path / str(number), tiny_config())
        log = MetricsLog(folder.metrics)
        log.begin(0, [])
        log.add_round(round_record(1, loss=loss))
        if number < 2:
            log.add_evaluation(evaluation_record(1, final=True, score=1.0 + number))
        runs.append(Trained(folder.path, "16" if number < 2 else "32", number))
    head, first, second, *_ = spread_table("training.batch_size", runs)
    assert head.split("  ")[0] == "training.batch_size"
    assert "recognised" not in head
    assert [cell.strip() for cell in first.split("  ") if cell.strip()][:4] == [
        *("16", "2", "0.625 ± 0.18", "1.5 ± 0.71")
    ]
    assert [cell.strip() for cell in second.split("  ") if cell.strip()] == [
        *("32", "1", "0.25 ± -", "-", "-")
    ]


def test_values_are_yaml_and_lists_stay_whole() -> None:
    found = variants("0,1", ["model.channels=[8, 16],[8, 32]"], [], {})
    assert [one.value for one in found] == ["[8, 16]", "[8, 16]", "[8, 32]", "[8, 32]"]
    assert found[3] == Variant(
        "[8, 32]", 1, ("model.channels=[8, 32]", "seed=1"), "model.channels-8-32/seed-1"
    )
    applied = variants(None, ["federation.clients_per_round=null,2"], [], {})
    values = [one.applied(tiny_config()).federation.clients_per_round for one in applied]
    assert values == [None, 2]


@pytest.mark.parametrize(
    ("seeds", "sweeps", "words"),
    [
        ("", [], "--seeds  is no list of seeds; allowed: such as 0,1,2"),
        ("1,-2", [], "--seeds 1,-2 is no list of seeds"),
        ("1,1", [], "has a seed twice"),
        (None, ["training.batch_size"], "is no setting with values"),
        (None, ["training.batch_size="], "is no setting with values"),
        (None, ["training=1"], "there is no setting training"),
        (None, ["trainin.batch_size=1"], "did you mean training.batch_size?"),
        (None, ["data.dir=a/b,a-b"], "has values that would have one folder"),
        (None, ["federation.clients=1,2"], "federation.clients is set twice"),
        (None, ["evaluation.every=1,2"], "evaluation.every is set twice"),
        (",".join(map(str, range(99))), ["seed=1,2,3"], "ask for 297 runs; allowed: 200"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_a_sentence(
    seeds: str | None, sweeps: list[str], words: str
) -> None:
    said = {"federation.clients": "2", "data.dir": None}
    text = message_of(lambda: variants(seeds, sweeps, ["evaluation.every=3"], said))
    assert words in text


def test_all_runs_are_looked_at_before_one_has_begun(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    done = run_here(
        *("simulate", "--config", config, "--run-dir", root),
        *("--sweep", "training.batch_size=4,100000"),
    )
    assert done.returncode == 2
    assert "training.batch_size" in done.stderr
    assert not root.exists()
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    done = sweep(root, config)
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr
    with pytest.raises(UserError, match=r"training\.batch_size=0"):
        variants(None, ["training.batch_size=0"], [], {})[0].applied(tiny_config())

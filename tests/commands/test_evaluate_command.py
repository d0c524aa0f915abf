"""``srfed evaluate``: the same digits for everybody, equal to other libraries' on the
same samples.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from srfed.commands import evaluate
from srfed.config import load_config
from srfed.data import load_tasks
from srfed.errors import UserError
from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.generation import generate
from srfed.runs.run import TrainedRun
from srfed.storage.run_folder import RunFolder
from support.tiny_run import begin, run_in_process

SAMPLES, SEED = 60, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = {"federation.rounds": 1, "data.images_per_task": 60}
    return run_in_process(begin(tmp_path_factory.mktemp("trained") / "run", settings))


@pytest.fixture(scope="module")
def record(run: RunFolder) -> dict[str, Any]:
    assert (
        evaluate.main(["--run", str(run.path), "--samples", str(SAMPLES), "--seed", str(SEED)]) == 0
    )
    (scores,) = run.path.glob("evaluations/*/scores.json")
    content: dict[str, Any] = json.loads(scores.read_text())
    return content


@pytest.fixture(scope="module")
def features(run: RunFolder) -> dict[str, np.ndarray]:
    """Features of independently drawn samples and of real images, all tasks together."""
    network, trained = EmbeddedFeatures(), TrainedRun(run.path, run.config.resources)
    samples = [
        generate(
            trained.denoiser(info),
            trained.objective.process,
            run.config.sampling,
            count=SAMPLES // 3,
            shape=trained.shapes[0],
            seed=SEED,
            task=info.client,
        ).images
        for info in trained.tasks
    ]
    used = load_tasks(run.config.data, 3)
    whole = load_tasks(run.config.data.model_copy(update={"images_per_task": None}), 3)
    sets = {
        "samples": samples,
        "test": [task.test for task in used],
        "subset": [task.train for task in used],
        "train": [task.train for task in whole],
    }
    return {name: network(np.concatenate(images)) for name, images in sets.items()}


def test_frechet_distances_to_three_references_equal_torch_fidelitys(
    record: dict[str, Any], features: dict[str, np.ndarray]
) -> None:
    statistics = {
        name: fid_features_to_statistics(torch.from_numpy(found))
        for name, found in features.items()
    }
    floors = {"test": "train", "train": "test", "subset": "test"}
    for score in (score for score in record["scores"] if score["deviation"] is None):
        reference = score["reference"]
        expected = fid_statistics_to_metric(statistics["samples"], statistics[reference], False)
        assert score["value"] == pytest.approx(next(iter(expected.values())), rel=1e-6)
        floor = fid_statistics_to_metric(
            statistics[floors[reference]], statistics[reference], False
        )
        assert score["floor"] == pytest.approx(next(iter(floor.values())), rel=1e-6)
        assert (score["images"], score["references"]) == (SAMPLES, len(features[reference]))
    assert len(features["subset"]) == 180
    assert len(features["train"]) > 180


def test_kernel_distance_equals_torch_fidelitys(
    record: dict[str, Any], features: dict[str, np.ndarray]
) -> None:
    (found,) = (score for score in record["scores"] if score["deviation"] is not None)
    expected = kid_features_to_metric(
        torch.from_numpy(features["samples"]),
        torch.from_numpy(features["test"]),
        kid_subsets=100,
        kid_subset_size=SAMPLES,
        rng_seed=SEED,
        verbose=False,
    )
    assert [found["value"], found["deviation"]] == pytest.approx(list(expected.values()), rel=1e-6)
    assert (found["name"], found["subset_size"]) == ("kd_embedded", SAMPLES)


def test_every_number_is_printed_with_what_it_depends_on(
    run: RunFolder, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    began = {path: path.stat().st_mtime_ns for path in run.path.glob("evaluations/*/*")}
    assert (
        evaluate.main(["--run", str(run.path), "--samples", str(SAMPLES), "--seed", str(SEED)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    scored = [line for line in lines if line.startswith(("fd_", "kd_"))]
    assert len(scored) == 4
    for line, score in zip(scored, record["scores"], strict=True):
        for words in (
            f"{score['value']:.4f}",
            f"n = {SAMPLES}",
            f"{score['references']} references",
            record["network"]["sha256"][:8],
            record["network"]["resize_rule"],
            f"seed {SEED}",
        ):
            assert words in line
    assert any(
        re.match(r"SSIM-rec@5 \(4 steps\): 0\.\d{4} \(t = 5: .*, t = 10: .*; n = 3 test", line)
        for line in lines
    )
    assert any(line.startswith("memorisation: ") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in began} == began, (
        "the second call reads what the first has left"
    )


def test_another_folder_of_the_same_run_gets_the_same_digits(
    run: RunFolder, record: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"federation.rounds": 1, "data.images_per_task": 60}
    again = run_in_process(begin(tmp_path / "again", settings))
    assert (
        evaluate.main(["--run", str(again.path), "--samples", str(SAMPLES), "--seed", str(SEED)])
        == 0
    )
    (scores,) = again.path.glob("evaluations/*/scores.json")
    other = json.loads(scores.read_text())
    for name in (
        "scores",
        "by_task",
        "agreement",
        "ssim",
        "memorisation",
        "fingerprint",
        "parameters",
    ):
        assert other[name] == record[name], name


def test_a_run_is_judged_by_algorithm_2_where_that_is_asked_for(
    run: RunFolder, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", str(run.path), "--samples", "6"]
    assert evaluate.main([*words, "--ssim-steps", "all"]) == 0
    (found,) = re.findall(r"^SSIM-rec@5: (\S+) ", capsys.readouterr().out, re.MULTILINE)
    assert float(found) != pytest.approx(record["ssim"]["5"], abs=1e-4)
    for wrong in ("0", "-1", "some"):
        assert evaluate.main([*words, f"--ssim-steps={wrong}"]) == 2
        assert re.match(r"error: .*ssim.steps.*(≥ 1|all)", capsys.readouterr().err)


def test_a_run_of_before_there_were_steps_goes_on_with_algorithm_2(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    config, identity = run.config_file, json.loads(run.identity_file.read_text())
    assert identity["settings"].pop("evaluation.ssim_steps") == 4
    run.identity_file.write_text(json.dumps(identity))
    config.write_text(re.sub(r"^ +ssim_steps: 4\n", "", config.read_text(), flags=re.MULTILINE))
    old = RunFolder.open(run.path)
    assert old.config.evaluation.ssim_steps is None
    asked = load_config(config, ["federation.rounds=7"])
    assert asked.evaluation.ssim_steps == 4, "the same file for a new run"
    again = old.reconfigure(asked).config
    assert (again.evaluation.ssim_steps, again.federation.rounds) == (None, 7)
    with pytest.raises(UserError, match=r"evaluation\.ssim_steps: null -> 5$"):
        old.reconfigure(load_config(config, ["evaluation.ssim_steps=5"]))


def test_references_can_be_kept_in_files(
    run: RunFolder, record: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [
        "--run",
        str(run.path),
        "--samples",
        "30",
        "--references",
        str(tmp_path / "references"),
    ]
    assert evaluate.main(arguments) == 0
    kept = sorted((tmp_path / "references").iterdir())
    assert len(kept) == 9, "three tasks, three references"
    folders = list(run.path.glob("evaluations/*-30-*/scores.json"))
    first = json.loads(folders[0].read_text())
    folders[0].unlink()
    assert evaluate.main(arguments) == 0
    second = json.loads(folders[0].read_text())
    assert second["scores"] == first["scores"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "5"], "evaluation.samples 5 is below 6"),
        (["--quantile", "0.7"], "--quantile 0.7 is impossible"),
        (["--network", "inceptoin"], "evaluation.feature_network"),
        (["--steps", "501"], "sampling.steps 501 is above"),
    ],
)
def test_impossible_wishes_take_one_line(
    run: RunFolder, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--run", str(run.path), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_folder_without_a_run_takes_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--run", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err

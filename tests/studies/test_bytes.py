"""Score against bytes: its cells, lines and table, without a run."""

import csv
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from simulations import bytes as study
from srfed.federation.contract import Contract
from srfed.federation.layout import value_bytes
from srfed.model import build_model, build_partition
from srfed.studies.cases import Outcome
from srfed.studies.gains import add_row


def options(**changed: Any) -> Namespace:
    usual = {
        "steps": 432,
        "local_steps": study.LOCAL_STEPS,
        "bits": list(study.TRAVELS),
        "samples": 20,
        "seeds": 1,
        "first_seed": 0,
        "data_dir": None,
        "device": "cpu",
    }
    return Namespace(**{**usual, **changed})


def test_cells_have_one_number_of_steps_and_a_folder_each(tmp_path: Path) -> None:
    found = study.cells(options(seeds=2))
    assert len(found) == 2 * 4 * 3
    assert len({case.folder(tmp_path) for case in found}) == len(found)
    for case in found:
        assert (case.config.training.local_steps or 0) * case.config.federation.rounds == 432


def test_what_travels_is_as_the_names_say() -> None:
    least = {}
    for case in study.cells(options(local_steps=[144])):
        model = build_model(case.config, 1)
        shared = build_partition(case.config, model).take_shared(model.state_dict())
        contract = Contract.of(case.config, shared)
        (up,), (down,) = contract.update.values(), contract.training_request.values()
        whole = sum(tensor.nbytes for tensor in shared.values())
        least[case.name] = (whole / value_bytes(up), whole / value_bytes(down))
    assert least == {
        "float32, 144 steps a round": (1, 1),
        "8 bits, 144 steps a round": pytest.approx((4, 4), rel=0.01),
        "4 bits up, 8 down, 144 steps a round": pytest.approx((8, 4), rel=0.01),
    }


def record(score: float) -> dict[str, Any]:
    """What scoring leaves of a run, as far as a line has it."""
    scores = [
        {"name": "fd", "reference": name, "value": score, "floor": 0.4, "deviation": None}
        for name in ("test", "train", "subset")
    ]
    scores.append({"name": "kd", "reference": "test", "value": 0.1, "floor": 0, "deviation": 0.01})
    memorised = {"pixels_share": 0.0, "features_share": 0.0}
    return {
        "fingerprint": "f" * 64,
        "samples": 20,
        "seed": 0,
        "network": {"sha256": "0" * 64},
        "scores": scores,
        "agreement": {"all": 0.9},
        "ssim": {"50": 0.9},
        "memorisation": {"all": memorised, "by_task": {}},
        "training": {"rounds": 3, "images": 1, "training_seconds": 2.0},
        "sampling_seconds": 1.0,
        "round_bytes": 3_000,
        "parameters": {"shared": 1, "exclusive": 1},
    }


def test_a_line_has_the_bytes_of_each_way_and_the_table_their_means(tmp_path: Path) -> None:
    rows = []
    for seed, case in enumerate(study.cells(options(seeds=2, local_steps=[144], bits=["8"]))):
        folder = case.folder(tmp_path)
        folder.mkdir(parents=True)
        lines = [
            {"kind": "round", "round": number, "bytes_up": 1_000_000, "bytes_down": 2_000_000}
            for number in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        rows.append(study.row(Outcome(case, record(0.5 + seed / 10)), tmp_path))
        for _ in range(2):
            add_row(tmp_path / "cells.csv", rows[-1], study.KEY)
    with (tmp_path / "cells.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [(one["training_seed"], one["bytes_up"], one["bytes_down"]) for one in kept] == [
        ("0", "3000000", "6000000"),
        ("1", "3000000", "6000000"),
    ]
    text = study.report(rows, tmp_path)
    assert "| 8 bits | 144 | 3 | 3.0 MB | 6.0 MB | 0.550 ± 0.071 | 0.900 ± 0.000 |" in text
    assert (tmp_path / "bytes.png").stat().st_size > 0


def test_local_steps_that_do_not_divide_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--local-steps", "5"]) == 2
    assert capsys.readouterr().err == (
        "error: --local-steps 5 is impossible; allowed: what divides --steps 432\n"
    )

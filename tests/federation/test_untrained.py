"""After a tenth of its rounds a run says whose network has learned nothing yet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import srfed
from srfed.data import to_model_range
from srfed.evaluation.metrics.denoising_loss import denoising_losses, trivial_loss
from srfed.federation.bounds import judged_against_trivial
from srfed.federation.messages import AGAINST_TRIVIAL
from srfed.model import build_objective
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.storage.metrics_log import MetricsLog
from support.faults import app_with, set_number
from support.tiny_run import begin, run_in_process, tiny_config

SETTINGS: dict[str, Any] = {
    "federation.rounds": 10,
    "training.local_steps": 12,
    "evaluation.every": 0,
    "evaluation.ssim_images": 0,
    "evaluation.memorisation_quantile": 0,
}


@pytest.mark.parametrize("prediction", ["noise", "edm"])
def test_the_trivial_loss_is_that_of_the_best_linear_predictor(prediction: str) -> None:
    process = build_objective(
        tiny_config({"diffusion.prediction": prediction}), torch.device("cpu")
    ).process
    images = np.random.default_rng(0).integers(60, 160, (300, 8, 8, 1), dtype=np.uint8)
    values = to_model_range(images).double()
    mean, variance = float(values.mean()), float(values.var(correction=0))

    def wiener(gain: float) -> float:
        def denoiser(x: Tensor, times: Tensor) -> Tensor:
            levels = [process.levels(time) for time in times.tolist()]
            signal, noise = (
                torch.tensor(level)[:, None, None, None] for level in zip(*levels, strict=True)
            )
            best = signal * variance / (signal**2 * variance + noise**2)
            return mean + gain * best * (x - signal * mean)

        return float(denoising_losses(denoiser, process, images, task="a", seed=0).mean())

    expected = trivial_loss(images, process)
    assert wiener(1.0) == pytest.approx(expected, rel=0.01)
    assert wiener(0.9) > expected
    assert wiener(1.1) > expected


class Heard(Observer):
    """Keeps what is said, and stops the run after a round."""

    def __init__(self, last: int) -> None:
        self.last, self.said = last, list[str]()

    def on_notice(self, text: str) -> None:
        self.said.append(text)

    def on_round(self, record: RoundRecord) -> None:
        if record.round == self.last:
            raise InterruptedError


def said_until(path: Path, last: int, settings: dict[str, Any]) -> list[str]:
    heard = Heard(last)
    with pytest.raises(InterruptedError):
        srfed.train(tiny_config({**SETTINGS, **settings}), run_dir=path, observers=[heard])
    return heard.said


def test_a_run_in_which_nothing_is_learned_says_so(tmp_path: Path) -> None:
    (text,) = said_until(tmp_path / "run", 2, {"training.learning_rate": 1e-9})
    assert "round 1: nothing is learned yet at digit-0, digit-1, digit-2" in text
    assert "training.warmup_rounds" in text


def test_a_run_that_learns_says_nothing(tmp_path: Path) -> None:
    usual = {"diffusion.prediction": "velocity", "federation.rounds": 20}
    assert said_until(tmp_path / "run", 3, usual) == []


def test_only_the_round_after_the_first_tenth_is_judged() -> None:
    judged = {
        rounds: [
            number
            for number in range(rounds + 1)
            if judged_against_trivial(tiny_config({"federation.rounds": rounds}), number)
        ]
        for rounds in (1, 9, 10, 19, 30)
    }
    assert judged == {1: [], 9: [], 10: [1], 19: [1], 30: [3]}


@pytest.mark.parametrize(("value", "round_number"), [(-1.0, 1), (float("nan"), 1), (2.0, 2)])
def test_a_figure_that_cannot_be_or_that_nobody_asked_for_is_refused(
    tmp_path: Path, value: float, round_number: int
) -> None:
    faults = [(lambda reply: None)] * (round_number - 1) + [set_number(AGAINST_TRIVIAL, value)]
    run = begin(tmp_path / "run", {**SETTINGS, "training.local_steps": 1})
    run_in_process(run, app_with(1, train=faults))
    line = MetricsLog(run.metrics).rounds()[round_number - 1]
    assert AGAINST_TRIVIAL in line["refused"]["digit-1"]

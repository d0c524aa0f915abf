"""Objectives, samplers and steps on an update that srfed has never heard of, by name and as
classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import srfed
from srfed.diffusion.objectives.noise import NoisePrediction
from srfed.diffusion.process import Forward
from srfed.diffusion.samplers.ddim import Ddim
from srfed.federation.layout import Layout
from srfed.federation.updates import Delta, Length, Memory
from srfed.federation.updates.clip import Clip
from srfed.federation.updates.quantise import Quantise
from srfed.storage.run_folder import RunFolder
from support.errors import message_of
from support.tiny_run import CHEAP, all_bits, server_bits, tiny_config

HERE = f"{__name__}:"
ONE = {**CHEAP, "federation.rounds": 1, "federation.clients": 2}


class SameNoise(NoisePrediction):
    """Another name for the paper's."""


class LateNoise(NoisePrediction):
    def loss(self, forward: Forward, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return super().loss(forward, images, times, noise) * (times > 250)


class SameDdim(Ddim):
    """Another name for DDIM."""


class SameClip(Clip):
    """Another name for clipping."""


class Rounded(Quantise):
    """It keeps what rounding takes away, under a name of its own."""


class Nothing:
    """A step on an update that does nothing, made of nobody else's."""

    def layout(self, layout: Layout) -> Layout:
        return layout

    def encode(
        self, delta: Delta, memory: Memory, generator: torch.Generator
    ) -> tuple[Delta, Memory]:
        return delta, {}

    def decode(self, delta: Delta, layout: Layout) -> Delta:
        return delta

    def longest(self, length: Length, layout: Layout) -> Length:
        return length

    def in_words(self) -> str:
        return "left as it is"


class Demanding(NoisePrediction):
    def __init__(self, schedule: Any, device: Any, /, *, warmth: float) -> None:
        super().__init__(schedule, device)


def test_parts_under_other_names_are_the_same_parts(tmp_path: Path) -> None:
    settings = {**ONE, "updates.steps": ["clip"], "updates.clip_norm": 0.1}
    usual = srfed.train(tiny_config(settings), run_dir=tmp_path / "usual")
    own = srfed.train(
        tiny_config({**ONE, "updates.clip_norm": 0.1}),
        objective=SameNoise,
        sampler=SameDdim,
        update_steps=[SameClip],
        run_dir=tmp_path / "own",
    )
    names = own.config.diffusion.prediction, own.config.sampling.sampler, *own.config.updates.steps
    assert names == (f"{HERE}SameNoise", f"{HERE}SameDdim", f"{HERE}SameClip")
    assert all_bits(RunFolder.open(own.path)) == all_bits(RunFolder.open(usual.path))
    drawn = [run.sample("digit-1", 2) for run in (own, usual)]
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("steps", [[Nothing], [Nothing, "clip"]])
def test_a_step_made_of_nobody_elses_is_taken(tmp_path: Path, steps: list[Any]) -> None:
    names = [step for step in steps if isinstance(step, str)]
    config = tiny_config({**ONE, "updates.clip_norm": 1e9})
    own = srfed.train(config, update_steps=steps, run_dir=tmp_path / "own")
    clipped = srfed.train(config, update_steps=names or ["clip"], run_dir=tmp_path / "clipped")
    assert (
        server_bits(RunFolder.open(own.path))["sha256"]
        == server_bits(RunFolder.open(clipped.path))["sha256"]
    )


def test_another_loss_trains_another_model(tmp_path: Path) -> None:
    phi = []
    for name in ("SameNoise", "LateNoise"):
        config = tiny_config({**ONE, "diffusion.prediction": HERE + name})
        run = srfed.train(config, run_dir=tmp_path / name)
        phi.append(server_bits(RunFolder.open(run.path))["sha256"])
    assert phi[0] != phi[1]


def test_what_a_step_of_ones_own_keeps_is_there_after_a_stop(tmp_path: Path) -> None:
    once = {**CHEAP, "federation.clients": 2, "updates.steps": [f"{HERE}Rounded"]}
    two = tiny_config({**once, "federation.rounds": 2})
    straight = srfed.train(two, run_dir=tmp_path / "straight")
    srfed.train(tiny_config({**once, "federation.rounds": 1}), run_dir=tmp_path / "stopped")
    resumed = srfed.train(two, run_dir=tmp_path / "stopped", resume=True)
    assert all_bits(RunFolder.open(resumed.path)) == all_bits(RunFolder.open(straight.path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"diffusion.prediction": "nowhere_at_all:Loss"},
            "diffusion.prediction = nowhere_at_all:Loss cannot be loaded: ModuleNotFoundError",
        ),
        (
            {"diffusion.prediction": f"{HERE}SameDdim"},
            f"diffusion.prediction = {HERE}SameDdim is no objective; allowed: a class of "
            "srfed.diffusion.objective.Objective",
        ),
        ({"sampling.sampler": f"{HERE}SameNoise"}, "is no sampler; allowed: a class of srfed.diff"),
        ({"updates.steps": [f"{HERE}SameNoise"]}, "is no step on an update; allowed: a class of"),
        (
            {"diffusion.prediction": f"{HERE}Demanding"},
            f"diffusion.prediction = {HERE}Demanding cannot be made: ",
        ),
        ({"updates.steps": [f"{HERE}Nothing", f"{HERE}Nothing"]}, "allowed: each step once"),
        (
            {"diffusion.prediction": "magic"},
            'diffusion.prediction = "magic" is not allowed; allowed: noise | velocity | edm | '
            '(text, "module:Class" of your own)',
        ),
    ],
)
def test_what_is_no_such_part_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    run = tmp_path / "run"
    text = message_of(lambda: srfed.train(tiny_config({**ONE, **settings}), run_dir=run))
    assert words in text
    assert "\n" not in text
    assert not run.exists()

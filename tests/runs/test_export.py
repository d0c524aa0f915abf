"""What ``srfed export`` writes, diffusers opens and draws our images with."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from srfed.api import open_run
from srfed.config import RunConfig
from srfed.diffusion.sampler import drawn_for_each, sample
from srfed.evaluation.generation import build_sampler
from srfed.model import build_model, build_partition
from srfed.randomness import derive_generator
from srfed.runs.export import folded
from srfed.storage.run_folder import RunFolder
from srfed.storage.site_model import save_site_model
from support.commands import run_here
from support.tiny_run import tiny_config

IMAGES = 3


@pytest.fixture(autouse=True)
def _no_code_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies a folder's code to a cache, and runs it there."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def generators(config: RunConfig, task: str) -> list[torch.Generator]:
    return [derive_generator(config.seed, "samples", task, number) for number in range(IMAGES)]


def by_diffusers(folder: Path, config: RunConfig, task: str, **call: Any) -> np.ndarray:
    """N x H x W x C in 0..1, from the noise that srfed draws for these images."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(IMAGES, generators(config, task), output_type="np", **call).images
    assert isinstance(drawn, np.ndarray)
    return drawn


def by_srfed(folder: Path, task: str, sampling: Mapping[str, Any]) -> np.ndarray:
    run = open_run(folder, device="cpu")
    settings = run.config.sampling.model_copy(update=dict(sampling))
    process, draw = run._trained.objective.process, drawn_for_each(generators(run.config, task))
    height, width, channels = run._trained.shapes[0]
    images = sample(
        build_sampler(settings),
        run.denoiser(task),
        process,
        process.start(draw(torch.empty(IMAGES, channels, height, width))),
        draw,
        steps=settings.steps,
        clip=settings.clip,
    ).images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def site(folder: Path, overrides: Mapping[str, Any], shape: tuple[int, int, int]) -> RunConfig:
    """The store of a deployed site with weights in every tensor; nothing is trained."""
    config = tiny_config({"model.attention_stages": [2, 3], **overrides})
    network = build_model(config, shape[-1])
    drawn = torch.Generator().manual_seed(3)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=drawn)
        for name, tensor in network.state_dict().items()
    }
    partition = build_partition(config, network)
    save_site_model(
        folder,
        config,
        "lineage",
        7,
        shape,
        partition.take_shared(tensors),
        partition.take_exclusive(tensors),
    )
    return config


def test_diffusers_draws_what_a_run_draws(finished_run: RunFolder, tmp_path: Path) -> None:
    out, config = tmp_path / "ones", finished_run.config
    done = run_here("export", finished_run.path, "--task", "digit-1", "--out", out)
    assert done.returncode == 0, done.stderr
    call = {"num_inference_steps": 5, "use_clipped_model_output": True}
    assert "batch_size=16, num_inference_steps=5, eta=1.0, use_clipped_model_output" in done.stdout
    for eta in (0.0, 1.0):
        found = by_diffusers(out, config, "digit-1", eta=eta, **call)
        expected = by_srfed(finished_run.path, "digit-1", {"eta": eta})
        assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - by_srfed(finished_run.path, "digit-2", {})).max() > 0.01
    # So whoever has the seed has the very images of `srfed sample`.
    images = open_run(finished_run.path, device="cpu").sample("digit-1", IMAGES, config.seed)
    assert (np.abs(found * 255 - images) < 0.51).all()


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (
            {
                "diffusion.prediction": "velocity",
                "model.exclusive_stages": "none",
                "model.owned": ["vector", "film"],
            },
            (9, 7, 3),
        ),
        (
            {
                "sampling.sampler": "ancestral",
                "sampling.variance": "posterior",
                "diffusion.timesteps": 40,
                "evaluation.ssim_curve": [],
            },
            (8, 8, 1),
        ),
    ],
    ids=["velocity, vector and film", "ancestral"],
)
def test_diffusers_draws_what_a_site_draws(
    overrides: dict[str, Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    store, out = tmp_path / "clinic-7", tmp_path / "out"
    config = site(store, overrides, shape)
    done = run_here("export", "--store", store, "--out", out)
    assert done.returncode == 0, done.stderr
    ancestral = config.sampling.sampler == "ancestral"
    call: dict[str, Any] = (
        {"num_inference_steps": 40}
        if ancestral
        else {"num_inference_steps": 5, "eta": 0.0, "use_clipped_model_output": True}
    )
    found = by_diffusers(out, config, "clinic-7", **call)
    assert found.shape == (IMAGES, *shape)
    assert np.abs(found - by_srfed(store, "clinic-7", {"eta": 0.0})).max() < 1e-4
    weights = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert not [name for name in weights if "film" in name or "task_" in name]


def test_a_row_of_a_table_of_tasks_becomes_a_bias() -> None:
    config = tiny_config(
        {
            "training.method": "pooled",
            "model.exclusive_stages": "none",
            "model.task_embedding": "shared",
        }
    )
    whole, plain = build_model(config, 1), build_model(tiny_config(), 1)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(folded(whole.state_dict(), 2))
    images, times = torch.randn(4, 1, 8, 8), torch.tensor([1, 7, 100, 500])
    with torch.no_grad():
        found, expected = plain(images, times), whole(images, times, torch.full((4,), 2))
        other = whole(images, times, torch.full((4,), 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 0.01


def test_the_card_says_what_the_run_scored_and_names_no_other_owner(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_here("export", finished_run.path, "--task", 2, "--out", out).returncode == 0
    lines = map(json.loads, finished_run.metrics.read_text().splitlines())
    (*_, last) = (line for line in lines if line["kind"] == "evaluation")
    card = (out / "README.md").read_text()
    own, everybody = last["score_by_client"]["digit-2"], last["score"]
    assert f"| {last['score_name']} (0 is best) | {own:.3f} | {everybody:.3f} |" in card
    assert f"lineage {finished_run.lineage}" in card
    assert "a federation of 3 owners" in card
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "digit-0" not in card + "".join(
        path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".py")
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"diffusion.prediction": "edm"}, "diffusion.prediction = edm cannot be exported"),
        ({}, "is not an empty folder"),
    ],
    ids=["edm", "used"],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    store, out = tmp_path / "clinic-7", tmp_path / "out"
    site(store, overrides, (8, 8, 1))
    if not overrides:
        (out / "unet").mkdir(parents=True)
    done = run_here("export", "--store", store, "--out", out)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"clinic-7", "out", "modules"}
    assert not list(out.rglob("*.safetensors"))


def test_a_task_must_be_named_where_there_are_several(
    finished_run: RunFolder, tmp_path: Path
) -> None:
    done = run_here("export", finished_run.path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --task is missing: a pipeline is one task's; allowed: digit-0, digit-1, digit-2\n"
    )

"""The main job learns: after a short run, each client's θ_i draws its own digit."""

from pathlib import Path

import pytest

from srfed.config import ResourcesConfig, load_config
from srfed.data import load_tasks
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images, class_agreement
from srfed.federation.flower.in_process import run_in_process
from srfed.runs.run import TrainedRun
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder


@pytest.mark.slow
def test_samples_belong_to_their_tasks(tmp_path: Path) -> None:
    overrides = [
        "federation={clients: 3, rounds: 8}",
        "evaluation={every: 4, samples: 90, samples_between: 90, ssim_images: 0}",
        "sampling.steps=25",
    ]
    config = load_config(None, overrides)
    directory = RunFolder.create(tmp_path / "run", config)
    run_in_process(directory)

    run = TrainedRun(directory.path, ResourcesConfig())
    tasks = load_tasks(config.data, 10)
    assert accuracy_on_real_images(tasks) > 0.95
    samples = {
        info.task: generate(
            run.denoiser(info),
            run.objective.process,
            config.sampling,
            count=50,
            shape=run.shape_of(info),
            seed=1,
            task=info.client,
        ).images
        for info in run.tasks
    }
    agreement = class_agreement(tasks, samples)
    assert min(agreement.values()) > 0.7

    early, late = (line["score"] for line in MetricsLog(directory.metrics).evaluations())
    assert late < 0.8 * early

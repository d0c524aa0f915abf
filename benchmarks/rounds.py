"""Federated rounds against a plain PyTorch loop: ``python -m benchmarks.rounds``.

All do the same optimizer steps on the same number of images with the same network: a loop in one
process without federation (one thread, and all cores), such loops side by side in as many processes
as Ray has clients at work, the in-process grid, and Ray. Prints images per second and the ratio to
the one-thread loop; the first round of each is warm-up and not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.cores import usable_cores
from srfed.data import load_tasks, to_model_range
from srfed.federation.flower.in_process import run_in_process
from srfed.federation.flower.ray import run_on_ray
from srfed.model import build_model, build_objective
from srfed.runs.requested import requested_config
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="default: the embedded digits")
    parser.add_argument("--data-dir", help="where the images are")
    parser.add_argument("--rounds", type=int, default=8, help="counted rounds (default 8)")
    options = parser.parse_args()
    overrides = [
        f"federation.rounds={options.rounds + 1}",
        "training.learning_rate_schedule=constant",
        "evaluation={every: 0, samples: 20, ssim_images: 0}",
    ]
    data_dir = None if options.data_dir is None else json.dumps(options.data_dir)
    config = requested_config(options.config, overrides, {"data.dir": data_dir})
    cores = usable_cores()
    speeds = {"plain loop, 1 thread": plain_loop(config, 1)}
    if cores > 1:
        speeds[f"plain loop, {cores} threads"] = plain_loop(config, cores)
    at_once = min(config.federation.clients, cores // config.resources.client_cpus)
    if at_once > 1:
        with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as processes:
            side_by_side = processes.map(plain_loop, [config] * at_once, [1] * at_once)
            speeds[f"plain loops, {at_once} processes"] = sum(side_by_side)
    with tempfile.TemporaryDirectory() as folder:
        for name, run in (("in-process grid", run_in_process), ("Ray", run_on_ray)):
            directory = RunFolder.create(Path(folder) / name, config)
            run(directory)
            rounds = MetricsLog(directory.metrics).rounds()[1:]
            speeds[name] = statistics.median(line["images"] / line["seconds"] for line in rounds)
    reference = speeds["plain loop, 1 thread"]
    print(f"\n{'':<24} {'images/s':>9} {'ratio':>7}")
    for name, speed in speeds.items():
        print(f"{name:<24} {speed:>9,.0f} {speed / reference:>7.2f}")


def plain_loop(config: RunConfig, threads: int) -> float:
    """Median images per second of a DDPM loop, over as many rounds' steps as the federated runs
    take.
    """
    torch.set_num_threads(threads)
    training, device = config.training, torch.device("cpu")
    tasks = load_tasks(config.data, config.federation.clients)
    images = torch.cat([to_model_range(task.train) for task in tasks])
    model = build_model(config, images.shape[1])
    objective = build_objective(config, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, fused=True)
    steps = (training.local_steps or 1) * len(tasks)
    speeds = []
    for _ in range(config.federation.rounds):
        start = time.perf_counter()
        for _ in range(steps):
            batch = images[torch.randint(len(images), (training.batch_size,))]
            timesteps = torch.randint(1, objective.process.timesteps + 1, (len(batch),))
            loss = objective.loss(model, batch, timesteps, torch.randn_like(batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                model.parameters(), training.gradient_clip or float("inf")
            )
            optimizer.step()
        speeds.append(steps * training.batch_size / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


if __name__ == "__main__":
    main()

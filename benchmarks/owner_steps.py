"""Owners' local steps a second, in whole rounds: in one process one by one and in stacks, and in
Ray's processes.

``python -m benchmarks.owner_steps --owners 1 10 100 --device cuda``

Images are noise. A round is 24 steps of 8 images of each owner, with messages, stores and
aggregation; the median of the rounds after the first, in which a GPU's steps are captured. Under
Ray each client has an equal share of the GPU.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import srfed
from srfed.commands.options import Parser
from srfed.config import RunConfig, load_config
from srfed.data.tasks import Task
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.units import bytes_in_words

WAYS = ("one by one", "stacked", "ray")
STEPS, BATCH, IMAGES, TEST_IMAGES = 24, 8, 16, 4


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, nargs="+", default=[1, 10, 100], metavar="N")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--network", default="few_images", help="a file of configs/")
    parser.add_argument("--side", type=int, default=14, help="pixels of the images' side")
    parser.add_argument("--stack", type=int, default=100, help="owners in a stack, at most")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    options = parser.parse_args()
    for owners in options.owners:
        for way in options.ways:
            if way == "stacked" and owners == 1:
                continue
            config = _config(options, owners, way)
            speed = _owner_steps_per_second(config, owners, options.side)
            print(f"{owners:>5} owners, {way:<10}: {speed:>9,.1f} owner-steps/s{_memory(way)}")


class _Rounds(Observer):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_round(self, record: RoundRecord) -> None:
        self.seconds.append(record.seconds)


def _config(options: Any, owners: int, way: str) -> RunConfig:
    stack = min(options.stack, owners) if way == "stacked" else "auto"
    judged = min(owners, 10)
    settings = [
        f"federation.clients={owners}",
        "federation.min_clients=1",
        f"federation.rounds={options.rounds}",
        "federation.compare=none",
        "federation.result=last",
        "data.validation_images=0",
        f"training.local_steps={STEPS}",
        "training.local_epochs=null",
        f"training.batch_size={BATCH}",
        "training.minibatches=continued",
        "evaluation.every=0",
        f"evaluation.clients={judged}",
        f"evaluation.samples={2 * judged}",
        f"evaluation.samples_between={2 * judged}",
        "evaluation.ssim_images=0",
        "sampling.steps=2",
        f"resources.backend={'ray' if way == 'ray' else 'inline'}",
        f"resources.device={options.device}",
        f"resources.stack={stack}",
    ]
    return load_config(Path("configs") / f"{options.network}.yaml", settings)


def _owner_steps_per_second(config: RunConfig, owners: int, side: int) -> float:
    draws, rounds = np.random.default_rng(0), _Rounds()
    tasks = [
        Task(f"owner-{number:05d}", _noise(draws, IMAGES, side), _noise(draws, TEST_IMAGES, side))
        for number in range(owners)
    ]
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        srfed.train(config, tasks, observers=[rounds], run_dir=Path(folder, "run"))
    return owners * STEPS / statistics.median(rounds.seconds[1:])


def _noise(draws: np.random.Generator, count: int, side: int) -> np.ndarray:
    return draws.integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def _memory(way: str) -> str:
    """Of this process on the GPU, at peak."""
    if way == "ray" or not torch.cuda.is_initialized():
        return ""
    return f", {bytes_in_words(torch.cuda.max_memory_reserved())} of the GPU"


if __name__ == "__main__":
    main()

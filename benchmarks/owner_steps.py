"""Owners' local steps a second, in whole rounds: in one process one by one and in stacks, and in
Ray's processes, one by one and in stacks there.

``python -m benchmarks.owner_steps --owners 1 10 100 --device cuda``

Images are noise. A round is 24 steps of 8 images of each owner, with messages, stores and
aggregation; the median of the rounds after the first, in which a GPU's steps are captured. Under
Ray each process has an equal share of the GPU, and with stacks there an equal share of the owners:
what an owner's round takes beside its steps, some fifty processor milliseconds, is then shared too.
"""

import argparse
import gc
import math
import statistics
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

import srfed
from srfed.commands.options import Parser
from srfed.config import RunConfig, load_config
from srfed.cores import usable_cores
from srfed.data.tasks import Task
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.units import bytes_in_words

WAYS = ("one by one", "stacked", "ray", "ray stacked")
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
            if "stacked" in way and owners == 1:
                continue
            config = _config(options, owners, way)
            with MemoryOfGpu() as memory:
                speed = _owner_steps_per_second(config, owners, options.side)
            print(f"{owners:>5} owners, {way:<11}: {speed:>9,.1f} owner-steps/s{memory.in_words}")


class MemoryOfGpu:
    """What all processes together take of the GPUs at most, while it is entered, beyond what was
    taken before; asked of the driver twice a second, which holds nothing of a GPU itself.

    Attributes:
        in_words: as a line goes on; empty where there is no GPU.
    """

    def __init__(self) -> None:
        self.in_words = ""
        self._over = threading.Event()
        self._most = 0

    def __enter__(self) -> "MemoryOfGpu":
        if torch.cuda.is_initialized():
            # What earlier rows have left.
            gc.collect()
            torch.cuda.empty_cache()
        self._before = _taken()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self._before is not None:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._before is not None:
            self._watcher.join()
            self.in_words = f", {bytes_in_words(self._most - self._before)} of the GPU"

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._most = max(self._most, _taken() or 0)


def _taken() -> int | None:
    """Bytes taken of all GPUs; None where there is none."""
    if torch.cuda.device_count() == 0:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return 2**20 * sum(map(int, said.split()))


class _Rounds(Observer):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_round(self, record: RoundRecord) -> None:
        self.seconds.append(record.seconds)


def _config(options: Any, owners: int, way: str) -> RunConfig:
    share = math.ceil(owners / usable_cores()) if way == "ray stacked" else owners
    stack = min(options.stack, max(2, share)) if "stacked" in way else "auto"
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
        f"resources.backend={'ray' if 'ray' in way else 'inline'}",
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
    with tempfile.TemporaryDirectory() as folder:
        srfed.train(config, tasks, observers=[rounds], run_dir=Path(folder, "run"))
    return owners * STEPS / statistics.median(rounds.seconds[1:])


def _noise(draws: np.random.Generator, count: int, side: int) -> np.ndarray:
    return draws.integers(0, 256, (count, side, side, 1), dtype=np.uint8)


if __name__ == "__main__":
    main()

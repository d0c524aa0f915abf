"""What an owner costs, from ten of them to thousands: ``python -m benchmarks.owners``.

Each number of owners is a run of its own process in-process: 16 images of noise each, one local
step a round, fifty owners judged at the end. Printed are, of a round and for each owner that is
asked in it, the seconds on the clock and the processor's, both without training itself, and the
latter over a yardstick: what the processor takes to write, hash and read an owner's state once, on
this disk and in the same process. Then the seconds until the first round begins, the process's peak
memory, and the bytes of a store.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import srfed
from srfed.commands.options import Parser
from srfed.config import RunConfig, parse_config
from srfed.data.tasks import Task
from srfed.observer import Observer
from srfed.records import RoundRecord, TaskInfo
from srfed.training.step import LocalStep

NETWORKS = {
    "tiny": {
        "channels": [4, 4, 8, 8],
        "groups": 2,
        "attention_stages": [],
        "exclusive_stages": "none",
        "owned": ["film"],
    },
    "small": {
        "channels": [8, 8, 16, 16],
        "groups": 4,
        "exclusive_stages": "none",
        "owned": ["film"],
    },
    "digits": {},
}
IMAGES, TEST_IMAGES, BATCH, JUDGED = 16, 4, 8, 50


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, nargs="+", default=[10, 100, 1000], metavar="N")
    parser.add_argument("--network", choices=NETWORKS, default="digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asked", type=int, help="owners of a round, drawn anew in each; else all")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        asked = min(options.one, options.asked or options.one)
        print(json.dumps(_measured(options.one, options.network, options.rounds, asked)))
        return
    print(
        f"{'owners':>7} {'ms':>8} {'CPU ms':>8} {'yardsticks':>11} {'begin s':>8} "
        f"{'memory MB':>10} {'store MB':>9}"
    )
    for count in options.owners:
        words = ["--one", str(count), "--network", options.network, "--rounds", str(options.rounds)]
        words += [] if options.asked is None else ["--asked", str(options.asked)]
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.owners", *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(ended.stdout.splitlines()[-1])
        print(
            f"{count:>7,} {1000 * found['clock']:>8.1f} {1000 * found['processor']:>8.1f} "
            f"{found['yardsticks']:>11.1f} {found['begin']:>8.1f} {found['memory']:>10,.0f} "
            f"{found['store']:>9.2f}",
            flush=True,
        )


class _Start(Observer):
    def __init__(self) -> None:
        self.began = 0.0
        self.rounds: list[tuple[float, float]] = []

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        self.began = time.perf_counter()

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append((time.perf_counter(), time.process_time()))


class _Training:
    """What training takes, clock and processor, from beginning to end of the local steps."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0
        run = LocalStep.run

        def timed(step: LocalStep, *arguments: Any) -> Any:
            clock, processor = time.perf_counter(), time.process_time()
            try:
                return run(step, *arguments)
            finally:
                self.clock += time.perf_counter() - clock
                self.processor += time.process_time() - processor

        LocalStep.run = timed  # type: ignore[method-assign, assignment]


def _config(owners: int, network: str, rounds: int, asked: int) -> RunConfig:
    return parse_config(
        {
            "model": NETWORKS[network],
            "training": {"local_steps": 1, "batch_size": BATCH},
            "federation": {"clients": owners, "rounds": rounds, "clients_per_round": asked},
            "evaluation": {
                "every": 0,
                "clients": min(owners, JUDGED),
                "samples": 2 * min(owners, JUDGED),
                "samples_between": 2 * min(owners, JUDGED),
                "ssim_images": 0,
            },
            "sampling": {"steps": 2},
            "resources": {"backend": "inline", "device": "cpu"},
        }
    )


def _measured(owners: int, network: str, rounds: int, asked: int) -> dict[str, float]:
    draws = np.random.default_rng(0)
    tasks = [
        Task(
            f"owner-{number:05d}",
            draws.integers(0, 256, (IMAGES, 8, 8, 1), dtype=np.uint8),
            draws.integers(0, 256, (TEST_IMAGES, 8, 8, 1), dtype=np.uint8),
        )
        for number in range(owners)
    ]
    with tempfile.TemporaryDirectory() as folder:
        start, observer, training = time.perf_counter(), _Start(), _Training()
        run = srfed.train(
            _config(owners, network, rounds, asked),
            tasks,
            observers=[observer],
            run_dir=Path(folder, "run"),
        )
        # The first round has no stores to read; training is taken off in the mean.
        steps = asked * rounds
        rounds_taken = [
            tuple((end - begin) / asked for end, begin in zip(after, before, strict=True))
            for before, after in pairwise(observer.rounds)
        ]
        clock, processor = (min(column) for column in zip(*rounds_taken, strict=True))
        processor -= training.processor / steps
        states = list((run.path / "clients").rglob("*.safetensors"))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "clock": clock - training.clock / steps,
            "processor": processor,
            "yardsticks": processor / _yardstick(states[0], Path(folder, "yardstick")),
            "begin": observer.began - start,
            "memory": memory,
            "store": sum(file.stat().st_size for file in states) / owners / 2**20,
        }


def _yardstick(state: Path, path: Path) -> float:
    """Processor seconds to write, sync, hash and read as many bytes as an attempt has."""
    content, taken = memoryview(state.read_bytes()), []
    for _ in range(9):
        start = time.process_time()
        with path.open("wb") as file:
            for place in range(0, len(content), 2**20):
                file.write(content[place : place + 2**20])
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(content).hexdigest()
        path.read_bytes()
        taken.append(time.process_time() - start)
        path.unlink()
    return statistics.median(taken)


if __name__ == "__main__":
    main()

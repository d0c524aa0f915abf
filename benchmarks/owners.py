"""What an owner costs, from ten of them to thousands: ``python -m benchmarks.owners``.

Each number of owners is a run of its own process in-process: 16 images of noise each, one local
step a round, fifty owners judged at the end. Printed are the seconds of a round for each owner
and the ratio to the plain loop's step on the same batch (``benchmarks.rounds``), the seconds
until the first round begins, the process's peak memory, and the bytes of a store.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import srfed
from benchmarks.rounds import plain_loop
from srfed.commands.options import Parser
from srfed.config import RunConfig, parse_config
from srfed.data.tasks import Task
from srfed.observer import Observer
from srfed.records import TaskInfo
from srfed.storage.metrics_log import MetricsLog

NETWORKS = {
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
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(_measured(options.one, options.network, options.rounds)))
        return
    step = BATCH / plain_loop(_config(10, options.network, 8), 1)
    print(
        f"{options.network}: a plain step of {BATCH} images takes {1000 * step:.1f} ms", flush=True
    )
    print(
        f"{'owners':>7} {'ms a round':>11} {'steps':>6} {'begin s':>8} {'memory MB':>10} "
        f"{'store MB':>9}"
    )
    for count in options.owners:
        words = ["--one", str(count), "--network", options.network, "--rounds", str(options.rounds)]
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.owners", *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(ended.stdout.splitlines()[-1])
        print(
            f"{count:>7,} {1000 * found['round']:>11.1f} {found['round'] / step:>6.2f} "
            f"{found['begin']:>8.1f} {found['memory']:>10,.0f} {found['store']:>9.2f}",
            flush=True,
        )


class _Start(Observer):
    def __init__(self) -> None:
        self.began = 0.0

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        self.began = time.perf_counter()


def _config(owners: int, network: str, rounds: int) -> RunConfig:
    return parse_config(
        {
            "model": NETWORKS[network],
            "training": {"local_steps": 1, "batch_size": BATCH},
            "federation": {"clients": owners, "rounds": rounds},
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


def _measured(owners: int, network: str, rounds: int) -> dict[str, float]:
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
        start, observer = time.perf_counter(), _Start()
        run = srfed.train(
            _config(owners, network, rounds),
            tasks,
            observers=[observer],
            run_dir=Path(folder, "run"),
        )
        lines = MetricsLog(run.path / "metrics.jsonl").rounds()
        stores = sum(file.stat().st_size for file in (run.path / "clients").rglob("*.safetensors"))
        return {
            # The first round has no stores to read.
            "round": min(line["seconds"] for line in lines[1:]) / owners,
            "begin": observer.began - start,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "store": stores / owners / 2**20,
        }


if __name__ == "__main__":
    main()

"""How much of a run's time goes into its evaluations: ``python -m benchmarks.evaluation_share``.

Each preset makes three rounds in this process, on one thread, on as many images of noise for each
owner as it is meant for, with an evaluation between and one at the end. What they cost is taken in
seconds of CPU, which other programs on the machine change little, and multiplied by how often the
whole run has them. Reading images, starting and ending are neither.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import srfed
from srfed.commands.options import Parser
from srfed.config import RunConfig, parse_config, read_settings
from srfed.config.presets import preset_file
from srfed.data.images import Images
from srfed.data.tasks import Task
from srfed.observer import Observer, Stage
from srfed.records import EvaluationRecord, RoundRecord


class Sizes(NamedTuple):
    """Of an owner's images, and of how many there are."""

    owners: int
    side: int
    train: int
    test: int


PRESETS = {
    "digits": Sizes(10, 8, 140, 36),
    "mnist": Sizes(10, 28, 500, 100),
    "small": Sizes(10, 28, 200, 50),
    "few_images": Sizes(10, 28, 20, 5),
}
"""Those whose runs are for a CPU; a folder's owners have images of one's own, here 28 x 28."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["digits"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    print(
        f"{'':<12} {'round':>8} {'between':>8} {'at the end':>11} {'training':>9} "
        f"{'evaluation':>11} {'share':>6}   seconds of CPU"
    )
    for name in options.presets:
        print(_line(name, options.settings), flush=True)


class _Costs(Observer):
    """Seconds of CPU of each round, and of each evaluation by whether it is the last."""

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self.evaluations: dict[bool, float] = {}
        self._began = 0.0

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        self._began = time.process_time()

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(time.process_time() - self._began)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.evaluations[record.final] = time.process_time() - self._began


def _line(name: str, settings: Sequence[str]) -> str:
    sizes = PRESETS[name]
    whole = _config(name, sizes, settings, {})
    short = _config(name, sizes, settings, {"federation.rounds": 3, "evaluation.every": 2})
    draws = np.random.default_rng(0)

    def images(count: int) -> Images:
        return draws.integers(0, 256, (count, sizes.side, sizes.side, 1), dtype=np.uint8)

    tasks = [
        Task(f"owner-{number}", images(sizes.train), images(sizes.test))
        for number in range(sizes.owners)
    ]
    costs = _Costs()
    with tempfile.TemporaryDirectory() as folder:
        srfed.train(short, tasks, observers=[costs], run_dir=Path(folder, "run"))
    a_round = float(np.mean(costs.rounds[1:]))  # the first warms up
    rounds = whole.federation.rounds
    between = sum(whole.evaluation_due(number) for number in range(1, rounds))
    training = rounds * a_round
    evaluation = between * costs.evaluations[False] + costs.evaluations[True]
    return (
        f"{name:<12} {a_round:>8.2f} {costs.evaluations[False]:>8.2f} "
        f"{costs.evaluations[True]:>11.2f} {training:>9.1f} {evaluation:>11.1f} "
        f"{evaluation / (training + evaluation):>6.1%}"
    )


def _config(name: str, sizes: Sizes, settings: Sequence[str], changes: dict[str, int]) -> RunConfig:
    wanted = [
        f"federation.clients={sizes.owners}",
        "resources.backend=inline",
        "resources.device=cpu",
        *settings,
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    return parse_config(read_settings(preset_file(name), wanted))


if __name__ == "__main__":
    main()

"""Time of an owner's local step in stacks of several sizes, over that of an owner by itself.

``python -m benchmarks.stacks --network few_images --side 14 --stacks 2 4 7``: interleaved, in
seconds of processor time, draws, clipping, optimizer and averages included. A run on a CPU takes
larger stacks apart, into programs of seven owners at most. With ``--images 10`` it is the forward
pass of an owner's ten samples.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from srfed.commands.options import Parser
from srfed.config import RunConfig, load_config
from srfed.flat import copies
from srfed.model import StackedModel, build_model, build_objective, build_partition
from srfed.networks.network import Network
from srfed.networks.partition import Shared
from srfed.training.local import Job, LocalResult, LocalTrainer, train_owners
from srfed.training.part import initial_state
from srfed.training.step import LocalStep


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--network", default="few_images", help="a file of configs/")
    parser.add_argument("--side", type=int, default=14, help="pixels of the images' side")
    parser.add_argument("--stacks", type=int, nargs="+", default=[2, 4, 7])
    parser.add_argument("--steps", type=int, default=8, help="local steps in a round")
    parser.add_argument("--images", type=int, help="samples of an owner, in place of local steps")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [
        f"training.local_steps={options.steps}",
        "training.local_epochs=null",
        "training.minibatches=continued",
        "resources.device=cpu",
    ]
    config = load_config(Path("configs") / f"{options.network}.yaml", settings)
    model = build_model(config, 1)
    partition = build_partition(config, model)
    objective = build_objective(config, torch.device("cpu"))
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    state = initial_state(model, partition)
    side = options.side
    images = np.random.default_rng(0).integers(0, 256, (64, side, side, 1), dtype=np.uint8)
    if options.images is not None:
        _sampling(config, model, options)
        return
    alone = LocalStep(config, model, partition, objective)
    trainers = [
        LocalTrainer(config, model, partition, objective, f"owner-{k}", images, step=alone)
        for k in range(max(options.stacks))
    ]

    def jobs(count: int) -> list[Job]:
        return [Job(trainer, 1, shared, state, None) for trainer in trainers[:count]]

    def stacked(count: int) -> Callable[[], list[LocalResult]]:
        step = LocalStep(config, model, partition, objective, count)
        return lambda: train_owners(config, step, jobs(count))

    runs: dict[int, Callable[[], Sequence[object]]] = {
        1: lambda: train_owners(config, alone, jobs(1))
    }
    runs |= {count: stacked(count) for count in options.stacks}
    _compare(runs, options, f"batches of {config.training.batch_size}")


def _sampling(config: RunConfig, model: Network, options: argparse.Namespace) -> None:
    """The passes that sampling asks a network for."""
    model.eval()
    side, stacked = options.side, {n: StackedModel(config, model, n) for n in options.stacks}

    @torch.no_grad()
    def passes(forward: Callable[..., torch.Tensor], owners: int) -> list[torch.Tensor]:
        x = torch.randn(owners * options.images, 1, side, side)
        times = torch.full((len(x),), 100)
        return [forward(x, times) for _ in range(options.steps)]

    runs: dict[int, Callable[[], Sequence[object]]] = {1: partial(passes, model, 1)}
    runs |= {n: partial(passes, models.forwards.task, n) for n, models in stacked.items()}
    _compare(runs, options, f"{options.images} samples each")


def _compare(
    runs: Mapping[int, Callable[[], Sequence[object]]], options: argparse.Namespace, what: str
) -> None:
    taken: dict[int, list[float]] = {count: [] for count in runs}
    for repeat in range(options.repeats + 1):
        for count, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                taken[count].append((time.process_time() - start) / count / options.steps)
    for count, seconds in taken.items():
        median = statistics.median(seconds)
        ratios = [one / own for one, own in zip(taken[1], seconds, strict=True)]
        print(
            f"{options.network} {options.side} px, {what}, stacks of "
            f"{count}: {1000 * median:.1f} ms an owner's step, {statistics.median(ratios):.2f} "
            f"times as fast as by itself ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""SSIM-rec in a few steps beside SSIM-rec by Algorithm 2, on the checkpoints that runs have kept:
``python -m benchmarks.reconstruction RUN [RUN ...]``.

A run keeps the checkpoints of its last ``federation.keep_attempts`` rounds. For each number of
steps, and for Algorithm 2 with other noise (which says how far it agrees with itself), printed are

- the mean SSIM-rec and its difference to Algorithm 2,
- Spearman's correlation with Algorithm 2 over the owners, mean over the checkpoints,
- the share of the pairs of checkpoints, owner by owner, that both put in the same order,
- the same for the means over the owners,
- forward passes for each image, and seconds of CPU as a ratio to Algorithm 2.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr

from srfed.commands.options import Parser
from srfed.config import RunConfig
from srfed.data import load_recorded_tasks, to_model_range
from srfed.evaluation.metrics.reconstruction import ssim_of_reconstructions
from srfed.runs.run import TrainedRun
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints

Curves = npt.NDArray[np.float64]
"""SSIM-rec by checkpoint, owner and timestep."""
AGAIN = "again"
"""Algorithm 2 with other noise."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--images", type=int, default=16, help="test images of an owner (16)")
    parser.add_argument(
        "--timesteps", nargs="+", type=int, metavar="T", help="default: t* and the run's curve"
    )
    parser.add_argument(
        "--rounds", nargs="+", type=int, metavar="N", help="checkpoints; default: all there are"
    )
    options = parser.parse_args()
    for path in options.runs:
        _print_run(path, options)


def _print_run(path: Path, options: argparse.Namespace) -> None:
    run = RunFolder.open(path)
    config = run.config
    # Before the first round there is no θ_i.
    kept = [number for number in ServerCheckpoints(run.server, 1).rounds() if number]
    asked = options.rounds or kept
    evaluation = config.evaluation
    timesteps = options.timesteps or sorted({evaluation.ssim_timestep, *evaluation.ssim_curve})
    ways = [None, AGAIN, *options.steps]
    curves, seconds = _measure(path, config, asked, timesteps, ways, options.images)
    print(
        f"\n{path}: {config.data.dataset}, {config.diffusion.prediction}, "
        f"{config.federation.clients} owners, {options.images} test images each, checkpoints after "
        f"rounds {', '.join(map(str, asked))}"
    )
    print(
        f"{'t':>4} {'steps':>6} {'SSIM-rec':>9} {'less old':>9} {'over owners':>12} "
        f"{'owners alike':>13} {'means alike':>12} {'passes':>7} {'seconds':>8}"
    )
    old, old_seconds = curves[0], seconds[0]
    for place, timestep in enumerate(timesteps):
        for way, curve, spent in zip(ways, curves, seconds, strict=True):
            ours, theirs = curve[:, :, place], old[:, :, place]
            passes = min(way, timestep) if isinstance(way, int) else timestep
            print(
                f"{timestep:>4} {'old' if way is None else way:>6} {ours.mean():>9.4f} "
                f"{(ours - theirs).mean():>+9.4f} {_rank_correlation(ours, theirs):>12.3f} "
                f"{_alike(ours, theirs):>13.3f} "
                f"{_alike(ours.mean(1, keepdims=True), theirs.mean(1, keepdims=True)):>12.3f} "
                f"{passes:>7} {spent / old_seconds:>8.3f}"
            )


def _measure(
    path: Path,
    config: RunConfig,
    rounds: Sequence[int],
    timesteps: Sequence[int],
    ways: Sequence[int | str | None],
    images: int,
) -> tuple[list[Curves], list[float]]:
    """The curves of each way, and the seconds that it took."""
    tasks = load_recorded_tasks(config.data, config.federation.clients, RunFolder.open(path).images)
    torch.set_num_threads(config.resources.client_cpus)
    curves = [np.empty((len(rounds), len(tasks), len(timesteps))) for _ in ways]
    seconds = [0.0] * len(ways)
    for row, number in enumerate(rounds):
        trained = TrainedRun(path, config.resources, after=number)
        process = trained.objective.process
        for column, (info, task) in enumerate(zip(trained.tasks, tasks, strict=True)):
            denoiser = trained.denoiser(info)
            test = to_model_range(task.test[:images]).to(trained.device)
            for which, way in enumerate(ways):
                began = time.process_time()
                found = ssim_of_reconstructions(
                    denoiser,
                    process,
                    test,
                    timesteps,
                    steps=way if isinstance(way, int) else None,
                    variance=config.sampling.variance,
                    batch_size=config.sampling.images_at_once(*test.shape[-2:]),
                    seed=config.seed + (way == AGAIN),
                    task=info.client,
                )
                seconds[which] += time.process_time() - began
                curves[which][row, column] = list(found.values())
    return curves, seconds


def _rank_correlation(ours: Curves, theirs: Curves) -> float:
    """Over the owners, mean over the checkpoints."""
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(ours, theirs, strict=True)]))


def _alike(ours: Curves, theirs: Curves) -> float:
    """The share of pairs of checkpoints that both put in the same order."""
    pairs = list(itertools.combinations(range(len(ours)), 2))
    if not pairs:
        return float("nan")
    signs = [np.sign(ours[a] - ours[b]) == np.sign(theirs[a] - theirs[b]) for a, b in pairs]
    return float(np.mean(signs))


if __name__ == "__main__":
    main()

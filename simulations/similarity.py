"""Do exclusive layers tell which tasks are alike? ``python -m simulations.similarity --run RUN``.

Three matrices over the tasks of a run, as tables (CSV) and heat maps:

1. the distance between θ_i and θ_j, relative to how far a θ has moved from the common
   initialisation on average; for all exclusive layers together and for each group of modules (stem,
   down, up, head);
2. the Fréchet distance between samples through θ_i and the test images of task j;
3. the share of the samples through θ_i that a classifier trained on real images (3 nearest
   neighbours) gives to j.

Then the rank correlation between 1 and the Fréchet distances of the real images, over all pairs of
tasks.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from tqdm import tqdm

from srfed.commands.options import Parser
from srfed.config import load_config
from srfed.data import Task, load_tasks
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.features.network import FeatureNetwork
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images, judged_as
from srfed.files import write_bytes
from srfed.interrupts import run_command
from srfed.reporting.plots import heat_map
from srfed.runs.run import TrainedRun

ALL = "all"
PERMUTATIONS = 9_999
LEAST_TASKS = 3
Matrix = NDArray[np.float64]


class Correlation(NamedTuple):
    """Spearman's ρ over n pairs of tasks, and how often tasks in random order give at least as
    much.
    """

    rho: float
    pairs: int
    p_value: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m simulations.similarity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples of each task (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: <RUN>/similarity")
    options = parser.parse_args(arguments)
    return run_command(lambda: _similarity(options))


def layer_distances(
    exclusive: Sequence[Mapping[str, Tensor]], initial: Mapping[str, Tensor]
) -> dict[str, Matrix]:
    """Distances between the exclusive layers of tasks.

    Args:
        exclusive: θ_i of each of K tasks.
        initial: θ_0, the initialisation that they have in common.

    Returns:
        For :data:`ALL` and for each outermost module, in the model's order, float64 K x K: ‖θ_i -
        θ_j‖ / mean_k ‖θ_k - θ_0‖ over the tensors concerned. Two tasks that moved alike have 0; two
        that moved equally far, at right angles, 1.41. NaN where no task has moved.
    """
    groups = {ALL: list(initial)}
    for name in initial:
        groups.setdefault(name.split(".")[0], []).append(name)
    distances = {}
    for group, names in groups.items():
        moved = torch.stack(
            [
                torch.cat(
                    [(theta[name].double() - initial[name].double()).flatten() for name in names]
                )
                for theta in exclusive
            ]
        )
        usual = moved.norm(dim=1).mean()
        # One pair after the other: cdist's fast path takes differences of squares, which cancel.
        rows = [torch.stack([(one - other).norm() for other in moved]) / usual for one in moved]
        distances[group] = torch.stack(rows).numpy()
    return distances


def distances_to_real(
    samples: Mapping[str, Images], tasks: Sequence[Task], network: FeatureNetwork
) -> Matrix:
    """float64 K x K: Fréchet distances of the samples of task i to the test images of task j."""
    generated = [FeatureStatistics.of(network(samples[task.name])) for task in tasks]
    real = [FeatureStatistics.of(network(task.test)) for task in tasks]
    return np.array([[frechet_distance(one, other) for other in real] for one in generated])


def distances_of_real(tasks: Sequence[Task], network: FeatureNetwork) -> Matrix:
    """float64 K x K: Fréchet distances between all real images of task i and of task j."""
    real = [
        FeatureStatistics.of(network(np.concatenate([task.train, task.test]))) for task in tasks
    ]
    return np.array([[frechet_distance(one, other) for other in real] for one in real])


def correlate(first: Matrix, second: Matrix) -> Correlation:
    """Spearman's correlation of two matrices of distances over all pairs of tasks, with Mantel's
    test.

    Pairs that share a task are not independent, so the usual p-value would be too small. Mantel
    (1967) permutes the tasks of one matrix; the share of :data:`PERMUTATIONS` seeded permutations,
    and the given order, that correlate at least as much is the p-value (one-sided).

    Args:
        first, second: K x K, symmetric, K at least 3; the diagonals do not count.

    Raises:
        UserError: there are fewer than three tasks.
    """
    count = len(first)
    if count < LEAST_TASKS:
        raise UserError(
            f"a correlation needs at least {LEAST_TASKS} tasks, and the run has {count}"
        )
    above = np.triu_indices(count, 1)
    rho = float(spearmanr(first[above], second[above]).statistic)
    ranks = np.zeros_like(second)
    ranks[above] = rankdata(second[above])
    ranks += ranks.T
    own = rankdata(first[above])
    random = np.random.default_rng(0)
    given = np.corrcoef(own, ranks[above])[0, 1]
    reached = 1
    for _ in range(PERMUTATIONS):
        order = random.permutation(count)
        reached += int(np.corrcoef(own, ranks[np.ix_(order, order)][above])[0, 1] >= given - 1e-12)
    return Correlation(rho, len(above[0]), reached / (PERMUTATIONS + 1))


def _similarity(options: argparse.Namespace) -> None:
    if options.samples < 2:
        raise UserError(f"--samples {options.samples} is impossible; allowed: 2 or more")
    run = TrainedRun(
        options.run, load_config(None, [f"resources.device={options.device}"]).resources
    )
    if not run.partition.exclusive:
        raise UserError(
            f"{options.run} has no exclusive layers: its model.exclusive_stages is none"
        )
    torch.set_num_threads(run.config.resources.client_cpus)
    tasks = load_tasks(run.config.data, run.config.federation.clients)
    infos = [run.find_task(task.name) for task in tasks]
    evaluation = run.config.evaluation
    network = load_feature_network(
        evaluation.feature_network, evaluation.inception_weights, run.device
    )
    distances = layer_distances(
        [run.exclusive_of(info) for info in infos], run.initial_exclusive_of(infos[0])
    )
    samples = {
        info.task: generate(
            run.denoiser(info),
            run.objective.process,
            run.config.sampling,
            count=options.samples,
            shape=run.shape_of(info),
            seed=options.seed,
            task=info.client,
        ).images
        for info in tqdm(infos, desc="sampling", unit="task", disable=None, leave=False)
    }
    to_real = distances_to_real(samples, tasks, network)
    shares = judged_as(tasks, samples)
    judged = np.array([[shares[one.name][other.name] for other in tasks] for one in tasks])
    real = distances_of_real(tasks, network)

    out = options.out or options.run / "similarity"
    names = [task.name for task in tasks]
    for group, matrix in distances.items():
        title = "Distance of exclusive layers" + ("" if group == ALL else f": {group}")
        _keep(out / f"layers-{group}", matrix, names, title, "task j", "task i")
    score = network.score_name
    _keep(
        out / "frechet",
        to_real,
        names,
        f"{score}: samples to held-out images",
        "images of",
        "samples through θ of",
    )
    _keep(
        out / "judged",
        judged,
        names,
        "Share of samples judged to be of a task",
        "judged as",
        "samples through θ of",
    )
    _keep(
        out / "real", real, names, f"{score}: real images to real images", "images of", "images of"
    )
    text = describe(distances, to_real, judged, real, score, accuracy_on_real_images(tasks))
    text += (
        f"{score}: features {network.sha256[:8]}; {options.samples} samples a task, seed "
        f"{options.seed}; after round {run.round}\n"
    )
    write_bytes(out / "similarity.txt", text.encode())
    print(text)
    print(f"matrices and heat maps: {out}")


def describe(
    distances: Mapping[str, Matrix],
    to_real: Matrix,
    judged: Matrix,
    real: Matrix,
    score: str,
    accuracy: float,
) -> str:
    """What the matrices say, in lines."""
    count = len(to_real)
    nearest = int((to_real.argmin(axis=1) == np.arange(count)).sum())
    lines = [
        f"samples through θ_i are nearest ({score}) to the test images of task i for {nearest} of "
        f"{count} tasks",
        f"the judge gives {np.diag(judged).mean():.3f} of the samples to their own task (it is "
        f"right on {accuracy:.3f} of held-out real images)",
        "",
        f"distance of θ_i and θ_j against {score} of the real images of i and j, Spearman's ρ over "
        "pairs of tasks:",
    ]
    for group, matrix in distances.items():
        found = correlate(matrix, real)
        lines.append(
            f"  {group:<12} ρ = {found.rho:+.3f}  (n = {found.pairs} pairs, Mantel's p = "
            f"{found.p_value:.4f})"
        )
    found = correlate((to_real + to_real.T) / 2, real)
    lines.append(
        f"  {'samples':<12} ρ = {found.rho:+.3f}  (n = {found.pairs} pairs, Mantel's p = "
        f"{found.p_value:.4f}; {score} of samples to test images, mean of both directions)"
    )
    return "\n".join(lines) + "\n"


def _keep(
    path: Path, matrix: Matrix, names: Sequence[str], title: str, x_label: str, y_label: str
) -> None:
    """The matrix as a table and as a picture."""
    lines = [",".join(["", *names])]
    lines += [
        ",".join([name, *map(repr, row)]) for name, row in zip(names, matrix.tolist(), strict=True)
    ]
    write_bytes(path.with_suffix(".csv"), ("\n".join(lines) + "\n").encode())
    heat_map(
        path.with_suffix(".png"),
        matrix,
        names,
        names,
        title=title,
        x_label=x_label,
        y_label=y_label,
    )


if __name__ == "__main__":
    raise SystemExit(main())

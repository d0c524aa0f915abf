"""Do the samples belong to their tasks? ``python -m simulations.class_agreement --run RUN``.

The judge is srfed.evaluation.metrics.nearest_neighbour's. Its own accuracy on held-out real
images is printed first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srfed.commands.options import Parser
from srfed.config import ResourcesConfig
from srfed.data import load_tasks
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images, class_agreement
from srfed.interrupts import run_command
from srfed.runs.run import TrainedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--n", type=int, default=100, help="samples of each task (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return run_command(lambda: _judge(options))


def _judge(options: argparse.Namespace) -> None:
    run = TrainedRun(options.run, ResourcesConfig())
    tasks = load_tasks(run.config.data, run.config.federation.clients)
    print(f"the judge on held-out real images: {accuracy_on_real_images(tasks):.3f}")
    samples = {
        info.task: generate(
            run.denoiser(info),
            run.objective.process,
            run.config.sampling,
            count=options.n,
            shape=run.shape_of(info),
            seed=options.seed,
            task=info.client,
        ).images
        for info in run.tasks
    }
    agreement = class_agreement(tasks, samples)
    for name, share in agreement.items():
        print(f"{name:<20} {share:.2f}")
    print(
        f"{'all tasks':<20} {np.mean(list(agreement.values())):.3f}  ({options.n} samples each, "
        f"seed {options.seed})"
    )


if __name__ == "__main__":
    raise SystemExit(main())

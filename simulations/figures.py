"""The pictures of the paper's Figures 2 to 6, of any run: ``python -m simulations.figures --run RUN
--figure 2``.

Figure 2 is the reverse process: each row one sample, by the ancestral sampler (Algorithm 2), at t =
T, 9T/10, ..., 0. Figures 3 and 4 are samples of an unconditional DDPM, 5 and 6 of SR-DDPM, one task
a row: what ``samples`` draws of the run that it is given, by the run's own sampler. Local,
federated and centralised runs have the same folders.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from srfed.commands.options import Parser
from srfed.config import load_config
from srfed.config.evaluation import strip_timesteps
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.generation import generate
from srfed.interrupts import run_command
from srfed.reporting.pictures import draw_grid, write_png
from srfed.runs.run import TrainedRun

STRIPS = 10
"""Samples in Figure 2."""
STATES = 11
"""Pictures of each, x_T to x_0: every 50 of 500 timesteps, as in the paper."""
SAMPLES = 20
"""Samples of each task in Figures 3 to 6."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m simulations.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--figure", choices=("2", "samples"), required=True, help="which picture")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same picture (default 0)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: figure-<figure>.png")
    options = parser.parse_args(arguments)
    return run_command(lambda: _draw(options))


def reverse_process(run: TrainedRun, seed: int) -> dict[str, Images]:
    """Ten samples on their way from noise: one of each of the first ten tasks, or several where
    there are fewer.

    Args:
        run: the run.
        seed: of the first sample of a task; the second has the next one, and so on.

    Returns:
        uint8 11 x H x W x C by label, x_t at t = T first, rounded to the nearest of T's tenths.
    """
    sampling = run.config.sampling.model_copy(update={"sampler": "ancestral", "batch_size": 1})
    rows = {}
    for number in tqdm(range(STRIPS), unit="sample", disable=None, leave=False):
        again, place = divmod(number, len(run.tasks))
        task = run.tasks[place]
        rows[task.task if again == 0 else f"{task.task} ({again + 1})"] = generate(
            run.denoiser(task),
            run.objective.process,
            sampling,
            count=1,
            shape=run.shape_of(task),
            seed=seed + again,
            task=task.client,
            strip_steps=STATES,
        ).strip
    return rows


def samples(run: TrainedRun, seed: int) -> dict[str, Images]:
    """Twenty samples of each task, uint8 20 x H x W x C by name, by the run's own sampler."""
    return {
        task.task: generate(
            run.denoiser(task),
            run.objective.process,
            run.config.sampling,
            count=SAMPLES,
            shape=run.shape_of(task),
            seed=seed,
            task=task.client,
        ).images
        for task in tqdm(run.tasks, unit="task", disable=None, leave=False)
    }


def _draw(options: argparse.Namespace) -> None:
    run = TrainedRun(
        options.run, load_config(None, [f"resources.device={options.device}"]).resources
    )
    if not run.tasks:
        raise UserError(f"{options.run} has no tasks yet")
    torch.set_num_threads(run.config.resources.client_cpus)
    out = options.out or Path(f"figure-{options.figure}.png")
    if options.figure == "2":
        timesteps = run.objective.process.timesteps
        titles = [f"t={timestep}" for timestep in strip_timesteps(timesteps, STATES)]
        write_png(out, draw_grid(reverse_process(run, options.seed), titles))
        words = f"the reverse process of {STRIPS} samples, t = {timesteps} to 0"
    else:
        write_png(out, draw_grid(samples(run, options.seed)))
        words = f"{SAMPLES} samples of each of {len(run.tasks)} tasks"
    method = run.config.training.method
    print(
        f"{words}; {run.config.name}, {method}, after round {run.round}, seed {options.seed}: {out}"
    )


if __name__ == "__main__":
    raise SystemExit(main())

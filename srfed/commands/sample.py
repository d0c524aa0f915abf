"""Sample from a trained run: ``srfed sample --run RUN --task 3 --n 64 --out
grid.png``.
"""

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srfed.commands.options import Parser, add_batch_size, add_store
from srfed.config.choices import SAMPLERS
from srfed.interrupts import run_command

SHOWN = 10
"""Most tasks that are named in a line."""

if TYPE_CHECKING:
    from srfed.reporting.pictures import Images


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed sample",
        description="Generate images through the averaged weights of a run: of its last "
        "checkpoint, or of its best round where that is its result.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN", help="the folder of a simulation's run")
    add_store(source)
    parser.add_argument(
        "--task",
        action="extend",
        nargs="+",
        metavar="TASK",
        help="names or positions of tasks; repeatable; default: every task",
    )
    parser.add_argument(
        "--n", type=int, default=64, metavar="N", help="images of each task (default 64)"
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; default: the run's"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler; default: the run's")
    parser.add_argument(
        "--eta", type=float, metavar="X", help="DDIM's noise, 0 to 1; default: the run's"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="away from what is drawn for nobody, 0 (none) to 10; default: the run's",
    )
    add_batch_size(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same images (default 0)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="where the grid goes (default samples.png)"
    )
    parser.add_argument(
        "--npz",
        type=Path,
        metavar="FILE",
        help="also write `images` (uint8 N x H x W x C) and `tasks` (the name of each image's "
        "task)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="also write each image as DIR/TASK/NUMBER.png, as torchvision's ImageFolder and srfed "
        "train read it; a new or empty folder",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _sample(options))


def _sample(options: argparse.Namespace) -> None:
    from srfed.config import load_config
    from srfed.errors import UserError
    from srfed.files import refuse_used, try_output, write_bytes
    from srfed.runs.requested import requested_sampling
    from srfed.storage.run_folder import RunFolder

    if options.n < 1:
        raise UserError(f"--n {options.n} is impossible; allowed: 1 or more")
    resources = load_config(None, [f"resources.device={options.device}"]).resources
    given = (
        options.sampler,
        options.steps,
        options.eta,
        options.guidance,
        options.batch_size,
    )
    if options.run is not None:
        requested_sampling(RunFolder.open(options.run).config, *given)
    if options.folder is not None:
        refuse_used(options.folder)
    # Importing torch takes seconds: what is wrong with the options is said before.
    import numpy as np
    import torch
    from tqdm import tqdm

    from srfed.evaluation.generation import generate
    from srfed.model import check_guidance
    from srfed.reporting.pictures import draw_grid, write_image_folder, write_png
    from srfed.runs.run import TrainedRun, TrainedSite

    out = options.out or Path("samples.png")
    for output in (out, options.npz):
        try_output(output)
    trained = (
        TrainedRun(options.run, resources)
        if options.store is None
        else TrainedSite(options.store, resources)
    )
    sampling = requested_sampling(trained.config, *given)
    check_guidance(trained.config.model_copy(update={"sampling": sampling}), trained.partition)
    torch.set_num_threads(trained.config.resources.client_cpus)
    wanted = options.task or []
    tasks = list(dict.fromkeys(map(trained.find_task, wanted))) if wanted else trained.at_hand
    images = {}
    for task in tqdm(tasks, desc="sampling", unit="task", disable=None, leave=False):
        images[task.task] = generate(
            trained.denoiser(task),
            trained.objective.process,
            sampling,
            count=options.n,
            shape=trained.shape_of(task),
            seed=options.seed,
            task=task.client,
        ).images
    write_png(out, draw_grid(_rows(images)), private=False)
    if options.folder is not None:
        write_image_folder(options.folder, images)
    print(f"{options.n} images of {_names(images)} after round {trained.round}: {out}")
    if options.npz is not None:
        buffer = io.BytesIO()
        names = [name for name, group in images.items() for _ in group]
        arrays: dict[str, Any] = {"tasks": np.array(names)}
        if len({group.shape[1:] for group in images.values()}) == 1:
            arrays |= {"images": np.concatenate(list(images.values()))}
        else:
            arrays |= {f"images_{place}": group for place, group in enumerate(images.values())}
        np.savez_compressed(buffer, **arrays)
        write_bytes(options.npz, buffer.getvalue(), private=False)
        print(f"as numbers: {options.npz}")
    if options.folder is not None:
        print(f"as files: {options.folder}")


def _names(images: "Mapping[str, Images]") -> str:
    """Whose they are.

    >>> _names({"north": None})
    'task north'
    """
    names = [*images]
    if len(names) == 1:
        return f"task {names[0]}"
    shown = ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])
    return f"each of {len(names)} tasks ({shown})"


def _rows(images: "Mapping[str, Images]") -> "Mapping[str, Images]":
    """One row a task; a single task's images in rows of about a square, labelled with their
    numbers.
    """
    if len(images) > 1:
        return images
    ((name, group),) = images.items()
    columns = math.isqrt(len(group) - 1) + 1
    return {
        f"{name}  {first}": group[first : first + columns]
        for first in range(0, len(group), columns)
    }

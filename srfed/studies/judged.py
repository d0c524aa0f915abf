"""A run whose networks are judged at their best rounds, in a process of its own;
srfed/studies/joining.py starts it.

``python -m srfed.studies.judged FOLDER < asked.json`` trains, or goes on with, what is in the
folder, and keeps the best rounds (srfed/studies/best_rounds.py). At the end it leaves there

    judged.json             what these score on the test images
    judged.safetensors      their samples

The test images are looked at once, when every choice has been made.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from srfed.api import train_run
from srfed.config import RunConfig, parse_config
from srfed.data import Task, load_recorded_tasks
from srfed.data.images import Images
from srfed.device import resolve_device
from srfed.diffusion.process import Denoiser, Process
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.features.network import FeatureNetwork
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import generate
from srfed.evaluation.metrics.denoising_loss import denoising_losses, loss_by_band, mean_loss
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.evaluation.metrics.kernel import kernel_distance
from srfed.evaluation.metrics.memorisation import audit
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images, judged_as
from srfed.evaluation.task import ssim_curve
from srfed.files import write_json
from srfed.interrupts import run_command
from srfed.model import (
    build_model,
    build_objective,
    build_partition,
    captured_forwards,
    denoiser_of_task,
)
from srfed.observer import Observer
from srfed.records import RoundRecord
from srfed.reporting.curves import shown_on_terminal
from srfed.reporting.summary import totals
from srfed.runs.checks import check_training, finished
from srfed.storage.checkpoint import read_arrays, write_arrays
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.studies.best_rounds import (
    BestRounds,
    best_file,
    best_rounds,
    groups_of,
    has_passed,
    read_history,
)
from srfed.studies.owners import kind_of, kinds_of
from srfed.training.part import load_tensors

OUTCOME_FILE, SAMPLES_FILE = "judged.json", "judged.safetensors"
TEST_NOISE = 0
"""A seed: the noise is the same for every run, whatever its own seed."""
SSIM_IMAGES = 8


@dataclass(frozen=True)
class Judging:
    """How a run is judged.

    Attributes:
        every: rounds between two looks at the validation images; the last round has one too.
        apart: each task has a best round of its own, as a network of its own has; otherwise the
            mean over tasks decides for all.
        samples: generated images of each task, at least 2.
        test_images: test images of each task, the first, at least 2; fewer where there are no more.
        patience: training ends where no network has been better for as many rounds; 0: never.
    """

    every: int
    apart: bool
    samples: int
    test_images: int
    patience: int = 0


def judge(run: RunFolder, tasks: Sequence[Task], judging: Judging) -> dict[str, Any]:
    """Score the best networks of a finished run on the test images.

    Args:
        run: the run, with the history and the weights that :class:`BestRounds` keeps.
        tasks: its tasks.
        judging: how.

    Returns:
        Plain values: of each owner its best round, its losses by image and moment and all its
        scores; of the run its history, the bytes of its messages and its core-seconds.

    Raises:
        UserError: what was kept is damaged or missing, or there are too few images for a score.
    """
    config, history = run.config, read_history(run)
    groups = groups_of(tasks, apart=judging.apart)
    best = best_rounds(history, groups)
    group_of = {member: group for group, members in groups.items() for member in members}
    torch.set_num_threads(config.resources.client_cpus)
    device = resolve_device(config.resources)
    objective = build_objective(config, device)
    network = build_model(config, tasks[0].shape[-1])
    partition = build_partition(config, network)
    network.to(device).eval()
    forwards = captured_forwards(network, config.resources, device)
    features = load_feature_network(
        config.evaluation.feature_network, config.evaluation.inception_weights, device
    )
    judged, samples, owners = [], {}, {}
    for place, task in enumerate(tasks):
        arrays, about = read_arrays(best_file(run, group_of[task.name]))
        if about["round"] != str(best[group_of[task.name]]):
            raise UserError(
                f"{best_file(run, group_of[task.name])} is of round {about['round']}, and the "
                f"history's best is {best[group_of[task.name]]}; remove {run.path}"
            )
        names = [("shared", name) for name in partition.shared]
        names += [(task.name, name) for name in partition.exclusive]
        load_tensors(
            network, {name: torch.from_numpy(arrays[f"{part}:{name}"]) for part, name in names}
        )
        shown = Task(
            task.name, task.train, task.test[: judging.test_images], task.index, task.validation
        )
        samples[task.name], owners[task.name] = scores_of(
            denoiser_of_task(objective, network, place, forwards),
            objective.process,
            config,
            shown,
            features,
            judging.samples,
        )
        number = best[group_of[task.name]]
        owners[task.name] |= {"round": number, "validation": history[number][task.name]}
        judged.append(shown)
    write_arrays(run.path / SAMPLES_FILE, samples)
    kinds = kinds_of(judged)
    for name, share in recognised(kinds, samples).items():
        owners[name]["recognised"] = share
    sums, rounds = totals(MetricsLog(run.metrics)), MetricsLog(run.metrics).rounds()
    return {
        **asdict(judging),
        "fingerprint": config.fingerprint(),
        "seed": config.seed,
        "images_per_owner": mean(len(task.train) for task in tasks),
        "owners": owners,
        "recognised_real": accuracy_on_real_images(kinds),
        "score_name": features.score_name,
        "history": {str(n): mean(losses.values()) for n, losses in sorted(history.items())},
        "asked_rounds": config.federation.rounds,
        "rounds": sums.rounds,
        "bytes": sum(line["bytes_up"] + line["bytes_down"] for line in rounds),
        "core_seconds": sums.training_seconds * config.resources.client_cpus,
        "parameters": {
            part: sum(network.state_dict()[name].numel() for name in names)
            for part, names in (("shared", partition.shared), ("exclusive", partition.exclusive))
        },
    }


def recognised(kinds: Sequence[Task], samples: Mapping[str, Images]) -> dict[str, float]:
    """The share of each owner's samples, uint8 N x H x W x C, that real images give to its kind."""
    return {name: shares[kind_of(name)] for name, shares in judged_as(kinds, samples).items()}


def scores_of(
    denoiser: Denoiser,
    process: Process,
    config: RunConfig,
    task: Task,
    network: FeatureNetwork,
    count: int,
) -> tuple[Images, dict[str, Any]]:
    """An owner's samples, and its scores on its test images.

    Args:
        denoiser: E[x_0 | x_t] of its model, in evaluation mode.
        process: the forward process.
        config: of the run.
        task: the owner's images, at least 2 test images.
        network: the feature network.
        count: samples, at least 2.

    Raises:
        UserError: there are too few images for a score.
    """
    losses = denoising_losses(denoiser, process, task.test, task=task.name, seed=TEST_NOISE)
    samples = generate(
        denoiser, process, config.sampling, count=count, shape=task.shape, seed=0, task=task.name
    ).images
    own, real = network(samples), network(task.test)
    distance = kernel_distance(own, real, seed=0)
    timestep = config.evaluation.ssim_timestep
    ssim = ssim_curve(
        denoiser,
        process,
        config.model_copy(update={"seed": TEST_NOISE}),
        task=task.name,
        images=task.test[:SSIM_IMAGES],
        timesteps=[timestep],
        # As in the tables on record.
        steps=None,
    )
    return samples, {
        "losses": losses.tolist(),
        "loss": mean_loss(losses),
        **loss_by_band(losses),
        "copies": _copies(samples, task, network),
        "frechet": frechet_distance(FeatureStatistics.of(own), FeatureStatistics.of(real)),
        "kernel": distance.mean,
        "ssim": ssim[timestep],
    }


def _copies(samples: Images, task: Task, network: FeatureNetwork) -> float | None:
    """How far samples are from the training images, over how far images are that nobody trained
    on; None where all of these are training images too.
    """
    held_out = np.concatenate([task.test, task.validation])
    try:
        pixels = audit(samples, task.train, held_out, network).pixels
    except UserError:
        return None
    if not pixels.held_out_to_training:
        return None
    return pixels.generated_to_training / pixels.held_out_to_training


class PassedError(Exception):
    """The best rounds are past."""


class _Patience(Observer):
    """Ends a run whose best rounds are past."""

    def __init__(
        self, run: RunFolder, groups: Mapping[str, Sequence[str]], judging: Judging
    ) -> None:
        self._run, self._groups, self._judging = run, groups, judging

    def on_round(self, record: RoundRecord) -> None:
        if has_passed(read_history(self._run), self._groups, self._judging.patience):
            raise PassedError


def main() -> int:
    """The command; returns its exit code."""
    return run_command(lambda: _do(Path(sys.argv[1]), json.load(sys.stdin)))


def _do(folder: Path, asked: dict[str, Any]) -> None:
    config, judging = parse_config(asked["config"], "the study"), Judging(**asked["judging"])
    train_judged(folder, config, judging)


def train_judged(
    folder: Path, config: RunConfig, judging: Judging, observers: Sequence[Observer] = ()
) -> dict[str, Any]:
    """Train, or go on with, a run; judge it, and leave what :func:`judge` found in its folder.

    Raises:
        UserError: the run cannot be begun or finished, or the folder is another's; and whatever an
            observer raises.
    """
    if (folder / "run.json").exists():
        run = RunFolder.open(folder).reconfigure(config)
    else:
        check_training(config)
        run = RunFolder.create(folder, config)
    tasks = load_recorded_tasks(config.data, config.federation.clients, run.images)
    groups = groups_of(tasks, apart=judging.apart)
    if not finished(run) and not has_passed(read_history(run), groups, judging.patience):
        best = BestRounds(run, tasks, judging.every, apart=judging.apart)
        with suppress(PassedError):
            train_run(
                run, [best, *shown_on_terminal(run), *observers, _Patience(run, groups, judging)]
            )
    outcome = judge(run, tasks, judging)
    write_json(folder / OUTCOME_FILE, outcome)
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())

"""A new owner fitted and judged, in a process of its own; srfed/studies/new_owner.py starts it.

``python -m srfed.studies.adapted FOLDER < asked.json`` leaves in the folder

    adapted.json            its best step, what that scores on the test images, and what it cost
    adapted.safetensors     its samples
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srfed.config import RunConfig, parse_config
from srfed.data import load_tasks
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.metrics.denoising_loss import denoising_losses, mean_loss
from srfed.evaluation.metrics.nearest_neighbour import accuracy_on_real_images
from srfed.files import write_json
from srfed.interrupts import run_command
from srfed.model import build_model, build_objective, captured_forwards, denoiser_of_task
from srfed.networks.partition import Shared
from srfed.storage.checkpoint import read_arrays, write_arrays
from srfed.storage.run_folder import RunFolder
from srfed.studies.best_rounds import TOGETHER, VALIDATION_NOISE, best_file
from srfed.studies.judged import recognised, scores_of
from srfed.studies.new_owner import ADAPTED_FILE, SAMPLES_FILE, Adapting
from srfed.studies.owners import kinds_of
from srfed.training.adaptation import Adapted, Mode, adapt
from srfed.training.part import load_tensors


def adapt_and_judge(
    folder: Path,
    config: RunConfig,
    core: Path | None,
    everybody: RunConfig,
    owner: int,
    mode: Mode,
    adapting: Adapting,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Fit a new owner, choose the best step, score that on the test images, and leave what was
    found in the folder.

    Args:
        folder: where it is left.
        config: of the run whose core, or network, is taken.
        core: the run's folder, with what :class:`~srfed.studies.best_rounds.BestRounds` keeps; None
            where nothing is taken over.
        everybody: the settings of all owners' images; a judge who knows them all says whose a
            sample is.
        owner: the new one's position among them.
        mode: what moves.
        adapting: how it is fitted and judged.
        identity: what the figures are of, kept beside them.

    Returns:
        Plain values: the best step, the losses by image and moment and all scores there, the
        validation loss by step, core-seconds, the bytes that had to travel, the values that were
        trained.

    Raises:
        UserError: the core is missing or damaged, the images cannot be read or are too few, or the
            validation loss was never finite.
    """
    torch.set_num_threads(config.resources.client_cpus)
    tasks = [
        replace(task, test=task.test[: adapting.test_images])
        for task in load_tasks(everybody.data, everybody.federation.clients)
    ]
    task = replace(tasks[owner], train=tasks[owner].train[: adapting.images])
    if len(task.train) < adapting.images:
        raise UserError(
            f"{task.name} has {len(task.train)} training images, and {adapting.images} are asked "
            f"for; allowed: 2 to {len(task.train)}"
        )
    round_number, shared = (0, Shared({})) if core is None else _core(core)
    device = resolve_device(config.resources)
    network = build_model(config, task.shape[-1]).to(device).eval()
    objective = build_objective(config, device)
    forwards = captured_forwards(network, config.resources, device)
    denoiser = denoiser_of_task(objective, network, None, forwards)
    best: Adapted | None = None
    history: dict[int, float] = {}
    # Of the process, as several share the machine's cores.
    seconds, begin = {}, time.process_time()
    for adapted in adapt(
        config,
        shared,
        task.train,
        task=task.name,
        mode=mode,
        steps=adapting.steps,
        every=adapting.between,
    ):
        load_tensors(network, adapted.shared, adapted.exclusive)
        loss = mean_loss(
            denoising_losses(
                denoiser,
                objective.process,
                task.validation,
                task=task.name,
                seed=VALIDATION_NOISE,
            )
        )
        if math.isfinite(loss) and loss < min(history.values(), default=math.inf):
            best = adapted
        history[adapted.steps] = loss if math.isfinite(loss) else math.inf
        seconds[adapted.steps] = time.process_time() - begin
        if best and 0 < adapting.patience <= adapted.steps - best.steps:
            break
    if best is None:
        raise UserError(
            f"the validation loss of {task.name} was finite at no step; lower the learning rate"
        )
    load_tensors(network, best.shared, best.exclusive)
    evaluation = config.evaluation
    features = load_feature_network(
        evaluation.feature_network, evaluation.inception_weights, device
    )
    samples, scores = scores_of(
        denoiser, objective.process, config, task, features, adapting.samples
    )
    write_arrays(folder / SAMPLES_FILE, {task.name: samples})
    kinds = kinds_of(tasks)
    sizes = [sum(t.numel() for t in part.values()) for part in (best.exclusive, best.shared)]
    outcome = {
        **identity,
        "fingerprint": config.fingerprint(),
        "seed": config.seed,
        "core_round": round_number,
        "validation_images": len(task.validation),
        "judged_on": len(task.test),
        "step": best.steps,
        "steps_taken": max(history),
        "validation": history[best.steps],
        "history": {str(step): loss for step, loss in history.items()},
        **scores,
        "recognised": recognised(kinds, {task.name: samples})[task.name],
        "recognised_real": accuracy_on_real_images(kinds),
        "score_name": features.score_name,
        "core_seconds": seconds[max(seconds)],
        "core_seconds_to_best": seconds[best.steps],
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in shared.values()),
        "trained_values": sizes[0] if mode == "frozen" else sum(sizes),
        "values": sum(sizes),
    }
    write_json(folder / ADAPTED_FILE, outcome)
    return outcome


def _core(folder: Path) -> tuple[int, Shared]:
    """The number of a run's best round, and its averaged φ."""
    arrays, about = read_arrays(best_file(RunFolder.open(folder), TOGETHER))
    return int(about["round"]), Shared(
        {
            name.removeprefix("shared:"): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith("shared:")
        }
    )


def main() -> int:
    """The command; returns its exit code."""
    return run_command(lambda: _do(Path(sys.argv[1]), json.load(sys.stdin)))


def _do(folder: Path, asked: dict[str, Any]) -> None:
    adapt_and_judge(
        folder,
        parse_config(asked["config"], "the study"),
        None if asked["core"] is None else Path(asked["core"]),
        parse_config(asked["everybody"], "the study"),
        asked["owner"],
        asked["mode"],
        Adapting(**asked["adapting"]),
        asked["identity"],
    )


if __name__ == "__main__":
    raise SystemExit(main())

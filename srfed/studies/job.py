"""One run of a study, in a process of its own; srfed/studies/cases.py starts it.

``python -m srfed.studies.job FOLDER SAMPLES SSIM_IMAGES REFERENCES < config.json`` trains, or
goes on with, what is in the folder; scores it; leaves ``outcome.json`` there.
"""

import sys
from pathlib import Path

from srfed.api import train_run
from srfed.config import parse_config_json
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.files import write_json
from srfed.interrupts import run_command
from srfed.reporting.curves import shown_on_terminal
from srfed.runs.checks import check_training, finished
from srfed.runs.run import TrainedRun
from srfed.runs.scoring import evaluate_run
from srfed.storage.run_folder import RunFolder
from srfed.studies.cases import scoring_settings


def main() -> int:
    """The command; returns its exit code."""
    folder, samples, ssim_images, references = sys.argv[1:]
    return run_command(lambda: _do(Path(folder), int(samples), int(ssim_images), Path(references)))


def _do(folder: Path, samples: int, ssim_images: int, references: Path) -> None:
    config = parse_config_json(sys.stdin.read())
    if (folder / "run.json").exists():
        run = RunFolder.open(folder).reconfigure(config)
    else:
        check_training(config)
        run = RunFolder.create(folder, config)
    if not finished(run):
        _train(run)
    trained = TrainedRun(folder, config.resources)
    if trained.round > config.federation.rounds:
        raise UserError(
            f"{folder} has round {trained.round} already, and {config.federation.rounds} are asked "
            "for; name another folder with --pool"
        )
    evaluation = config.evaluation
    network = load_feature_network(
        evaluation.feature_network, evaluation.inception_weights, trained.device
    )
    record = evaluate_run(
        folder,
        trained,
        scoring_settings(config, samples, ssim_images),
        network,
        reference_folder=references,
    )
    write_json(folder / "outcome.json", record)


def _train(run: RunFolder) -> None:
    shown = shown_on_terminal(run)
    if run.config.training.method != "federated":
        train_run(run, shown)
        return
    # A study has several such processes side by side; Ray would take all cores for each.
    from srfed.federation.flower.in_process import run_in_process

    run_in_process(run, shown)


if __name__ == "__main__":
    raise SystemExit(main())

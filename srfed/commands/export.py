"""Take a model out: ``srfed export RUN --task 3 --out threes`` writes a folder for diffusers."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from srfed.commands.options import Parser, add_store
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed export",
        description="Write one task's model, the averaged φ with its own averaged θ, as a folder "
        "that diffusers' DiffusionPipeline opens: safetensors weights, the scheduler, the "
        "network's code, a model card with the run's scores. Whoever has it can draw images like "
        "the owner's. diffusers need not be installed here.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="the folder of a simulation's run"
    )
    add_store(source)
    parser.add_argument(
        "--task", metavar="TASK", help="the task's name or position; of a run with one task that"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder; new or empty"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    from srfed.config import load_config
    from srfed.files import refuse_used
    from srfed.storage.run_folder import RunFolder

    refuse_used(options.out)
    run = None if options.run is None else RunFolder.open(options.run)
    # Importing torch takes seconds: what is wrong with the options is said before.
    from srfed.errors import UserError
    from srfed.reporting.model_card import call_in_words
    from srfed.runs.export import export_pipeline
    from srfed.runs.run import TrainedRun, TrainedSite

    resources = load_config(None, ["resources.device=cpu"]).resources
    trained = (
        TrainedSite(options.store, resources) if run is None else TrainedRun(run.path, resources)
    )
    if options.task is None and len(trained.at_hand) != 1:
        raise UserError(
            "--task is missing: a pipeline is one task's; allowed: "
            f"{', '.join(task.task for task in trained.tasks)}"
        )
    task = trained.at_hand[0] if options.task is None else trained.find_task(options.task)
    export_pipeline(trained, task, options.out, run)
    print(f"the model of {task.task} after round {trained.round}: {options.out}")
    held = f"φ and θ of {task.task}, and no other task's θ" if trained.partition.exclusive else "φ"
    print(f"it holds {held}; README.md is its card")
    print(
        f'DiffusionPipeline.from_pretrained("{options.out}", trust_remote_code=True)'
        f"({call_in_words(trained.config)})"
    )

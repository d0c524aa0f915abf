"""Train with all tasks' images in one place: ``python -m srfed.centralise --set
training.method=balanced``.

The baselines that a federation is compared with; run folder, reports and scores are a federation's.
"""

from collections.abc import Sequence
from pathlib import Path

from srfed.command import run_command
from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.storage.run_folder import RunFolder
from srfed.train_command import check_training, train_by_command, training_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = training_parser(
        "srfed.centralise",
        "Train a baseline with all tasks' images in one place: DDPM, C-DDPM, or SR-DDPM as in the "
        "paper.",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: train_by_command("srfed.centralise", options, {}, _check, _run))


def _check(
    config: RunConfig, record: Path | None = None, *, allow_changed_images: bool = False
) -> None:
    if config.training.method == "federated":
        raise UserError(
            "training.method = federated is for python -m srfed.simulate; allowed here: pooled, "
            "one_task, balanced"
        )
    check_training(config, record, allow_changed_images=allow_changed_images)


def _run(run: RunFolder) -> None:
    from srfed.runs.centralised import train_centrally

    train_centrally(run)


if __name__ == "__main__":
    raise SystemExit(main())

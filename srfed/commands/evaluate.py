"""Score a trained run again: ``srfed evaluate --run RUN --samples 10000``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srfed.commands.options import Parser, add_batch_size
from srfed.config.choices import SAMPLERS
from srfed.interrupts import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed evaluate",
        description="Sample a simulated or centralised run, its last checkpoint or its best round "
        "where that is its result, and score the samples in every way there is. Each number is "
        "printed with what it depends on. A second call reads what the first has left.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--samples", type=int, default=10_000, metavar="N", help="of all tasks together (10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument(
        "--network", metavar="NAME", help="embedded or inception; default: the run's"
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="default: the run's, or the official ones"
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
        "--ssim-images", type=int, metavar="N", help="test images of each task; default: the run's"
    )
    parser.add_argument(
        "--ssim-steps",
        metavar="N",
        help="of DDIM, in which SSIM-rec takes them back; all: those of Algorithm 2; default: the "
        "run's",
    )
    parser.add_argument(
        "--quantile",
        type=float,
        default=0.05,
        metavar="Q",
        help="of the memorisation audit, 0 to 0.5 (0.05)",
    )
    parser.add_argument(
        "--references", type=Path, metavar="DIR", help="keep statistics of real images here"
    )
    parser.add_argument(
        "--allow-changed-images",
        action="store_true",
        help="score against the images that are there, although they are not those that the run "
        "was begun with",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    from srfed.config import load_config, parse_config
    from srfed.errors import UserError
    from srfed.runs.requested import requested_sampling
    from srfed.storage.run_folder import RunFolder

    if not 0 < options.quantile < 0.5:
        raise UserError(
            f"--quantile {options.quantile} is impossible; allowed: above 0 and below 0.5"
        )
    resources = load_config(None, [f"resources.device={options.device}"]).resources
    own = RunFolder.open(options.run).config
    given = {
        "samples": options.samples,
        "feature_network": options.network,
        "inception_weights": options.inception_weights,
        "ssim_images": options.ssim_images,
    }
    content = own.model_dump(mode="json")
    content["evaluation"] |= {key: value for key, value in given.items() if value is not None}
    if options.ssim_steps is not None:
        content["evaluation"]["ssim_steps"] = _steps(options.ssim_steps)
    content["sampling"] = requested_sampling(
        own, options.sampler, options.steps, options.eta, options.guidance, options.batch_size
    ).model_dump(mode="json")
    config = parse_config(content, "the command line").with_absolute_paths()
    evaluation = config.evaluation
    if options.inception_weights is not None and evaluation.feature_network != "inception":
        raise UserError(
            f"--inception-weights {options.inception_weights} would be ignored: the feature "
            f"network is {evaluation.feature_network}; leave it out, or name --network inception"
        )
    # Importing torch takes seconds: what is wrong with the options is said before.
    from tqdm import tqdm

    from srfed.evaluation.features.load import load_feature_network
    from srfed.model import check_guidance
    from srfed.runs.run import TrainedRun
    from srfed.runs.scoring import ScoringSettings, evaluate_run

    if not RunFolder.open(options.run).images.exists():
        _note(
            "the run has no record of its images, so nobody can tell whether it was begun with "
            "those that are there"
        )
    trained = TrainedRun(options.run, resources)
    check_guidance(config, trained.partition)
    network = load_feature_network(
        evaluation.feature_network, evaluation.inception_weights, trained.device
    )
    wanted = ScoringSettings(
        samples=evaluation.samples,
        seed=options.seed,
        sampling=config.sampling,
        ssim_images=evaluation.ssim_images,
        ssim_timesteps=tuple(sorted({evaluation.ssim_timestep, *evaluation.ssim_curve})),
        ssim_steps=evaluation.ssim_steps,
        quantile=options.quantile,
    )
    with tqdm(
        total=len(trained.tasks), desc="sampling", unit="task", disable=None, leave=False
    ) as bar:
        record = evaluate_run(
            options.run,
            trained,
            wanted,
            network,
            reference_folder=options.references,
            progress=lambda _: bar.update(),
            on_changed_images=_note if options.allow_changed_images else None,
        )
    print(_words(record, evaluation.ssim_timestep))


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _steps(asked: str) -> int | None:
    """What ``--ssim-steps`` says; None where that is Algorithm 2."""
    from srfed.errors import UserError

    if asked == "all":
        return None
    if not asked.isdecimal():
        raise UserError(f"--ssim-steps {asked!r} is impossible; allowed: a whole number ≥ 1, all")
    return int(asked)


def _words(record: dict[str, Any], headline: int) -> str:
    from srfed.evaluation.scores import Score, describe_score
    from srfed.records import ssim_name

    lines = [
        f"{record['run']} after round {record['round']}; configuration "
        f"{record['fingerprint'][:12]}, training seed {record['training_seed']}",
        "samples: " + ", ".join(f"{key} {value}" for key, value in record["sampling"].items()),
        *(
            describe_score(Score(**score), record["network"], record["seed"])
            for score in record["scores"]
        ),
    ]
    if record["ssim"]:
        curve = ", ".join(f"t = {t}: {value:.4f}" for t, value in record["ssim"].items())
        lines.append(
            f"{ssim_name(headline, record.get('ssim_steps'))}: "
            f"{record['ssim'][str(headline)]:.4f} ({curve}; n = "
            f"{record['ssim_images']} test images a task, window {record['ssim_window']} px, seed "
            f"{record['training_seed']})"
        )
    lines.append(
        f"agreement: {record['agreement']['all']:.4f} of the samples are given to their task by 3 "
        "nearest neighbours among all real images, in pixels"
    )
    return "\n".join([*lines, *_audit_words(record["memorisation"])])


def _audit_words(memorisation: dict[str, Any]) -> list[str]:
    # Evaluations of earlier versions have an audit of every task.
    missing = [
        f"no memorisation audit of {name}: {why}"
        for name, why in memorisation.get("none", {}).items()
    ]
    if memorisation["all"] is None:
        return missing
    merged = memorisation["all"]
    fired = [name for name, numbers in memorisation["by_task"].items() if numbers["fires"]]
    verdict = f"memorised: {', '.join(fired)}" if fired else "no task's model shows memorisation"
    return [
        f"memorisation: {merged['pixels_share']:.4f} (pixels) and {merged['features_share']:.4f} "
        "(features) of the samples are closer to a training image than a share "
        f"{merged['quantile']:.4f} of held-out images; {verdict}",
        *missing,
    ]

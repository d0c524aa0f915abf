"""The paper's Table I, beside ours: ``python -m simulations.table1 --dataset mnist --preset
small``.

Trains whatever is missing of every method and seed, samples it, scores it, and prints the table;
everything is in ``scores.csv`` too. Pictures of the first seed: twenty samples a task of every
method in
``samples-<method>.png``, the paper's Figures 3 to 6, and the first two of each task of all methods
in ``methods.png``. Stopped, it goes on where it was.

All methods see the same number of training images (with repetition), on the same UNet, schedule and
data, and are judged on the same numbers of samples. What differs is stated with each: what is
shared, and what travels.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simulations.figures import SAMPLES
from srfed.commands.options import Parser
from srfed.config import RunConfig, load_config
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.interrupts import run_command
from srfed.paths import absolute_path
from srfed.reporting.pictures import draw_grid, write_png
from srfed.runs.requested import refuse_ignored_dir
from srfed.studies.cases import (
    Case,
    Outcome,
    add_options,
    asked_seeds,
    by_name,
    change,
    mean_and_spread,
    row_of,
    run_cases,
    samples_of,
    write_csv,
)
from srfed.units import bytes_in_words, seconds_in_words

CONFIGS = Path(__file__).parent.parent / "configs"
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
PAPER: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "mnist": {"DDPM": (3.67, 0.881), "C-DDPM": (2.14, 0.884), "SR-DDPM": (2.04, 0.887)},
    "fashion_mnist": {"DDPM": (4.80, 0.908), "C-DDPM": (2.72, 0.915), "SR-DDPM": (2.48, 0.909)},
    "cifar10": {"DDPM": (12.64, 0.946), "C-DDPM": (12.86, 0.949), "SR-DDPM": (10.87, 0.949)},
    "cifar100": {"DDPM": (13.74, 0.944), "C-DDPM": (11.54, 0.942), "SR-DDPM": (11.30, 0.944)},
}
"""FID@10k and SSIM of the paper's Table I."""


class Preset(NamedTuple):
    """How much of everything: settings over those of the data set's configuration, samples to
    score.
    """

    settings: dict[str, Any]
    samples: int
    ssim_images: int


_SMALL = {
    "training__learning_rate_schedule": "constant",
    "training__minibatches": "continued",
    "resources__client_cpus": 1,
}
PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "small": {
        "digits": Preset({**_SMALL, "federation__rounds": 10}, 2_000, 8),
        **{
            dataset: Preset(
                {
                    **_SMALL,
                    "federation__rounds": 40,
                    "model__channels": (16, 32, 64, 64),
                    "sampling__steps": 25,
                },
                2_000,
                8,
            )
            for dataset in ("mnist", "fashion_mnist")
        },
        "cifar10": Preset({**_SMALL, "federation__rounds": 60}, 2_000, 8),
        "cifar100": Preset({**_SMALL, "federation__rounds": 32}, 2_000, 4),
    },
    # 600 passes over 500 images a task, in rounds of 16 steps of 64 images.
    "paper": {
        dataset: Preset(
            {
                "training__local_epochs": None,
                "training__local_steps": 16,
                "training__minibatches": "continued",
                "federation__rounds": 293,
            },
            10_000,
            100,
        )
        for dataset in DATASETS
    },
    "tiny": {
        dataset: Preset(
            {
                "federation__rounds": 1,
                "training__local_steps": 4,
                "training__batch_size": 16,
                "model__channels": (8, 8, 8, 16),
                "model__groups": 4,
                "model__attention_head_channels": 8,
                "diffusion__timesteps": 100,
                "sampling__steps": 2,
                "evaluation__ssim_timestep": 2,
                "evaluation__ssim_curve": (1, 2),
            },
            100,
            1,
        )
        for dataset in DATASETS
    },
}
"""``tiny`` shows that everything works and nothing else."""

POOLED_BATCH = 32
"""The least number of images in a batch of pooled training."""


class Method(NamedTuple):
    """One row of the table: its name, what the paper calls it if it is there, and its settings."""

    name: str
    paper: str | None
    settings: dict[str, Any]


def methods(config: RunConfig) -> list[Method]:
    """The methods to compare, under a configuration that is the federated SR-DDPM's."""
    # One network takes all of a pool's steps, and in batches as small as a client's it only gets
    # noisier.
    pooled = {
        "training__method": "pooled",
        "training__centralised_batch_size": max(POOLED_BATCH, config.training.batch_size),
        "model__exclusive_stages": "none",
    }
    plain = {"federation__server_optimizer": "average"}
    shared = {"model__exclusive_stages": "none", **plain}
    conditional = {"model__task_embedding": "shared"}
    clients, steps = config.federation.clients, config.training.local_steps or 0
    # Alternating takes its steps on θ_i first and then as many on φ: half of each keeps the budget.
    half = {"training__local_steps": steps // 2, "training__exclusive_steps": steps - steps // 2}
    return [
        Method("DDPM, pooled", "DDPM", pooled),
        Method("C-DDPM, pooled", "C-DDPM", {**pooled, **conditional}),
        Method("SR-DDPM, federated, joint", "SR-DDPM", {}),
        Method("SR-DDPM, federated, joint, plain average", None, plain),
        Method("local training", None, {"model__exclusive_stages": "all"}),
        Method(
            "SR-DDPM, centralised, task-balanced",
            "SR-DDPM",
            {
                "training__method": "balanced",
                "training__centralised_batch_size": config.training.batch_size * clients,
            },
        ),
        Method("SR-DDPM, centralised, Algorithm 1", "SR-DDPM", {"training__method": "one_task"}),
        Method("FedAvg, conditional", None, {**shared, **conditional}),
        Method(
            "SR-DDPM, federated, alternating", None, {"training__update": "alternating", **half}
        ),
        Method("FedAvg, unconditional", None, shared),
    ]


def choose(listed: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """The methods whose names hold any of the words; words that are a whole name mean that method
    alone.

    Raises:
        UserError: some words are in no name.
    """
    if not only:
        return list(listed)
    chosen = set()
    for words in only:
        whole = [method.name for method in listed if method.name.lower() == words.lower()]
        found = whole or [method.name for method in listed if words.lower() in method.name.lower()]
        if not found:
            names = "; ".join(method.name for method in listed)
            raise UserError(f"--only {words!r} is in no method's name; there are {names}")
        chosen |= set(found)
    return [method for method in listed if method.name in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m simulations.table1", description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument(
        "--only", nargs="+", metavar="WORDS", help="methods whose names hold any of these words"
    )
    parser.add_argument(
        "--feature-network",
        choices=("embedded", "inception"),
        help="what scores are of; default: the preset's (inception needs its weights)",
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _table(options), options.minutes)


def configuration(
    dataset: str,
    preset: str,
    data_dir: str | None,
    device: str,
    feature_network: str | None = None,
) -> RunConfig:
    """The configuration of the federated SR-DDPM: the data set's own file, with the preset's
    settings.

    Under ``paper`` the network, rates and sampler are those of configs/mnist_paper.yaml for every
    data set.
    """
    settings = dict(PRESETS[preset][dataset].settings)
    config = own = load_config(CONFIGS / f"{dataset}.yaml", [])
    if preset == "paper":
        config = load_config(CONFIGS / "mnist_paper.yaml", []).model_copy(
            update={"name": own.name, "data": own.data}
        )
        settings["federation__clients"] = own.federation.clients
    if data_dir is not None:
        settings["data__dir"] = str(absolute_path(data_dir))
    if feature_network is not None:
        settings["evaluation__feature_network"] = feature_network
    # Everything is scored afterwards, by the same code for every method.
    scored_later = {
        "evaluation__every": 0,
        "evaluation__samples": 2 * own.federation.clients,
        "evaluation__samples_between": 2 * own.federation.clients,
        "evaluation__ssim_images": 0,
        "evaluation__memorisation_quantile": 0.0,
    }
    config = change(
        config, **settings, **scored_later, resources__backend="inline", resources__device=device
    )
    refuse_ignored_dir(config)
    return config


def _table(options: argparse.Namespace) -> None:
    config = configuration(
        options.dataset, options.preset, options.data_dir, options.device, options.feature_network
    )
    preset = PRESETS[options.preset][options.dataset]
    listed = choose(methods(config), options.only)
    cases = [
        Case(
            method.name,
            change(config, seed=seed, **method.settings),
            preset.samples,
            preset.ssim_images,
        )
        for seed in asked_seeds(options)
        for method in listed
    ]
    outcomes = run_cases(cases, options.pool, options.jobs)
    out = options.out or Path("runs") / f"table1-{options.dataset}-{options.preset}"
    write_csv(out / "scores.csv", [row_of(outcome) for outcome in outcomes])
    _draw(out, [case for case in cases if case.config.seed == options.first_seed], options.pool)
    text = describe(options.dataset, options.preset, listed, by_name(outcomes))
    write_bytes(out / "table.md", text.encode())
    print(text)
    print(f"every number: {out / 'scores.csv'}")


def _draw(out: Path, cases: Sequence[Case], pool: Path) -> None:
    rows = {}
    for case in cases:
        samples = samples_of(case, pool)
        name = re.sub("[^a-z0-9]+", "-", case.name.lower())
        write_png(
            out / f"samples-{name}.png",
            draw_grid({task: few[:SAMPLES] for task, few in samples.items()}),
        )
        rows[case.name] = np.concatenate([images[:2] for images in samples.values()])
    write_png(out / "methods.png", draw_grid(rows))


def describe(
    dataset: str, preset: str, listed: Sequence[Method], groups: Mapping[str, Sequence[Outcome]]
) -> str:
    """The table in Markdown, with a line on what its numbers depend on."""
    some = next(iter(groups.values()))[0]
    record, config = some.record, some.case.config
    name, star = record["scores"][0]["name"], config.evaluation.ssim_timestep
    lines = [
        f"### {dataset}, preset `{preset}`, {len(next(iter(groups.values())))} seed(s)",
        "",
        f"| method | paper: FID@10k, SSIM | {name}: test | train | subset | kernel × 1000 | "
        f"agreement | SSIM-rec@{star} | nearer than held-out: pixels, features | parameters φ, θ_i "
        "| a client's bytes a round | training |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in listed:
        outcomes = groups[method.name]
        rows = [row_of(outcome) for outcome in outcomes]
        paper = PAPER.get(dataset, {}).get(method.paper or "")
        lines.append(
            f"| {method.name} | {'' if paper is None else f'{paper[0]:.2f}, {paper[1]:.3f}'} | "
            + " | ".join(
                [
                    *(
                        mean_and_spread([o.score(ref) for o in outcomes])
                        for ref in ("test", "train", "subset")
                    ),
                    mean_and_spread([1000 * o.kernel[0] for o in outcomes], 2),
                    mean_and_spread([row["agreement"] for row in rows]),
                    mean_and_spread([row[f"ssim_rec@{star}"] for row in rows]),
                    mean_and_spread([row["memorised_pixels"] for row in rows])
                    + ", "
                    + mean_and_spread([row["memorised_features"] for row in rows]),
                    f"{rows[0]['shared_parameters']:,}, {rows[0]['exclusive_parameters']:,}",
                    bytes_in_words(rows[0]["bytes_per_client_and_round"]),
                    seconds_in_words(sum(row["training_seconds"] for row in rows) / len(rows)),
                ]
            )
            + " |"
        )
    floors = ", ".join(
        f"{s['reference']} {s['floor']:.3f} ({s['floor_images']:,} images)"
        for s in record["scores"]
        if s["floor"] is not None
    )
    memorised = record["memorisation"]["all"]
    network, sampling = record["network"], config.sampling
    lines += [
        "",
        f"{name} on {network['network']} {network['sha256'][:8]}, {network['resize_rule']}; n = "
        f"{record['samples']:,} samples, sampling seed {record['seed']}, {sampling.sampler} with "
        f"{sampling.steps} steps and η = {sampling.eta:g}. Real images score: {floors}. Every "
        f"method saw {record['training']['images']:,} training images of "
        f"{config.federation.clients} tasks. A share of {memorised['quantile']:.3f} is what "
        "held-out real images have in the memorisation columns. The paper's numbers are FIDs on "
        "another network and another model: read them for their order only.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())

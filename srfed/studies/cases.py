"""What the studies have in common: many configurations trained and scored, some at a time, each
once for all.

Every configuration has a folder of its own, named after its fingerprint, so studies that need the
same run share it, and a study that was stopped goes on where it was. Each run is one process with
``resources.client_cpus`` threads: on a machine with few cores, several such processes do more than
one with several threads.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from srfed.config import RunConfig, parse_config
from srfed.cores import usable_cores
from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.files import held, read_json, write_bytes
from srfed.runs.run import TrainedRun
from srfed.runs.scoring import ScoringSettings, read_samples

LAST_WORDS = 3
"""Lines of a failed run's output that are shown."""


@dataclass(frozen=True)
class Case:
    """One configuration of a study.

    Attributes:
        name: what its results are filed under; cases that differ in the seed alone share a name.
        config: everything that decides the run.
        samples: generated images to score.
        ssim_images: test images of each task for SSIM-rec.
    """

    name: str
    config: RunConfig
    samples: int
    ssim_images: int = 8

    def folder(self, pool: Path) -> Path:
        """Where its run is."""
        return pool / f"{self.config.data.dataset}-{self.config.fingerprint()[:12]}"


@dataclass(frozen=True)
class Job:
    """One process of a study.

    Attributes:
        name: what it is called where it fails.
        folder: that of its run; no other process may be at it.
        command: what ``python -m`` is given.
        given: its standard input.
        threads: of its arithmetic.
        left: reads what it has left in the folder; None where that is not there, or another's.
        niceness: how much it lets other processes go first, as of the command ``nice``.
    """

    name: str
    folder: Path
    command: Sequence[str]
    given: bytes
    threads: int
    left: Callable[[], dict[str, Any] | None]
    niceness: int = 0


@dataclass(frozen=True)
class Outcome:
    """A case with everything that was measured; see
    :func:`srfed.runs.scoring.evaluate_run`.
    """

    case: Case
    record: dict[str, Any]

    def score(self, reference: str = "test") -> float:
        """The Fréchet distance to a reference."""
        return float(next(s["value"] for s in self.record["scores"] if s["reference"] == reference))

    def floor(self, reference: str = "test") -> float:
        """What real images score against it."""
        return float(next(s["floor"] for s in self.record["scores"] if s["reference"] == reference))

    @property
    def kernel(self) -> tuple[float, float]:
        """The kernel distance to the test images and its deviation over subsets."""
        found = next(s for s in self.record["scores"] if s["deviation"] is not None)
        return float(found["value"]), float(found["deviation"])


def scoring_settings(config: RunConfig, samples: int, ssim_images: int) -> ScoringSettings:
    """What a study measures on a run: always with the same seed, by the run's own sampler, and
    SSIM-rec by Algorithm 2, as in the tables on record.
    """
    evaluation = config.evaluation
    return ScoringSettings(
        samples=samples,
        seed=0,
        sampling=config.sampling,
        ssim_images=ssim_images,
        ssim_timesteps=tuple(sorted({evaluation.ssim_timestep, *evaluation.ssim_curve})),
        ssim_steps=None,
    )


def samples_of(case: Case, pool: Path) -> dict[str, Images]:
    """The samples that a case was scored on, uint8 N x H x W x C by task; raises UserError where
    there are none.
    """
    folder, config = case.folder(pool), case.config
    trained = TrainedRun(folder, config.resources)
    network = load_feature_network(
        config.evaluation.feature_network, config.evaluation.inception_weights, trained.device
    )
    return read_samples(
        folder, trained, scoring_settings(config, case.samples, case.ssim_images), network
    )


def change(config: RunConfig, **changes: Any) -> RunConfig:
    """A configuration with some settings changed: ``change(config, training__batch_size=32)``.

    Raises:
        UserError: the result is impossible.
    """
    content = json.loads(config.to_json())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (content[section] if section else content)[key] = value
    return parse_config(content, "the study")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every study has."""
    parser.add_argument("--data-dir", metavar="DIR", help="where the images are (data.dir)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="repeat with N seeds (default 1)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="the first of the seeds (default 0)"
    )
    parser.add_argument(
        "--pool", type=Path, default=Path("runs/studies"), metavar="DIR", help="folder of the runs"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="runs at a time; default: cores",
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="N",
        help="stop after so many, with exit code 3; the same command goes on later",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where tables and plots go")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")


def asked_seeds(options: argparse.Namespace) -> range:
    """The seeds that ``--seeds`` and ``--first-seed`` ask for.

    Raises:
        UserError: there are none, or one is below 0.
    """
    for name, least in (("seeds", 1), ("first_seed", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is impossible; allowed: {least} or more"
            )
    return range(options.first_seed, options.first_seed + options.seeds)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e5:
        raise argparse.ArgumentTypeError(f"{text} is impossible; allowed: above 0, to 100000")
    return minutes


def run_cases(
    cases: Sequence[Case],
    pool: Path,
    jobs: int,
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Train and score what is missing.

    Args:
        cases: in the order in which they start.
        pool: folder of the runs, shared by all studies.
        jobs: how many run at a time.
        on_outcome: told each outcome once it is there, one at a time, in any thread.

    Returns:
        The outcomes, in the order of the cases.

    Raises:
        UserError: a run failed; the text has its last words. What others have done by then stays.
    """
    processes = [_job_of(case, pool) for case in cases]
    # By identity: two cases can have one folder.
    case_of = {id(job): case for job, case in zip(processes, cases, strict=True)}
    records = run_jobs(
        processes, pool, jobs, lambda job, record: on_outcome(Outcome(case_of[id(job)], record))
    )
    return [Outcome(case, record) for case, record in zip(cases, records, strict=True)]


def run_jobs(
    jobs: Sequence[Job],
    pool: Path,
    count: int,
    on_outcome: Callable[[Job, dict[str, Any]], object] = lambda job, outcome: None,
) -> list[dict[str, Any]]:
    """Run the processes whose outcomes are missing.

    Args:
        jobs: in the order in which they start.
        pool: folder of the runs, shared by all studies.
        count: how many run at a time.
        on_outcome: told each outcome once it is there, one at a time, in any thread.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        UserError: as :func:`run_cases`.
    """
    if count < 1:
        raise UserError(f"--jobs {count} is impossible; allowed: 1 or more")
    running: set[subprocess.Popen[bytes]] = set()
    turn = threading.Lock()

    def run(job: Job) -> dict[str, Any]:
        outcome = _run(job, pool, running)
        with turn:
            on_outcome(job, outcome)
        return outcome

    with ThreadPoolExecutor(count) as executor:
        futures = [executor.submit(run, job) for job in jobs]
        try:
            with tqdm(total=len(jobs), unit="run", disable=None) as bar:
                outcomes = []
                for job, future in zip(jobs, futures, strict=True):
                    outcomes.append(future.result())
                    bar.update()
                    bar.set_postfix_str(job.name)
        except BaseException as stop:
            executor.shutdown(wait=False, cancel_futures=True)
            if isinstance(stop, KeyboardInterrupt):
                # Ctrl-C reaches them too; a signal that was sent to the study alone does not.
                for process in list(running):
                    process.terminate()
            raise
    return outcomes


def by_name(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes that differ in the seed alone, together."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.name, []).append(outcome)
    return groups


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """ "0.512 ± 0.013" (standard deviation over seeds), or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, atomically."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())


def row_of(outcome: Outcome) -> dict[str, Any]:
    """One row of a study's CSV: what was run, what it depends on, and every score."""
    record, config = outcome.record, outcome.case.config
    kernel, deviation = outcome.kernel
    first = record["scores"][0]
    training = record["training"]
    clients = config.federation.clients
    memorised = record["memorisation"]["all"]
    return {
        "name": outcome.case.name,
        "dataset": config.data.dataset,
        "images_per_task": config.data.images_per_task or "all",
        "training_seed": config.seed,
        "config_hash": record["fingerprint"][:12],
        "n": record["samples"],
        "sampling_seed": record["seed"],
        "network": first["name"],
        "network_sha256": record["network"]["sha256"][:12],
        "score_test": outcome.score("test"),
        "score_train": outcome.score("train"),
        "score_subset": outcome.score("subset"),
        "floor_test": outcome.floor("test"),
        "floor_train": outcome.floor("train"),
        "floor_subset": outcome.floor("subset"),
        "kernel_distance": kernel,
        "kernel_deviation": deviation,
        "agreement": record["agreement"]["all"],
        **{f"ssim_rec@{t}": value for t, value in record["ssim"].items()},
        "memorised_pixels": memorised["pixels_share"],
        "memorised_features": memorised["features_share"],
        "audits_fired": sum(one["fires"] for one in record["memorisation"]["by_task"].values()),
        "images_trained": training["images"],
        "training_seconds": round(training["training_seconds"], 1),
        "sampling_seconds": round(record["sampling_seconds"], 1),
        "bytes_per_client_and_round": record["round_bytes"] // (training["rounds"] * clients),
        "shared_parameters": record["parameters"]["shared"],
        "exclusive_parameters": record["parameters"]["exclusive"],
    }


def _job_of(case: Case, pool: Path) -> Job:
    folder = case.folder(pool)
    return Job(
        name=f"{case.name} (seed {case.config.seed})",
        folder=folder,
        command=[
            "srfed.studies.job",
            str(folder),
            str(case.samples),
            str(case.ssim_images),
            str(pool / "references"),
        ],
        given=case.config.to_json().encode(),
        threads=case.config.resources.client_cpus,
        left=lambda: _outcome(case, folder),
    )


def _run(job: Job, pool: Path, running: "set[subprocess.Popen[bytes]]") -> dict[str, Any]:
    folder = job.folder
    if (known := job.left()) is not None:
        return known
    log = folder.parent / "logs" / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    polite = ["nice", "-n", str(job.niceness)] if job.niceness else []
    # A second study that wants the same run waits for it, and then finds it done.
    with (
        held(pool / "locks" / folder.name / "lock", wait=True),
        log.open("ab") as output,
        subprocess.Popen(
            [*polite, sys.executable, "-m", *job.command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        ) as process,
    ):
        running.add(process)
        process.communicate(job.given)
        running.discard(process)
    if process.returncode:
        last = " ".join(log.read_text(errors="replace").splitlines()[-LAST_WORDS:])
        raise UserError(f"{job.name} failed: {last} (all of it: {log})")
    outcome = job.left()
    if outcome is None:
        raise UserError(f"{folder / 'outcome.json'} is not this case's; remove it")
    return outcome


def _outcome(case: Case, folder: Path) -> dict[str, Any] | None:
    """What an earlier process has left of this very case."""
    file = folder / "outcome.json"
    if not file.exists():
        return None
    outcome = read_json(file, "scores")
    asked = {
        "samples": case.samples,
        "ssim_images": case.ssim_images,
        "round": case.config.federation.rounds,
    }
    return outcome if all(outcome[key] == value for key, value in asked.items()) else None

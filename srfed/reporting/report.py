"""report.html: what a run's folder says, as one page that needs no network and runs no script."""

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from srfed.config import RunConfig
from srfed.config.evaluation import strip_timesteps
from srfed.data import load_recorded_tasks
from srfed.errors import UserError
from srfed.files import list_folder, read_bytes, read_json, write_bytes
from srfed.records import Colour, TaskInfo, ssim_name
from srfed.reporting.joining import VERDICTS
from srfed.reporting.page_plots import page_plots
from srfed.reporting.pictures import Images, draw_grid
from srfed.reporting.summary import comparisons_of, scores_in_words, totals
from srfed.reporting.verdicts import verdicts
from srfed.storage.metrics_log import Line, MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.units import bytes_in_words, seconds_in_words

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
"""What the page may load: nothing but what it brings along; a script, even of its own, never."""
IDENTITY = ("lineage", "srfed", "torch", "python", "began", "device", "precision")
"""Of run.json, what is shown."""


@dataclass(frozen=True)
class RealImages:
    """Real training images by client, to stand beside samples; or why there are none."""

    images: Mapping[str, Images]
    why_none: str = ""


def write_report(run: RunFolder) -> Path:
    """Make report.html of what the run's folder has; returns where it is.

    Raises:
        UserError: a file of the run is damaged or cannot be read, or the report cannot be written.
    """
    write_bytes(run.report, render_report(run, real_images(run)).encode())
    return run.report


def real_images(run: RunFolder) -> RealImages:
    """The first training images of each task of a simulation, which has them anyway.

    A deployed run's images are the sites' own, and are not looked for.
    """
    if not run.has_every_party:
        return RealImages({}, "Real images are not shown: they are their owners' alone.")
    config = run.config
    try:
        tasks = load_recorded_tasks(config.data, config.federation.clients, run.images)
    except UserError as error:
        return RealImages({}, f"Real images are not shown: {error}.")
    columns = config.evaluation.grid_columns
    return RealImages({task.name: task.train[:columns].copy() for task in tasks})


def render_report(run: RunFolder, real: RealImages, *, refresh: int | None = None) -> str:
    """The page.

    Args:
        run: the run's folder.
        real: see :func:`real_images`.
        refresh: seconds after which a browser asks again; None for a file, which stays as it is.

    Raises:
        UserError: a file of the run is damaged or cannot be read.
    """
    log, config = MetricsLog(run.metrics), run.config
    tasks, rounds, evaluations = log.tasks(), log.rounds(), log.evaluations()
    evaluation = evaluations[-1] if evaluations else None
    ended = bool(evaluation and evaluation["final"] and not _rounds_left(config, rounds))
    sums = totals(log)
    return _template().render(
        policy=POLICY,
        refresh=None if ended else refresh,
        title=run.path.name,
        state="finished" if ended else "not finished",
        done=rounds[-1]["round"] if rounds else 0,
        asked=config.federation.rounds,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        where="a copy to pass on"
        if run.copied_tasks is not None
        else "simulated"
        if run.has_every_party
        else "deployed",
        method=config.training.method,
        tasks=tasks,
        sums=sums,
        traffic=(bytes_in_words(sums.bytes_up), bytes_in_words(sums.bytes_down)),
        times=tuple(map(seconds_in_words, (sums.training_seconds, sums.evaluation_seconds))),
        verdicts=verdicts(tasks, rounds, evaluation),
        plots=page_plots(tasks, rounds, evaluations),
        evaluation=evaluation,
        scores=_scores(tasks, rounds, evaluation),
        rests_on=scores_in_words(tasks, evaluation) if evaluation else [],
        samples=_samples(run, tasks, evaluation, real),
        changed=_changed(config),
        configuration=config.to_yaml(),
        identity=_identity(run),
        commands=_commands(run, ended),
    )


def _identity(run: RunFolder) -> dict[str, Any]:
    """Of run.json, what is shown."""
    content = read_json(run.identity_file)
    shown = {name: value for name, value in content.items() if name in IDENTITY}
    if run.starts_from:
        shown["starts from"] = run.starts_from
    return shown


@lru_cache(maxsize=1)
def _template() -> Template:
    rules = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rules.filters["number"] = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    return rules.from_string(files("srfed.reporting").joinpath("report.html").read_text("utf-8"))


def _rounds_left(config: RunConfig, rounds: Sequence[Line]) -> int:
    return config.federation.rounds - (int(rounds[-1]["round"]) if rounds else 0)


def _scores(
    tasks: Sequence[TaskInfo], rounds: Sequence[Line], evaluation: Line | None
) -> dict[str, Any]:
    """The table: a row for each owner and one for all."""
    if evaluation is None:
        return {}
    losses = rounds[-1]["loss_by_client"] if rounds else {}
    compared, audits = comparisons_of(tasks, evaluation), evaluation.get("audits", {})
    colours = evaluation.get("colours", {})
    recognised, own = evaluation.get("recognised_by_client", {}), evaluation.get("own", {})
    rows = [
        {
            "name": task.task,
            "images": task.images,
            "loss": losses.get(task.client),
            "score": evaluation["score_by_client"].get(task.client),
            "ssim": evaluation["ssim_by_client"].get(task.client),
            "recognised": recognised.get(task.client),
            "colour": Colour(**colours[task.client]) if task.client in colours else None,
            "own": [one["by_client"].get(task.client) for one in own.values()],
            "joining": compared.get(task.task),
            "copies": audits.get(task.client, {}).get("fires"),
        }
        for task in tasks
    ]
    everybody = {
        "name": "all",
        "images": sum(task.images for task in tasks),
        "loss": rounds[-1]["loss"] if rounds else None,
        "score": evaluation["score"],
        "ssim": evaluation["ssim"].get(str(evaluation["ssim_timestep"])),
        "recognised": evaluation.get("recognised"),
        "colour": None,
        "own": [one["all"] for one in own.values()],
        "joining": None,
        "copies": None,
    }
    return {
        "rows": [*rows, everybody],
        "ssim_name": ssim_name(evaluation["ssim_timestep"], evaluation.get("ssim_steps")),
        "words": VERDICTS,
        "with_recognised": bool(recognised),
        "with_colours": bool(colours),
        "own": list(own),
        "with_joining": bool(compared),
        "with_audits": bool(audits),
    }


def _samples(
    run: RunFolder, tasks: Sequence[TaskInfo], evaluation: Line | None, real: RealImages
) -> dict[str, Any]:
    """The newest pictures, as a page can hold them."""
    names = list_folder(run.samples)
    found = {
        kind: newest[-1]
        for kind in ("round", "reverse-process")
        if (newest := [name for name in names if re.fullmatch(rf"{kind}-\d+\.png", name)])
    }
    shown = {} if evaluation is None else evaluation["score_by_client"]
    beside = {
        task.client: real.images[task.client]
        for task in tasks
        if task.client in shown and task.client in real.images
    }
    timesteps = strip_timesteps(run.config.diffusion.timesteps, run.config.evaluation.strip_steps)
    return {
        "round": int(found["round"][6:-4]) if "round" in found else None,
        "generated": _embedded(read_bytes(run.samples / found["round"]))
        if "round" in found
        else None,
        "real": _embedded(_png(draw_grid(beside))) if "round" in found and beside else None,
        "why_no_real": real.why_none,
        "reverse": _embedded(read_bytes(run.samples / found["reverse-process"]))
        if "reverse-process" in found
        else None,
        "timesteps": timesteps,
    }


def _png(picture: Images) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _changed(config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Settings that are not the defaults: name, value, default (None where it has none)."""
    usual = RunConfig().settings()
    return [
        (name, value, usual.get(name))
        for name, value in config.settings().items()
        if value != usual.get(name)
    ]


def _commands(run: RunFolder, ended: bool) -> list[tuple[str, str]]:
    """What one may do next, and how it is typed where the run's folder stands."""
    path = shlex.quote(run.path.name)
    if (kept := run.copied_tasks) is not None:
        one = f" --task {shlex.quote(kept[0])}" if len(kept) == 1 else ""
        return [
            *(
                [("sample", f"srfed sample --run {path}{one} --n 64 --out samples.png")]
                if kept
                else []
            ),
            ("a new owner", f"srfed adapt --run {path} --data FOLDER --images 50"),
            ("compare with another run", f"srfed compare {path} OTHER_RUN"),
            ("make this page again", f"srfed report {path}"),
        ]
    if not run.has_every_party:
        return [
            ("sample, at a site", "srfed sample --store STATE_DIR/CLIENT --n 64 --out samples.png"),
            ("follow it", f"srfed watch {path}"),
            ("make this page again", f"srfed report {path}"),
        ]
    federated = run.config.training.method == "federated"
    resume = "python -m srfed.simulate" if federated else "srfed centralise"
    more = f" --set federation.rounds={2 * run.config.federation.rounds}" if ended else ""
    constant = run.config.training.learning_rate_schedule == "constant"
    return [
        *([] if ended else [("follow it", f"srfed watch {path}")]),
        *([("go on", f"{resume} --resume {path}{more}")] if not ended or constant else []),
        ("sample", f"srfed sample --run {path} --n 64 --out samples.png"),
        ("score again", f"srfed evaluate --run {path} --samples 10000"),
        ("a new owner", f"srfed adapt --run {path} --data FOLDER --images 50"),
        ("compare with another run", f"srfed compare {path} OTHER_RUN"),
        ("every curve", f"tensorboard --logdir {shlex.quote(f'{run.path.name}/tensorboard')}"),
        ("make this page again", f"srfed report {path}"),
    ]

"""A copy of a run's folder to pass on: without real images, and without the θ of those who keep
theirs.

What goes along is named here, file by file; whatever else lies in the folder stays.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from srfed.config import ResourcesConfig
from srfed.config.run import PATHS
from srfed.errors import UserError
from srfed.files import (
    exists,
    is_held,
    list_folder,
    read_bytes,
    read_json,
    refuse_used,
    write_bytes,
    write_json,
    written_tree,
)
from srfed.networks.partition import Exclusive
from srfed.records import TaskInfo
from srfed.reporting.report import write_report
from srfed.runs.run import TrainedRun
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import LOCK, RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints
from srfed.training.part import ClientState, Part

PICTURE = re.compile(r"(?:round|reverse-process)-\d+\.png")
"""In samples/: what was generated, and nothing else."""
SCORES = "scores.json"
REMADE = ("README.txt", "config.yaml", "report.html", "evaluations", "server", LOCK)
WHOLE = ("run.json", "metrics.jsonl", "summary.txt", "samples")
README = """A copy of a run's folder, made by srfed share to be passed on (docs/taking_away.md).

It has the shared part φ, scores, curves and generated samples{own}.

Left out:
{left_out}
{warnings}"""


@dataclass(frozen=True)
class Shared:
    """What became of a run's folder, in words.

    Attributes:
        kept: the θ that went along, as a part of a sentence.
        left_out: what did not, one thing each.
        warnings: what to know before it is passed on, a sentence each.
    """

    kept: str
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def share_run(path: Path, out: Path, wanted: Sequence[str] = ()) -> Shared:
    """Copy a run's result without real images and without other owners' θ.

    Args:
        path: the run's folder.
        out: the copy; new or empty. It appears complete or not at all.
        wanted: names or positions of the tasks whose averaged θ goes along; none: φ alone.

    Raises:
        UserError: it is no run, a process has it, it is damaged, there is no such task or no θ of
            it, or the copy cannot be written.
    """
    refuse_used(out)
    run = RunFolder.open(path)
    if run.path in (out.absolute(), *out.absolute().parents):
        raise UserError(f"{out} lies in {path}; name a folder elsewhere")
    if is_held(run.path / LOCK):
        raise UserError(f"{path} is in use by another process; share it when that has ended")
    trained = TrainedRun(run.path, ResourcesConfig(device="cpu"))
    tasks = list(dict.fromkeys(map(trained.find_task, wanted)))
    exclusive = {task: _exclusive(trained, task) for task in tasks}
    # Of a network without θ, φ is everybody's model.
    sampled = tasks if trained.partition.exclusive else trained.tasks
    told = Shared(
        f", and θ of {_names(tasks)}" if tasks and trained.partition.exclusive else "",
        tuple(_left_out(run, trained, tasks)),
        tuple(_warnings(run, trained)),
    )
    with written_tree(out) as folder:
        _copy_files(run, folder)
        write_json(
            folder / "share.json",
            {"tasks": [task.task for task in sampled], "left_out": list(told.left_out)},
        )
        state = trained.state
        ServerCheckpoints(folder / "server", 1).save(
            replace(
                state,
                shared=replace(state.shared, moments={}),
                optimizer={},
                known={},
                minibatches={},
                control={},
            )
        )
        for task, average in exclusive.items():
            if average:
                ClientStore(folder / "clients", task.client, run.lineage, 1).save(
                    state.attempts[task.client],
                    NO_PARENT,
                    state.round,
                    # Its weights, which differ from the average, and Adam's moments say more of the
                    # images than a model needs.
                    ClientState(Part(Exclusive({}), average)),
                )
        lines = "\n".join(f"- {what}" for what in told.left_out)
        warnings = "\n".join(("", *told.warnings, "")) if told.warnings else ""
        write_bytes(
            folder / "README.txt",
            README.format(own=told.kept, left_out=lines, warnings=warnings).encode(),
        )
        write_report(RunFolder.open(folder))
    return told


def _exclusive(trained: TrainedRun, task: TaskInfo) -> Exclusive:
    if task.client not in trained.state.attempts:
        raise UserError(f"--task {task.task} has no θ: it never took part")
    return Exclusive(trained.exclusive_of(task))


def _copy_files(run: RunFolder, folder: Path) -> None:
    for name in WHOLE:
        source = run.path / name
        if name == "samples":
            for picture in filter(PICTURE.fullmatch, list_folder(source)):
                write_bytes(folder / name / picture, read_bytes(source / picture))
        elif exists(source):
            write_bytes(folder / name, read_bytes(source))
    config = run.config
    for section, key in PATHS:
        settings = getattr(config, section)
        empty = type(settings).model_fields[key].default
        config = config.model_copy(update={section: settings.model_copy(update={key: empty})})
    write_bytes(folder / "config.yaml", config.to_yaml().encode())
    for name in list_folder(run.path / "evaluations"):
        if exists(scores := run.path / "evaluations" / name / SCORES):
            write_json(
                folder / "evaluations" / name / SCORES,
                {**read_json(scores, "scores"), "run": run.path.name},
            )


def _left_out(run: RunFolder, trained: TrainedRun, kept: Sequence[TaskInfo]) -> list[str]:
    """What the folder has and the copy has not, one thing each."""
    others = [task for task in trained.tasks if task not in kept]
    found = []
    if exists(run.clients) and trained.partition.exclusive and others:
        found.append(f"θ of {_names(others)}")
    if exists(run.clients):
        found.append(
            "what else the owners keep: optimizer state, earlier attempts, logs, and in "
            "memorisation/ crops of real training images"
        )
    if run.has_every_party:
        found.append("real training images in report.html, which was made again without them")
    if exists(run.path / "tasks.npz"):
        found.append("tasks.npz, the images themselves")
    if exists(run.path / "start"):
        found.append("start/, the φ that the run began with")
    if exists(run.images):
        found.append("images.json, fingerprints by which one can tell whether an image was there")
    if exists(run.tensorboard):
        found.append(
            "tensorboard/, whose files name the machine and its folders; the curves are in "
            "report.html and metrics.jsonl"
        )
    if exists(run.path / "evaluations"):
        found.append("the samples of srfed evaluate; its scores are there")
    found.append(
        "in server/ all checkpoints but that of the result, optimizer state, and what the clients "
        "are held to, so nobody can go on with this run"
    )
    if paths := [f"{section}.{key}" for section, key in PATHS if _setting(run, section, key)]:
        found.append(f"in config.yaml {' and '.join(paths)}, paths of the machine")
    named = {
        *WHOLE,
        *REMADE,
        "clients",
        "tasks.npz",
        "images.json",
        "tensorboard",
        "share.json",
        "start",
    }
    if strangers := [name for name in list_folder(run.path) if name not in named]:
        found.append(f"what a run's folder need not have: {', '.join(strangers)}")
    return found


def _warnings(run: RunFolder, trained: TrainedRun) -> list[str]:
    warnings = []
    if not trained.partition.exclusive:
        warnings.append("This run has no θ: whoever has φ can draw images of every owner.")
    evaluations = MetricsLog(run.metrics).evaluations()
    audits = evaluations[-1].get("audits", {}) if evaluations else {}
    fired = [task for task in trained.tasks if audits.get(task.client, {}).get("fires")]
    if fired:
        warnings.append(
            f"The memorisation audit fires for {_names(fired)}: generated samples in samples/ and "
            "report.html are close to training images; look at them before you pass them on."
        )
    elif not audits:
        warnings.append(
            "No memorisation audit was made: nobody knows whether generated samples are close to "
            "training images."
        )
    return warnings


def _setting(run: RunFolder, section: str, key: str) -> object:
    return getattr(getattr(run.config, section), key)


def _names(tasks: Sequence[TaskInfo]) -> str:
    return ", ".join(task.task for task in tasks)

"""What the commands that train have in common: options, checks before any work, resuming, the
closing words.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from srfed.command import Parser, status_of, tell
from srfed.config import RunConfig, describe
from srfed.cores import check_resources
from srfed.errors import UserError
from srfed.files import held, write_bytes
from srfed.reporting.summary import summarise
from srfed.requested_config import requested_config
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import LOCK, RunFolder


def training_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Options of a command that trains; the settings are listed in its help."""
    parser = Parser(
        prog=f"python -m {command}",
        description=description,
        epilog="settings (name = default):\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file; default: the embedded digits"
    )
    parser.add_argument(
        "--clients",
        metavar="N",
        help="the first N tasks (federation.clients); default: all of own data, or 10",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the images are (data.dir); what they are is looked up",
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the run's folder; default runs/<name>-<time>"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder"
    )
    parser.add_argument(
        "--allow-changed-images",
        action="store_true",
        help="with --resume: go on although the images are not those that the run was begun with",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting, e.g. training.batch_size=32; repeatable",
    )
    return parser


def train_by_command(
    command: str,
    options: argparse.Namespace,
    further: dict[str, str | None],
    check: Callable[..., None],
    train: Callable[[RunFolder], None],
) -> None:
    """Begin a run or go on with one, train it, and say how it went.

    Args:
        command: the command's name, for the words that say how to go on.
        options: of :func:`training_parser`.
        further: settings that the command has options of its own for; None where not given.
        check: as :func:`check_training`; raises UserError for what cannot work, before anything is
            written.
        train: does the work; may raise UserError, KeyboardInterrupt or, where nobody reads the
            output, BrokenPipeError.

    Raises:
        UserError: the text says how to go on where there is something to go on with.
        SystemExit: a signal or a closed pipe stopped the run.
    """
    began, started_at = time.monotonic(), time.time()
    named = {
        "federation.clients": options.clients,
        "data.dir": None if options.data_dir is None else json.dumps(options.data_dir),
        **further,
    }
    if options.resume is None:
        if options.allow_changed_images:
            raise UserError(
                "--allow-changed-images is for --resume: a new run takes the images that are there"
            )
        config = requested_config(options.config, options.overrides, named)
        check(config)
        run = RunFolder.create(options.run_dir, config)
    else:
        if options.run_dir is not None:
            raise UserError("--resume names the run's folder; leave --run-dir out")
        run = RunFolder.open(options.resume)
        config = requested_config(options.config or run.config_file, options.overrides, named)
        run = run.reconfigure(config)
        record = run.images if run.started or run.images.exists() else None
        check(config, record, allow_changed_images=options.allow_changed_images)
    if finished(run):
        print(
            f"{relative(run.path)} is finished already; a larger federation.rounds would go on "
            "with it"
        )
    else:
        _announce(run)
        go_on = f"{command} --resume {shlex.quote(str(relative(run.path)))}"
        try:
            train(run)
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            tell(f"stopped; go on with: python -m {go_on}")
            raise SystemExit(status_of(stop)) from None
        except UserError as error:
            text = f"{error}{_last_reason(run, since=started_at)}"
            raise UserError(f"{text}; once it is mended, go on with: python -m {go_on}") from error
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    print(f"\n{summary}")
    _show_where(run)


def check_training(
    config: RunConfig, record: Path | None = None, *, allow_changed_images: bool = False
) -> None:
    """Look for everything that would fail later, before anything is written or started.

    Args:
        config: the run's configuration.
        record: of the images that the run was begun with; None for a new run.
        allow_changed_images: put other images on record, and say so, instead of refusing them.

    Raises:
        UserError: data, batch size, device, partition, feature network or cores do not fit; images
            have changed.
    """
    if config.data.dataset == "sites":
        raise UserError(
            "data.dataset = sites is for deployed sites (docs/deployment.md); for a simulation "
            "name a data set, for example --set data.dataset=folder --data-dir DIR"
        )
    # Importing torch takes seconds: what is wrong with settings and images is said before.
    from srfed.data import load_recorded_tasks, load_tasks, record_tasks

    training = config.training
    check_resources(config.resources, federated=training.method == "federated")
    if record is None:
        tasks = load_tasks(config.data, config.federation.clients)
    else:
        tasks = load_recorded_tasks(
            config.data,
            config.federation.clients,
            record,
            _say_on_stderr if allow_changed_images else None,
        )
    for task in tasks:
        if len(task.test) < 2:
            raise UserError(
                f"task {task.name!r} has {len(task.test)} test images; evaluation needs at least 2"
            )
    from srfed.device import resolve_device
    from srfed.evaluation.features.load import load_feature_network
    from srfed.model import build_model, build_partition
    from srfed.training.centralised import central_orders
    from srfed.training.minibatches import MinibatchOrder

    device = resolve_device(config.resources)
    if training.method != "federated":
        central_orders(config, {task.name: len(task.train) for task in tasks})
    for task in tasks:
        if training.method == "federated":
            MinibatchOrder.of(
                training, len(task.train), training.batch_size, config.seed, task.name
            )
    build_partition(config, build_model(config, tasks[0].train.shape[-1]))
    load_feature_network(
        config.evaluation.feature_network, config.evaluation.inception_weights, device
    )
    if record is not None:
        if not record.exists():
            _say_on_stderr(
                f"the run has no record of its images, so they cannot be compared; {record} is "
                "begun now"
            )
        with held(record.parent / LOCK, wait=False):
            record_tasks(record, tasks)


def _last_reason(run: RunFolder, since: float) -> str:
    """What a simulated client has last put in its own log, as here the same person owns run and
    clients.
    """
    logs = [log for log in run.clients.glob("*/client.log") if log.stat().st_mtime >= since]
    if not logs:
        return ""
    latest = max(logs, key=lambda log: log.stat().st_mtime)
    return (
        f"; {relative(latest)} ends with: "
        f"{latest.read_text(errors='replace').rstrip().splitlines()[-1]}"
    )


def _say_on_stderr(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def relative(path: Path) -> Path:
    """A path as a user in this folder would write it."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def finished(run: RunFolder) -> bool:
    """Whether the run has its last evaluation, and so nothing is left to do."""
    last = run.config.federation.rounds
    # A checkpoint that was removed takes the run back, whatever its log says.
    return run.last_round == last and any(
        line["final"] and line["round"] == last for line in MetricsLog(run.metrics).evaluations()
    )


def _announce(run: RunFolder) -> None:
    from srfed.data import describe_images

    config = run.config
    print(
        f"{config.name}: {config.federation.clients} clients, {config.federation.rounds} rounds, "
        f"exclusive stages {config.model.exclusive_stages}, "
        + (
            f"backend {config.resources.backend}"
            if config.training.method == "federated"
            else config.training.method
        )
    )
    for line in describe_images(config.data, config.federation.clients):
        print(line)
    print(f"run folder: {run.path}")
    print(f"follow it:  tensorboard --logdir {relative(run.tensorboard)}", flush=True)


def _show_where(run: RunFolder) -> None:
    path = relative(run.path)
    pictures = sorted(run.samples.glob("round-*.png"))
    print()
    if pictures:
        print(f"samples:    {relative(pictures[-1])}")
    print(f"curves:     tensorboard --logdir {relative(run.tensorboard)}")
    print(f"more:       python -m srfed.sample --run {path} --n 64 --out grid.png")

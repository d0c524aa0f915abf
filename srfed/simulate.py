"""Simulate a federation on this machine: ``python -m srfed.simulate --clients 10``."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from srfed.command import INTERRUPTED, run_command
from srfed.config import RunConfig, describe, load_config
from srfed.errors import UserError
from srfed.files import write_bytes
from srfed.reporting.metrics_log import MetricsLog
from srfed.reporting.run_directory import RunDirectory
from srfed.reporting.summary import summarise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    return run_command(lambda: _simulate(options, began))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srfed.simulate",
        description="Train one diffusion model over n simulated clients that never share an image.",
        epilog="settings (name = default):\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; default: the embedded digits")
    parser.add_argument("--clients", metavar="N", help="simulate the first N tasks (federation.clients)")
    parser.add_argument("--data-dir", metavar="DIR", help="where the images are (data.dir)")
    parser.add_argument("--backend", metavar="NAME", help="ray or inline (resources.backend)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's folder; default runs/<name>-<time>")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a setting, e.g. training.batch_size=32; repeatable",
    )  # fmt: skip
    return parser


def _simulate(options: argparse.Namespace, began: float) -> None:
    overrides = list(options.overrides)
    for key, value in (
        ("federation.clients", options.clients),
        ("data.dir", None if options.data_dir is None else json.dumps(options.data_dir)),
        ("resources.backend", options.backend),
    ):
        if value is not None:
            overrides.append(f"{key}={value}")
    if options.resume is None:
        config = _with_absolute_data_dir(load_config(options.config, overrides))
        check(config)
        run = RunDirectory.create(options.run_dir, config)
    else:
        if options.run_dir is not None:
            raise UserError("--resume names the run's folder; leave --run-dir out")
        run = RunDirectory.open(options.resume)
        source = options.config or run.config_file
        config = _with_absolute_data_dir(load_config(source, overrides))
        run = run.reconfigure(config)
        check(config)
    if _finished(run):
        print(f"{_relative(run.path)} is finished already; a larger federation.rounds would go on with it")
    else:
        _announce(run)
        _run(run)
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    print(f"\n{summary}")
    _show_where(run)


def check(config: RunConfig) -> None:
    """Look for everything that would fail later, before anything is written or started.

    Raises:
        UserError: data, batch size, device, partition, feature network or cores do not fit.
    """
    # Importing torch's half of the package takes seconds, and --help needs none of it.
    from srfed.data import load_tasks
    from srfed.evaluation.features import load_feature_network
    from srfed.training.batches import MinibatchOrder
    from srfed.training.setup import build_model, build_partition, check_resources, resolve_device

    if config.data.dataset == "sites":
        raise UserError(
            "data.dataset = sites is for deployed sites (docs/deployment.md); for a simulation name a data set, "
            "for example --set data.dataset=folder --data-dir DIR"
        )
    training = config.training
    device = resolve_device(config.resources)
    check_resources(config.resources)
    tasks = load_tasks(config.data, config.federation.clients)
    for task in tasks:
        MinibatchOrder(len(task.train), training.batch_size, training.drop_last, config.seed, task.name)
        if len(task.test) < 2:
            raise UserError(f"task {task.name!r} has {len(task.test)} test images; evaluation needs at least 2")
    build_partition(config, build_model(config, tasks[0].train.shape[-1]))
    load_feature_network(config.evaluation.feature_network, config.evaluation.inception_weights, device)


def _with_absolute_data_dir(config: RunConfig) -> RunConfig:
    """Other processes, and later resumptions, may stand in other folders."""
    if not config.data.dir:
        return config
    data = config.data.model_copy(update={"dir": str(Path(config.data.dir).absolute())})
    return config.model_copy(update={"data": data})


def _finished(run: RunDirectory) -> bool:
    """Whether the run has its last evaluation, and so nothing is left to do."""
    last = run.config.federation.rounds
    return any(line["final"] and line["round"] == last for line in MetricsLog(run.metrics).evaluations())


def _announce(run: RunDirectory) -> None:
    config = run.config
    print(
        f"{config.name}: {config.federation.clients} clients, {config.federation.rounds} rounds, "
        f"exclusive stages {config.model.exclusive_stages}, backend {config.resources.backend}"
    )
    print(f"run folder: {run.path}")
    print(f"follow it:  tensorboard --logdir {_relative(run.tensorboard)}", flush=True)


def _run(run: RunDirectory) -> None:
    """Start the apps on the configured backend; Ctrl-C stops between two replies."""
    from srfed.federation.client_app import app as client_app
    from srfed.federation.exchange import StoppedError, stop_requested
    from srfed.federation.inline_grid import run_inline
    from srfed.federation.server_app import app as server_app

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()
        print("\nstopping (again to stop at once)", file=sys.stderr, flush=True)

    go_on = f"python -m srfed.simulate --resume {_relative(run.path)}"
    stop_requested.clear()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if run.config.resources.backend == "ray":
            from srfed.federation.ray_grid import run_on_ray

            run_on_ray(run, server_app, client_app)
        else:
            run_inline(run, server_app, client_app)
    except (StoppedError, KeyboardInterrupt):
        print(f"stopped; go on with: {go_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except UserError as error:
        raise UserError(f"{error}; once it is mended, go on with: {go_on}") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show_where(run: RunDirectory) -> None:
    path = _relative(run.path)
    pictures = sorted(run.samples.glob("round-*.png"))
    print()
    if pictures:
        print(f"samples:    {_relative(pictures[-1])}")
    print(f"curves:     tensorboard --logdir {_relative(run.tensorboard)}")
    print(f"more:       python -m srfed.sample --run {path} --n 64 --out grid.png")


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


if __name__ == "__main__":
    raise SystemExit(main())

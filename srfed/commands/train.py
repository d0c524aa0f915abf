"""Commands that train: ``srfed train``, ``srfed simulate`` and ``srfed centralise``."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srfed.commands.options import training_parser
from srfed.commands.sweep import train_many
from srfed.config import RunConfig
from srfed.config.model import exclusive_in_words
from srfed.errors import UserError
from srfed.federation.flower.ray_head import begin_ahead, begun_ahead
from srfed.files import write_bytes
from srfed.interrupts import run_command, status_of, stopping_gently, tell
from srfed.paths import relative
from srfed.reporting.summary import summarise
from srfed.runs.checks import check_centralised, check_simulation, finished
from srfed.runs.requested import requested_config
from srfed.runs.sweep import variants
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from srfed.data import Task
    from srfed.networks.partition import Shared
    from srfed.storage.start import Origin

TRAIN, SIMULATE, CENTRALISE = "srfed train", "python -m srfed.simulate", "srfed centralise"
NEW_ALONE = ("quick", "dry_run", "print_config", "start_from", "seeds", "sweep")
"""Options of a new run, which a resumed one would ignore."""
Planned = tuple[RunConfig, "list[Task]"]
Named = dict[str, str | None]
"""Settings that a command has options of its own for, in YAML; None where not given."""


def train(arguments: Sequence[str] | None = None) -> int:
    """Train over the owners of a folder of images; returns the command's exit code.

    What is not said is proposed, and what the run will take is said before it begins.
    """
    parser = training_parser(
        TRAIN,
        "Train one diffusion model over all owners of a folder of task folders, an .npz file or a "
        "published data set, simulated on this machine. What is not said is proposed for these "
        "images and this machine.",
        data="--data",
    )
    parser.add_argument("--backend", metavar="NAME", help="ray or inline (resources.backend)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a whole run, with samples and scores, in under two minutes: a look, no result",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="let every owner train alone too, and say what joining is worth to each "
        "(federation.compare); twice the work",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would take, and stop there"
    )
    options = parser.parse_args(arguments)
    further = {
        "resources.backend": options.backend,
        "federation.compare": "alone" if options.compare else None,
    }
    return run_command(
        lambda: train_by_command(
            TRAIN,
            options,
            further,
            check_simulation,
            _simulate,
            lambda named, source: _plan(options, named, source),
        )
    )


def simulate(arguments: Sequence[str] | None = None) -> int:
    """Simulate a federation on this machine; returns the command's exit code."""
    parser = training_parser(
        SIMULATE, "Train one diffusion model over n simulated clients that never share an image."
    )
    parser.add_argument("--backend", metavar="NAME", help="ray or inline (resources.backend)")
    options = parser.parse_args(arguments)
    further = {"resources.backend": options.backend}
    # Of several runs, and of none, no Ray is begun before it is needed.
    one = not options.print_config and options.seeds is None and not options.sweep

    def train() -> None:
        with begun_ahead():
            check = partial(check_simulation, meanwhile=begin_ahead if one else None)
            train_by_command(SIMULATE, options, further, check, _simulate)

    return run_command(train)


def centralise(arguments: Sequence[str] | None = None) -> int:
    """Train a baseline with all images in one place; returns the command's exit code.

    What a federation is compared with; run folder, reports and scores are a federation's.
    """
    parser = training_parser(
        CENTRALISE,
        "Train a baseline with all tasks' images in one place: DDPM, C-DDPM, or SR-DDPM as in the "
        "paper.",
    )
    options = parser.parse_args(arguments)
    return run_command(
        lambda: train_by_command(CENTRALISE, options, {}, check_centralised, _centralise)
    )


def train_by_command(
    command: str,
    options: argparse.Namespace,
    further: Named,
    check: "Callable[..., list[Task]]",
    train: Callable[[RunFolder], None],
    plan: "Callable[[Named, RunFolder | None], Planned | None] | None" = None,
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
        plan: looks at what a new run is asked for, and at the run whose φ it starts from, if any;
            gives its configuration, checked, and its tasks; None where nothing is to be begun.

    Raises:
        UserError: the text says how to go on where there is something to go on with.
        SystemExit: a signal or a closed pipe stopped the run.
    """
    began = time.monotonic()
    named = {
        "federation.clients": options.clients,
        "data.dir": None if options.data_dir is None else json.dumps(options.data_dir),
        **further,
    }
    asked = options.seeds is not None or bool(options.sweep)
    if options.resume is not None:
        run = _reopened(options, named, check)
        _train_to_end(run, train, f"go on with: {command} --resume {_quoted(run)}", began)
        return
    source = None if options.start_from is None else RunFolder.open(options.start_from)
    if options.allow_changed_images:
        raise UserError(
            "--allow-changed-images is for --resume: a new run takes the images that are there"
        )
    if asked and options.print_config:
        raise UserError("--print-config is of one run; leave --seeds and --sweep out")
    found = variants(options.seeds, options.sweep, options.overrides, named) if asked else []
    if asked and plan is not None:
        print(f"runs:       {len(found)}, one after the other; what follows is of each", flush=True)
    # What is said on the way is no YAML.
    with redirect_stdout(sys.stderr) if options.print_config else nullcontext():
        if plan is None:
            settings = None if source is None else source.config
            config = requested_config(options.config, options.overrides, named, settings)
            tasks = check(config)
        elif (planned := plan(named, source)) is None:
            return
        else:
            config, tasks = planned

    def begin(folder: Path | None, config: RunConfig) -> RunFolder:
        return RunFolder.create(folder, config, _start(source, config, tasks))

    if options.print_config:
        print(config.to_yaml(), end="")
    elif asked:
        train_many(
            config,
            found,
            options.run_dir,
            begin,
            lambda run, config: _same_run(run, config, check, allow_changed_images=False),
            check,
            lambda run, how: _train_to_end(run, train, how, time.monotonic()),
        )
    else:
        run = begin(options.run_dir, config)
        _train_to_end(run, train, f"go on with: {command} --resume {_quoted(run)}", began)


def _start(
    source: RunFolder | None, config: RunConfig, tasks: "list[Task]"
) -> "tuple[Origin, Shared] | None":
    """The φ that a new run starts from; None where it has initial values of its own."""
    if source is None:
        return None
    from srfed.runs.start import start_of

    return start_of(source.path, config, tasks)


def _reopened(
    options: argparse.Namespace, named: Named, check: "Callable[..., list[Task]]"
) -> RunFolder:
    """The run of --resume, checked, under what it is asked for now."""
    for option in NEW_ALONE:
        if getattr(options, option, None):
            name = "from" if option == "start_from" else option.replace("_", "-")
            raise UserError(
                f"--{name} is for a new run: --resume goes on with what the run was begun with"
            )
    if options.run_dir is not None:
        raise UserError("--resume names the run's folder; leave --run-dir out")
    run = RunFolder.open(options.resume)
    config = requested_config(options.config or run.config_file, options.overrides, named)
    return _same_run(run, config, check, allow_changed_images=options.allow_changed_images)


def _same_run(
    run: RunFolder,
    config: RunConfig,
    check: "Callable[..., list[Task]]",
    *,
    allow_changed_images: bool,
) -> RunFolder:
    """A run that was begun, under a configuration; checked."""
    run = run.reconfigure(config)
    record = run.images if run.started or run.images.exists() else None
    check(config, record, allow_changed_images=allow_changed_images)
    return run


def _train_to_end(
    run: RunFolder, train: Callable[[RunFolder], None], how: str, began: float
) -> None:
    """Train a run, and say how it went since ``began``; ``how`` to go on where it is stopped."""
    started_at = time.time()
    if finished(run):
        print(
            f"{relative(run.path)} is finished already; a larger federation.rounds would go on "
            "with it"
        )
    else:
        _announce(run)
        try:
            train(run)
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            tell(f"stopped; {how}")
            raise SystemExit(status_of(stop)) from None
        except UserError as error:
            text = f"{error}{_last_reason(run, since=started_at)}"
            raise UserError(f"{text}; once it is mended, {how}") from error
    summary = summarise(MetricsLog(run.metrics), time.monotonic() - began)
    write_bytes(run.summary, f"{summary}\n".encode())
    # What it draws with takes a second to import, which nobody waits for before the run.
    from srfed.reporting.report import write_report

    write_report(run)
    print(f"\n{summary}")
    _show_where(run)


def _quoted(run: RunFolder) -> str:
    return shlex.quote(str(relative(run.path)))


def _last_reason(run: RunFolder, since: float) -> str:
    """What a simulated client has last put in its own log, as here the same person owns run and
    clients.
    """
    logs = [
        log
        for log in run.clients.glob("*/client.log")
        if log.stat().st_mtime >= since and log.read_text(errors="replace").strip()
    ]
    if not logs:
        return ""
    latest = max(logs, key=lambda log: log.stat().st_mtime)
    return (
        f"; {relative(latest)} ends with: "
        f"{latest.read_text(errors='replace').rstrip().splitlines()[-1]}"
    )


def _announce(run: RunFolder) -> None:
    from srfed.data import describe_images

    config = run.config
    print(
        f"{config.name}: {config.federation.clients} clients, {config.federation.rounds} rounds, "
        f"{exclusive_in_words(config.model.exclusive_stages, config.model.owned)}, "
        + (
            f"backend {config.resources.backend}"
            if config.training.method == "federated"
            else config.training.method
        )
    )
    for line in describe_images(config.data, config.federation.clients):
        print(line)
    if run.starts_from:
        print(f"starts from {run.starts_from}")
    print(f"run folder: {run.path}")
    print(f"follow it:  srfed watch {shlex.quote(str(relative(run.path)))}")
    print(f"curves:     tensorboard --logdir {relative(run.tensorboard)}", flush=True)


def _show_where(run: RunFolder) -> None:
    path = relative(run.path)
    pictures = sorted(run.samples.glob("round-*.png"))
    print()
    if pictures:
        print(f"samples:    {relative(pictures[-1])}")
    print(f"report:     {relative(run.report)}")
    print(f"curves:     tensorboard --logdir {relative(run.tensorboard)}")
    print(f"more:       srfed sample --run {path} --n 64 --out grid.png")


def _plan(options: argparse.Namespace, named: Named, source: RunFolder | None) -> "Planned | None":
    """The configuration of a new run and its tasks, where it is to be begun; what it will take is
    said.
    """
    from srfed.runs.proposed import propose

    proposal = propose(
        options.data_dir, options.config, options.overrides, named, quick=options.quick
    )
    for line in proposal.words:
        print(line, flush=True)
    proposed, settings, free = proposal.overrides, None, proposal.free
    if source is not None:
        # The network is that of the run that this one starts from.
        settings, free = source.config, False
        proposed = [one for one in proposed if not one.startswith("model.")]
    config = requested_config(proposal.base, [*proposed, *options.overrides], named, settings)
    tasks = check_simulation(config)
    from srfed.plan import plan_run

    plan = plan_run(config, tasks, free=free, quick=proposal.fitted)
    print("\n".join(plan.lines()), flush=True)
    if options.dry_run:
        print("nothing was begun (--dry-run)")
        return None
    return plan.config, tasks


def _simulate(run: RunFolder) -> None:
    """A signal stops the run between two replies."""
    from srfed.api import train_run
    from srfed.federation.flower.exchange import StoppedError, stop_requested
    from srfed.reporting.curves import shown_on_terminal

    with stopping_gently(stop_requested, StoppedError):
        train_run(run, shown_on_terminal(run))


def _centralise(run: RunFolder) -> None:
    from srfed.api import train_run
    from srfed.reporting.curves import shown_on_terminal

    train_run(run, shown_on_terminal(run))

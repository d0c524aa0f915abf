"""The front door: train a run, open one, and work with what it has learned.

import srfed

run = srfed.train(srfed.load_config("configs/mnist.yaml"), run_dir="runs/mnist")
images = run.sample("digit-3", 64)
"""

import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srfed.config import RunConfig, load_config, parse_config
from srfed.data.contents import describe_contents
from srfed.data.given import given_tasks
from srfed.data.images import Images
from srfed.data.stored import check_tasks, store_tasks
from srfed.data.tasks import Task
from srfed.environment import surroundings_kept
from srfed.errors import UserError, optional
from srfed.files import exists
from srfed.observer import Observer
from srfed.records import TaskInfo
from srfed.runs.checks import check_training, finished
from srfed.runs.loop import run_rounds
from srfed.runs.run import TrainedRun, TrainedSite
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder, usual_folder

if TYPE_CHECKING:
    from srfed.diffusion.objective import Objective
    from srfed.diffusion.process import Denoiser
    from srfed.diffusion.sampler import Sampler
    from srfed.evaluation.metrics.own import Metric
    from srfed.federation.updates import UpdateStep
    from srfed.networks.network import Network
    from srfed.networks.partition import Shared
    from srfed.storage.start import Origin

TASKS_FILE = "tasks.npz"
"""Where a run's folder keeps tasks that were given as arrays."""


def train(
    config: RunConfig,
    tasks: Any = None,
    network: "type[Network] | None" = None,
    *,
    objective: "type[Objective] | None" = None,
    sampler: "type[Sampler] | None" = None,
    update_steps: "Sequence[str | type[UpdateStep]] | None" = None,
    observers: Iterable[Observer] = (),
    metrics: "Mapping[str, Metric] | None" = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    start_from: "str | Path | Run | None" = None,
) -> "Run":
    """Train a run to its last evaluation: a simulated federation, or one party with all images.

    Works in any thread and as often as one likes in a process. Nothing is printed unless an
    observer does; the run's folder has metrics.jsonl, checkpoints, curves, pictures, report.html.

    Args:
        config: what is asked, see :func:`srfed.load_config`.
        tasks: the owners' images; None takes those that ``config.data`` names. A list of
            :class:`srfed.Task`; a mapping of owners' names to data sets (torch's, a table with a
            column "image", arrays); one data set with labels; or a partitioner of flwr-datasets:
            see :func:`srfed.data.given.given_tasks`. They are converted once and kept in the run's
            folder, and their number is the number of clients. All images of all owners are in
            memory three times while that is done, at a byte a value.
        network: a class of your own, :class:`srfed.networks.network.Network`; None takes that of
            ``config.model``. It must stand in a module that every process can import; its options
            are ``model.options``.
        objective: a class of your own, :class:`srfed.diffusion.objective.Objective`, in place of
            ``diffusion.prediction``; it stands where ``network`` does, and may take settings of the
            section ``diffusion``.
        sampler: one of :class:`srfed.diffusion.sampler.Sampler`, in place of ``sampling.sampler``,
            with settings of the section ``sampling``.
        update_steps: what a client does to its update before it travels, in place of
            ``updates.steps``: names, and classes of your own after
            :class:`srfed.federation.updates.UpdateStep`.
        observers: told what happens; what one raises ends the run, with all finished rounds kept.
            ``on_notice`` says too, when the run begins, which tasks' images hold next to nothing.
        metrics: metrics of your own by name: functions of (real, generated), each uint8 N x H x W x
            C, that return a number. They are called at every evaluation, for each owner and for all
            together, where the images are; they are in metrics.jsonl, curves, table and report.
            ``real`` are held-out images.
        run_dir: the run's folder, new or empty; None takes runs/<name>-<time>.
        resume: go on with the run in ``run_dir``, which must have been begun with this
            configuration and these tasks; a larger ``federation.rounds`` is allowed.
        start_from: a trained run, or its folder, whose averaged φ the new run starts from, in place
            of initial values; its owners are new, and so is every θ_i. ``model`` and ``diffusion``
            must be that run's. φ is kept in the new run's folder, and its digest in run.json.

    Returns:
        The run, opened for use.

    Raises:
        UserError: something is impossible, does not fit or cannot be written; before any work where
            it can be known then.
    """
    folder = None if run_dir is None else Path(run_dir).absolute()
    if tasks is not None:
        tasks = given_tasks(config.data, tasks)
    config = _with_own(config, network, objective, sampler, update_steps)
    origin = start_from.path if isinstance(start_from, Run) else start_from
    if resume and origin is not None:
        raise UserError(
            f"start_from = {origin} is for a new run: what {run_dir} was begun with is in its "
            "folder"
        )
    if metrics:
        from srfed.evaluation.metrics.own import OwnMetrics

        # Before anything is written.
        OwnMetrics(metrics, config)
    source = None if origin is None else Path(origin)
    run, lines = (
        _resumed(config, tasks, folder) if resume else _begun(config, tasks, folder, source)
    )
    if not finished(run):
        from srfed.reporting.curves import Curves
        from srfed.reporting.report import write_report

        if run.config.training.method == "federated":
            # Centralised training does without Flower.
            from srfed.federation.flower.exchange import stop_requested

            # Only commands ask in this way; what an earlier run has left must not stop this one.
            stop_requested.clear()
        observers = list(observers)
        told = _Contents(lines, observers)
        train_run(run, [Curves(run), *observers, told], metrics)
        write_report(run)
    return Run(run.path)


def open_run(path: str | Path, *, device: str = "auto") -> "Run":
    """Open a run's folder, or the store of a deployed site or of an adaptation.

    Args:
        path: the folder.
        device: where to sample: "auto", "cpu" or "cuda".

    Raises:
        UserError: it is none of these, has no checkpoint yet, or is damaged.
    """
    return Run(Path(path), device=device)


class Run:
    """A trained run, opened for use; see :func:`open_run`.

    Attributes:
        path: its folder.
        config: what it was trained with.
        round: the round of its weights: of the last checkpoint, or of the best one where that is
            the run's result.
        tasks: names of its tasks; of a site's store, its own alone.
    """

    def __init__(self, path: Path, *, device: str = "auto") -> None:
        self.path = path.absolute()
        self._device = device
        resources = load_config(None, [f"resources.device={device}"]).resources
        is_run = exists(self.path / "run.json")
        self._trained = (TrainedRun if is_run else TrainedSite)(self.path, resources)
        self.config: RunConfig = self._trained.config
        self.round: int = self._trained.round
        self.tasks: list[str] = [task.task for task in self._trained.tasks]

    def sample(self, task: str | int, n: int, seed: int = 0) -> Images:
        """Generate images of a task through its averaged (φ, θ_i).

        Args:
            task: its name or position.
            n: how many, at least 1.
            seed: the same seed gives the same images.

        Returns:
            uint8, n x H x W x C.

        Raises:
            UserError: no such task, or n is impossible.
        """
        if n < 1:
            raise UserError(f"n = {n} is impossible; allowed: 1 or more")
        from srfed.evaluation.generation import generate

        info = self._trained.find_task(task)
        return generate(
            self._trained.denoiser(info),
            self._trained.objective.process,
            self.config.sampling,
            count=n,
            shape=self._trained.shape_of(info),
            seed=seed,
            task=info.client,
        ).images

    def denoiser(self, task: str | int) -> "Denoiser":
        """E[x_0 | x_t] of a task's averaged (φ, θ_i): all that samplers and scores see of it.

        Args:
            task: its name or position.

        Returns:
            (x_t (N, C, H, W), times (N,)) -> (N, C, H, W), on the run's device; a time is a
            timestep 1..T, or a noise level where ``diffusion.prediction`` is edm. The next call of
            this method reuses the network.

        Raises:
            UserError: no such task.
        """
        return self._trained.denoiser(self._trained.find_task(task))

    def evaluate(
        self,
        samples: int = 10_000,
        *,
        seed: int = 0,
        network: str | None = None,
        ssim_images: int | None = None,
        ssim_steps: int | Literal["all"] | None = None,
        quantile: float = 0.05,
        references: str | Path | None = None,
    ) -> dict[str, Any]:
        """Score the run's weights in every way there is; a second call finds what the first left.

        Args:
            samples: generated images, of all tasks together.
            seed: of the samples.
            network: "embedded" or "inception"; None takes the run's.
            ssim_images: test images of each task for SSIM-rec; None takes the run's.
            ssim_steps: in which they are taken back; "all" takes Algorithm 2, None the run's way.
            quantile: of the memorisation audit, above 0 and below 0.5.
            references: where statistics of real images are kept between runs.

        Returns:
            Plain values: what was measured on what, and the scores (docs/evaluation.md).

        Raises:
            UserError: a value is impossible, the images are not there or have changed, or this is
                no run's folder.
        """
        if not isinstance(self._trained, TrainedRun):
            raise UserError(
                f"{self.path} is a site's store: scores are made where a run's folder is"
            )
        if not 0 < quantile < 0.5:
            raise UserError(f"quantile = {quantile} is impossible; allowed: above 0 and below 0.5")
        from srfed.evaluation.features.load import load_feature_network
        from srfed.runs.scoring import ScoringSettings, evaluate_run

        given = {"samples": samples, "feature_network": network, "ssim_images": ssim_images}
        content = self.config.model_dump(mode="json")
        content["evaluation"] |= {key: v for key, v in given.items() if v is not None}
        if ssim_steps is not None:
            content["evaluation"]["ssim_steps"] = None if ssim_steps == "all" else ssim_steps
        evaluation = parse_config(content, "evaluate").evaluation
        return evaluate_run(
            self.path,
            self._trained,
            ScoringSettings(
                samples=evaluation.samples,
                seed=seed,
                sampling=self.config.sampling,
                ssim_images=evaluation.ssim_images,
                ssim_timesteps=tuple(sorted({evaluation.ssim_timestep, *evaluation.ssim_curve})),
                ssim_steps=evaluation.ssim_steps,
                quantile=quantile,
            ),
            load_feature_network(
                evaluation.feature_network, evaluation.inception_weights, self._trained.device
            ),
            reference_folder=None if references is None else Path(references),
        )

    def metrics(self) -> list[dict[str, Any]]:
        """Every round and every evaluation, in order, as pandas takes them; "kind" says which.

        Raises:
            UserError: the log cannot be read; a site's store has none.
        """
        if not exists(self.path / "run.json"):
            raise UserError(f"{self.path} is a site's store: it has no metrics")
        log = MetricsLog(RunFolder.open(self.path).metrics)
        return [dict(line) for line in log.lines() if line["kind"] in ("round", "evaluation")]

    def frame(self) -> Any:
        """:meth:`metrics` as a tidy pandas table: one number a row, with the columns kind ("round"
        or "evaluation"), round, final, metric, owner ("all" of a mean or a score over all) and
        value (:func:`srfed.reporting.frame.tidy`).

        Raises:
            UserError: pandas is not installed; or as :meth:`metrics`.
        """
        from srfed.reporting.frame import tidy

        rows = tidy(self.metrics())
        pandas = optional("pandas", "Run.frame()", "pandas")
        return pandas.DataFrame(rows)

    def adapt(
        self,
        task: Task,
        *,
        out: str | Path,
        mode: str = "frozen",
        steps: int = 150,
        every: int | None = None,
        samples: int = 200,
        seed: int = 0,
    ) -> "Run":
        """Fit a task that the run has not seen; nobody else takes part.

        Args:
            task: the new task, of the shape of one of the run's, with at least two training and
                test images. Its validation images, if any, choose the step whose model is kept;
                otherwise it is the last.
            out: the folder of the adaptation; one that is finished is opened again.
            mode: "frozen" (φ stays), "thawed" (φ moves, here only) or "scratch" (nothing is taken
                over but the initialisation).
            steps: local steps in all.
            every: local steps between two scores; None scores six times.
            samples: images for each score.
            seed: of training and samples.

        Returns:
            The adapted model, opened: its one task is the new one. A task whose images hold next to
            nothing is warned of.

        Raises:
            UserError: a value is impossible, the images do not fit, or ``out`` is another
                adaptation's.
        """
        from srfed.evaluation.features.load import load_feature_network
        from srfed.runs.adapting import (
            AdaptationFolder,
            computed_here,
            fitting_task,
            images_hash,
            score_adaptation,
            tensors_hash,
        )
        from srfed.training.adaptation import MODES, adaptation_config

        if mode not in MODES:
            raise UserError(f"mode = {mode!r} is unknown; allowed: {', '.join(MODES)}")
        for name, value, least in (("steps", steps, 1), ("samples", samples, 2), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name} = {value} is impossible; allowed: {least} or more")
        check_tasks([task])
        trained = self._trained
        for line in describe_contents(trained.config.data, [task]):
            warnings.warn(line, stacklevel=2)
        task = fitting_task(trained.shapes, task)
        config = computed_here(trained.config, self._device, cuda=trained.device.type == "cuda")
        evaluation, every = config.evaluation, every or -(-steps // 6)
        network = load_feature_network(
            evaluation.feature_network, evaluation.inception_weights, trained.device
        )
        own = adaptation_config(
            config, mode, images=len(task.train), steps=steps, every=every, seed=seed
        )
        about = {
            "task": task.name,
            "core_sha256": tensors_hash(trained.shared),
            "images_sha256": images_hash(task),
            "images": len(task.train),
            "steps": steps,
            "every": every,
            "samples": samples,
            "seed": seed,
            "network": network.identity,
        }
        with AdaptationFolder.held(Path(out).absolute(), about) as folder:
            if not folder.has(mode, task.name):
                curve = list(
                    score_adaptation(
                        config,
                        trained.shared,
                        task,
                        network,
                        mode=mode,
                        steps=steps,
                        every=every,
                        samples=samples,
                        seed=seed,
                    )
                )
                folder.add(own, mode, task.name, curve)
            return Run(folder.store(mode, task.name), device=self._device)


def train_run(
    run: RunFolder,
    observers: Iterable[Observer] = (),
    metrics: "Mapping[str, Metric] | None" = None,
) -> None:
    """Train what a run's folder asks for, to its last evaluation, as its configuration says.

    Args:
        run: the folder; where there is a checkpoint, the run goes on from it.
        observers: told what happens; without one nothing is printed.
        metrics: of one's own, as for :func:`train`.

    Raises:
        UserError: the run cannot be finished, a metric fails; and whatever an observer raises. All
            finished rounds are on disk.
    """
    from srfed.evaluation.metrics.own import OwnMetrics

    own = OwnMetrics(metrics, run.config) if metrics else None
    if run.config.training.method != "federated":
        from srfed.runs.centralised import Centralised

        run_rounds(run, Centralised(run, own), observers)
    elif run.config.resources.backend == "ray":
        with surroundings_kept():
            # Loading Flower's engine and Ray changes them too.
            from srfed.federation.flower.ray import run_on_ray

            run_on_ray(run, observers, metrics=own)
    else:
        from srfed.federation.flower.in_process import run_in_process

        run_in_process(run, observers, metrics=own)


class _Contents(Observer):
    """Tells other observers, when the run begins, which images hold next to nothing."""

    def __init__(self, lines: Sequence[str], others: Iterable[Observer]) -> None:
        self._lines, self._others = lines, others

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        for observer in self._others:
            for line in self._lines:
                observer.on_notice(line)


def _with_own(
    config: RunConfig,
    network: "type[Network] | None",
    objective: "type[Objective] | None",
    sampler: "type[Sampler] | None",
    update_steps: "Sequence[str | type[UpdateStep]] | None",
) -> RunConfig:
    """The configuration with parts of one's own, by the names under which they can be loaded."""
    content = config.model_dump(mode="json")
    if network is not None:
        model = content["model"]
        kept = {key: v for key, v in model.items() if key in ("exclusive_stages", "options")}
        content["model"] = {**kept, "network": _loadable_name(network)}
    if objective is not None:
        content["diffusion"]["prediction"] = _loadable_name(objective)
    if sampler is not None:
        content["sampling"]["sampler"] = _loadable_name(sampler)
    if update_steps is not None:
        content["updates"]["steps"] = [
            step if isinstance(step, str) else _loadable_name(step) for step in update_steps
        ]
    return parse_config(content, "what was passed")


def _loadable_name(part: type) -> str:
    module = part.__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    if module == "__main__" and script is not None:
        # Other processes know a script by its file's name alone.
        module = Path(script).stem
    return f"{module}:{part.__qualname__}"


def _begun(
    config: RunConfig, tasks: Sequence[Task] | None, folder: Path | None, source: Path | None
) -> tuple[RunFolder, list[str]]:
    def start(config: RunConfig, loaded: Sequence[Task]) -> "tuple[Origin, Shared] | None":
        if source is None:
            return None
        from srfed.runs.start import start_of

        return start_of(source, config, loaded)

    if tasks is None:
        found = check_training(config)
        return RunFolder.create(folder, config, start(config, found)), describe_contents(
            config.data, found
        )
    check_tasks(tasks)
    with tempfile.TemporaryDirectory() as scratch:
        # Where everything is looked at before the run has a folder.
        store_tasks(Path(scratch) / TASKS_FILE, tasks)
        found = check_training(_of_stored(config, Path(scratch), len(tasks)))
        origin = start(config, found)
    folder = folder or usual_folder(config).absolute()
    run = RunFolder.create(folder, _of_stored(config, folder, len(tasks)), origin)
    store_tasks(run.path / TASKS_FILE, tasks)
    return run, describe_contents(run.config.data, found)


def _resumed(
    config: RunConfig, tasks: Sequence[Task] | None, folder: Path | None
) -> tuple[RunFolder, list[str]]:
    if folder is None:
        raise UserError("resume needs run_dir, the folder of the run to go on with")
    run = RunFolder.open(folder)
    if exists(folder / TASKS_FILE):
        config = _of_stored(config, folder, run.config.federation.clients)
    if tasks is not None:
        from srfed.data import ImageRecord, load_tasks

        check_tasks(tasks)
        given = run.config.data.model_copy(update={"validation_images": 0})
        known = load_tasks(given, run.config.federation.clients)
        records = [[asdict(ImageRecord.of(task)) for task in each] for each in (known, tasks)]
        if [task.name for task in known] != [task.name for task in tasks] or (
            records[0] != records[1]
        ):
            raise UserError(f"the tasks are others than those that {folder} was begun with")
    run = run.reconfigure(config)
    found = check_training(run.config, run.images if run.started else None)
    return run, describe_contents(run.config.data, found)


def _of_stored(config: RunConfig, folder: Path, clients: int) -> RunConfig:
    """The configuration of a run whose tasks are kept in a folder."""
    content = config.model_dump(mode="json")
    content["data"] |= {"dataset": "npz", "dir": str(folder / TASKS_FILE)}
    content["federation"] |= {"clients": clients}
    return parse_config(content, "configuration")

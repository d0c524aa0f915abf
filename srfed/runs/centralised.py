"""A centralised run from its first round, or its last checkpoint, to its final evaluation."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from srfed.data import Task, load_recorded_tasks, record_tasks
from srfed.data.tasks import check_one_shape
from srfed.device import memory_layout, place_of, resolve_device
from srfed.diffusion.process import Denoiser
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.metrics.colour import colours
from srfed.evaluation.metrics.denoising_loss import comparable_loss, denoising_losses
from srfed.evaluation.metrics.nearest_neighbour import Recogniser
from srfed.evaluation.metrics.own import OwnMetrics
from srfed.evaluation.references import RealFloor, References
from srfed.evaluation.report import Recognised, TaskReport, evaluation_record
from srfed.evaluation.shares import share_of_samples
from srfed.evaluation.task import evaluate_task, generate_share
from srfed.flat import copies
from srfed.model import (
    build_model,
    build_objective,
    build_partition,
    captured_forwards,
    denoiser_of_task,
)
from srfed.networks.partition import Shared
from srfed.observer import Observer
from srfed.records import EvaluationRecord, Place, ResultRound, RoundRecord, TaskInfo
from srfed.runs.best_round import judge_round, result_of
from srfed.runs.start import started
from srfed.storage.checkpoint import check_tensors
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import RunState, ServerCheckpoints
from srfed.training.centralised import CentralisedResult, CentralisedState, CentralisedTrainer
from srfed.training.divergence import Divergence, remedy
from srfed.training.optimizer import learning_rate_factor
from srfed.training.part import Part, initial_state, load_tensors


class Centralised:
    """Centralised training as the loop's trainer (:class:`srfed.runs.trainer.Trainer`).

    Checkpoints are a federation's: φ at the server, each θ_i in its task's store.

    Args:
        run: a run whose ``training.method`` is a centralised one.
        metrics: of one's own, called at every evaluation.
    """

    def __init__(self, run: RunFolder, metrics: OwnMetrics | None = None) -> None:
        self._run, self._config, self._metrics = run, run.config, metrics
        self.tasks: list[TaskInfo] = []
        self.place: Place | None = None

    def begin(self, found: RunState | None, tell: Observer) -> RunState:
        """Load the images, and the state that was found.

        Raises:
            UserError: images do not fit or have changed, or what was found is of another model.
        """
        config, run = self._config, self._run
        torch.set_num_threads(config.resources.client_cpus)
        self._images = load_recorded_tasks(config.data, config.federation.clients, run.images)
        check_one_shape(self._images, f"training.method = {config.training.method}")
        record_tasks(run.images, self._images)
        self.tasks = [
            TaskInfo(task.name, task.name, len(task.train), len(task.test)) for task in self._images
        ]
        device, layout = resolve_device(config.resources), memory_layout(config.resources)
        self.place = place_of(config.resources, device)
        model = build_model(config, self._images[0].train.shape[-1])
        self._partition = build_partition(config, model)
        self._initial = initial_state(model, self._partition)
        shared = Shared(copies(self._partition.take_shared(model.state_dict())))
        self._model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self._forwards = captured_forwards(self._model, config.resources, device)
        self._objective = build_objective(config, device)
        self._trainer = CentralisedTrainer(
            config, self._model, self._partition, self._objective, self._images
        )
        network = load_feature_network(
            config.evaluation.feature_network, config.evaluation.inception_weights, device
        )
        self._references = References(network, {task.name: task.test for task in self._images})
        self._floor = RealFloor(self._references, self._images)
        self._recogniser = Recogniser(self._images)
        if found is not None:
            checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
            checkpoints.check(found, shared)
        else:
            shared = started(run, self._partition, shared)
        state = found or RunState(
            lineage=run.lineage,
            round=0,
            shared=Part(shared, Shared(copies(shared))),
            shapes={task.name: task.shape for task in self._images},
            clients=tuple(task.name for task in self._images),
        )
        self._own = self._restore(state)
        return state

    def train_round(self, state: RunState, tell: Observer) -> tuple[RunState, RoundRecord]:
        """The next round, of as many images as a federated one."""
        number, before, began = state.round + 1, self._own, time.perf_counter()
        result = self._trainer.train(number, before)
        seconds = time.perf_counter() - began
        self._refuse_diverged(number, result)
        self._own = result.state
        record = self._record(number, before, result, seconds)
        state = self._save(number, state)
        if self._config.validation_due(number):
            state, validation = judge_round(state, self._validation_losses(), tell)
            record = replace(record, validation=validation, seconds=time.perf_counter() - began)
        return state, record

    def evaluate(self, state: RunState, tell: Observer, *, final: bool) -> EvaluationRecord | None:
        """Judge the averaged weights of every task; at the end those of the best round, if that is
        the result.

        Raises:
            DamagedError: a checkpoint of the best round is damaged.
        """
        own, result = self._own, None
        if final and state.best is not None:
            keep = self._config.federation.keep_attempts
            own = self._restore(ServerCheckpoints(self._run.server, keep).load_best(state))
            result = result_of(state)
        return self._evaluate(state.round, own, tell, final, result)

    def _refuse_diverged(self, number: int, result: CentralisedResult) -> None:
        """Raise UserError, before anything of the round is kept, where a loss or a weight is no
        number.
        """
        own = {name: state.exclusive.weights for name, state in result.state.tasks.items()}
        sound = _finite(result.state.shared.weights)
        gone = [
            name
            for name, loss in result.loss_by_task.items()
            # The pool of all tasks has nothing of its own.
            if not (sound and math.isfinite(loss) and _finite(own.get(name, {})))
        ]
        if gone:
            training = self._config.training
            watched = Divergence(training, MetricsLog(self._run.metrics).rounds())
            raise UserError(
                f"round {number}: training has diverged at {watched.in_words(gone)}: losses or "
                f"weights are no numbers; {remedy(training)}"
            )

    def _validation_losses(self) -> dict[str, float]:
        """Of every task's averaged weights, on its own validation images."""
        return {
            task.name: comparable_loss(
                denoising_losses(
                    self._denoiser(place, self._own),
                    self._objective.process,
                    task.validation,
                    task=task.name,
                    seed=self._config.seed,
                )
            )
            for place, task in enumerate(self._images)
        }

    def _denoiser(self, place: int, own: CentralisedState) -> Denoiser:
        """The averaged weights of a task, in evaluation mode."""
        exclusive = own.tasks[self._images[place].name].exclusive
        load_tensors(self._model, own.shared.average, exclusive.average)
        self._model.eval()
        return denoiser_of_task(self._objective, self._model, place, self._forwards)

    def _restore(self, state: RunState) -> CentralisedState:
        tasks = {
            task.name: self._store(task).load(state.attempts[task.name])
            if task.name in state.attempts
            else self._initial
            for task in self._images
        }
        for task in self._images:
            check_tensors(
                str(self._store(task).folder),
                tasks[task.name].exclusive.weights,
                self._initial.exclusive.weights,
            )
        return CentralisedState(state.shared, tasks)

    def _save(self, number: int, state: RunState) -> RunState:
        attempt = f"round-{number:05d}"
        for task in self._images:
            parent = state.attempts.get(task.name, NO_PARENT)
            store = self._store(task)
            if store.has(attempt):
                # The process was stopped between this store and the server's checkpoint: these are
                # its bits.
                continue
            best = NO_PARENT if state.best is None else state.best.attempts[task.name]
            store.save(attempt, parent, number, self._own.tasks[task.name], best=best)
        return replace(
            state,
            round=number,
            shared=self._own.shared,
            attempts={task.name: attempt for task in self._images},
        )

    def _store(self, task: Task) -> ClientStore:
        return ClientStore(
            self._run.clients, task.name, self._run.lineage, self._config.federation.keep_attempts
        )

    def _record(
        self, number: int, before: CentralisedState, result: CentralisedResult, seconds: float
    ) -> RoundRecord:
        squares = [
            (tensor.double() - before.shared.weights[name].double()).square().sum()
            for name, tensor in result.state.shared.weights.items()
        ]
        return RoundRecord(
            round=number,
            loss=result.loss,
            loss_by_client=result.loss_by_task,
            loss_by_quarter=list(result.loss_by_quarter),
            accepted=[task.name for task in self._images],
            refused={},
            missing={},
            images=result.images,
            images_per_second=result.images / seconds,
            bytes_up=0,
            bytes_down=0,
            learning_rate=self._config.training.learning_rate
            * learning_rate_factor(self._config, number),
            update_norm=float(torch.stack(squares).sum().sqrt()) if squares else 0.0,
            disagreement=0.0,
            seconds=seconds,
        )

    def _evaluate(
        self,
        number: int,
        own: CentralisedState,
        tell: Observer,
        final: bool,
        result: ResultRound | None,
    ) -> EvaluationRecord:
        began, settings = time.perf_counter(), self._config.evaluation
        share = share_of_samples(
            settings.samples if final else settings.samples_between, len(self._images)
        )
        reports, images = {}, {}
        for place, task in enumerate(self._images):
            denoiser, process = self._denoiser(place, own), self._objective.process
            evaluated = evaluate_task(
                denoiser,
                process,
                self._config,
                task=task.name,
                train=task.train,
                test=task.test,
                generated=generate_share(
                    denoiser,
                    process,
                    self._config,
                    task=task.name,
                    shape=task.shape,
                    samples=share,
                ),
                final=final,
            )
            if evaluated.no_audit:
                tell.on_notice(f"{task.name}: no memorisation audit: {evaluated.no_audit}")
            generated = evaluated.generated
            images[task.name] = generated.images
            reports[task.name] = TaskReport(
                generated.images,
                generated.strip,
                evaluated.ssim,
                evaluated.ssim_window,
                evaluated.audit,
            )
        return evaluation_record(
            settings,
            number,
            reports,
            self._references.score(images),
            self._floor(images),
            final=final,
            seconds=time.perf_counter() - began,
            recognised=Recognised.of(self._recogniser, images),
            result=result,
            own=None
            if self._metrics is None
            else self._metrics({task.name: task.test for task in self._images}, images),
            colours=colours({task.name: task.test for task in self._images}, images),
        )


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())

"""A centralised run from its first round, or its last checkpoint, to its final evaluation."""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from srfed.data import Task, load_recorded_tasks, record_tasks
from srfed.device import captured_forward, memory_layout, resolve_device
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.references import RealFloor, References
from srfed.evaluation.shares import share_of_samples
from srfed.evaluation.task import evaluate_task
from srfed.model import build_diffusion, build_model, build_partition, noise_of_task
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.console import Console
from srfed.storage.checkpoint import check_tensors
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints, ServerState
from srfed.training.centralised import CentralisedResult, CentralisedState, CentralisedTrainer
from srfed.training.local import initial_state, load_tensors
from srfed.training.optimizer import learning_rate_factor


def train_centralised(run: RunFolder) -> None:
    """Train and evaluate until the last round.

    Args:
        run: a run whose ``training.method`` is a centralised one.

    Raises:
        UserError: the data do not fit, a checkpoint is damaged, a folder is in use.
        KeyboardInterrupt: the last finished round is on disk.
    """
    with run.in_use():
        reporter = Console(run)
        try:
            _CentralisedRun(run, reporter).run()
        finally:
            reporter.close()


class _CentralisedRun:
    """One execution of a run. Checkpoints are a federation's: φ at the server, each θ_i in its
    task's store.
    """

    def __init__(self, run: RunFolder, reporter: Console) -> None:
        self._run, self._reporter = run, reporter
        self._config = config = run.config
        torch.set_num_threads(config.resources.client_cpus)
        self._tasks = load_recorded_tasks(config.data, config.federation.clients, run.images)
        record_tasks(run.images, self._tasks)
        device = resolve_device(config.resources)
        model = build_model(config, self._tasks[0].train.shape[-1])
        self._partition = build_partition(config, model)
        self._initial = initial_state(model, self._partition)
        shared = {
            name: t.clone() for name, t in self._partition.take_shared(model.state_dict()).items()
        }
        layout = memory_layout(config.resources)
        self._model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self._forward = captured_forward(self._model, config.resources, device)
        self._diffusion = build_diffusion(config, device)
        self._trainer = CentralisedTrainer(
            config, self._model, self._partition, self._diffusion, self._tasks
        )
        self._checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
        height, width, channels = self._tasks[0].train.shape[1:]
        self._server = ServerState(
            lineage=run.lineage,
            round=0,
            shared=shared,
            shared_average={name: t.clone() for name, t in shared.items()},
            shape=(height, width, channels),
            clients=tuple(task.name for task in self._tasks),
        )
        network = load_feature_network(
            config.evaluation.feature_network, config.evaluation.inception_weights, device
        )
        self._evaluation = References(network, {task.name: task.test for task in self._tasks})
        self._floor = RealFloor(self._evaluation, self._tasks)

    def run(self) -> None:
        config, reporter = self._config, self._reporter
        if self._run.started:
            found = self._checkpoints.load_last()
            self._checkpoints.check(found, self._server.shared)
            self._server = found
        else:
            self._checkpoints.save(self._server)
        state = self._restore()
        infos = [
            TaskInfo(task.name, task.name, len(task.train), len(task.test)) for task in self._tasks
        ]
        reporter.begin(self._server.round, infos)
        last = self._server.round
        if config.evaluation_due(last) and not reporter.has_evaluation(last):
            self._evaluate(last, state)
        for number in range(last + 1, config.federation.rounds + 1):
            began = time.perf_counter()
            result = self._trainer.train(number, state)
            self._report(number, state, result, time.perf_counter() - began)
            state = result.state
            self._save(number, state)
            if config.evaluation_due(number):
                self._evaluate(number, state)

    def _restore(self) -> CentralisedState:
        tasks = {
            task.name: self._store(task).load(self._server.attempts[task.name])
            if task.name in self._server.attempts
            else self._initial
            for task in self._tasks
        }
        for task in self._tasks:
            check_tensors(
                str(self._store(task).folder), tasks[task.name].exclusive, self._initial.exclusive
            )
        server = self._server
        return CentralisedState(
            server.shared, server.shared_average, tasks, server.shared_moments, server.shared_steps
        )

    def _save(self, number: int, state: CentralisedState) -> None:
        attempt = f"round-{number:05d}"
        for task in self._tasks:
            parent = self._server.attempts.get(task.name, NO_PARENT)
            store = self._store(task)
            if store.has(attempt):
                # The process was stopped between this store and the server's checkpoint: these are
                # its bits.
                continue
            store.save(attempt, parent, number, state.tasks[task.name])
        self._server = replace(
            self._server,
            round=number,
            shared=state.shared,
            shared_average=state.shared_average,
            shared_moments=state.shared_moments,
            shared_steps=state.steps,
            attempts={task.name: attempt for task in self._tasks},
        )
        self._checkpoints.save(self._server)

    def _store(self, task: Task) -> ClientStore:
        return ClientStore(
            self._run.clients, task.name, self._run.lineage, self._config.federation.keep_attempts
        )

    def _report(
        self, number: int, before: CentralisedState, result: CentralisedResult, seconds: float
    ) -> None:
        squares = [
            (tensor.double() - before.shared[name].double()).square().sum()
            for name, tensor in result.state.shared.items()
        ]
        record = RoundRecord(
            round=number,
            loss=result.loss,
            loss_by_client=result.loss_by_task,
            loss_by_quarter=list(result.loss_by_quarter),
            accepted=[task.name for task in self._tasks],
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
        self._reporter.on_round(record)

    def _evaluate(self, number: int, state: CentralisedState) -> None:
        began = time.perf_counter()
        settings, final = self._config.evaluation, number == self._config.federation.rounds
        share = share_of_samples(
            settings.samples if final else settings.samples_between, len(self._tasks)
        )
        images, strips, curves, windows, audits = {}, {}, {}, [], {}
        for place, task in enumerate(self._tasks):
            load_tensors(
                self._model, state.shared_average, state.tasks[task.name].exclusive_average
            )
            self._model.eval()
            evaluated = evaluate_task(
                noise_of_task(self._model, place, self._forward),
                self._diffusion,
                self._config,
                task=task.name,
                train=task.train,
                test=task.test,
                samples=share,
                final=final,
            )
            if evaluated.audit is not None:
                audits[task.name] = evaluated.audit
            if evaluated.no_audit:
                self._reporter.on_notice(
                    f"{task.name}: no memorisation audit: {evaluated.no_audit}"
                )
            images[task.name], strips[task.name] = (
                evaluated.generated.images,
                evaluated.generated.strip,
            )
            if evaluated.ssim:
                curves[task.name] = evaluated.ssim
                windows.append(evaluated.ssim_window)
        scores = self._evaluation.score(images)
        self._reporter.on_evaluation(
            EvaluationRecord(
                round=number,
                final=final,
                score_name=scores.name,
                score=scores.overall,
                score_by_client=scores.per_task,
                floor=self._floor(images),
                samples=scores.samples,
                references=scores.references,
                ssim_timestep=settings.ssim_timestep,
                ssim=_mean_curve(curves),
                ssim_by_client={
                    name: curve[settings.ssim_timestep] for name, curve in curves.items()
                },
                ssim_window=max(windows, default=0),
                audits=audits,
                grids={name: group[: settings.grid_columns] for name, group in images.items()},
                strips=strips,
                refused={},
                missing={},
                bytes_up=0,
                bytes_down=0,
                seconds=time.perf_counter() - began,
            )
        )


def _mean_curve(curves: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    timesteps = sorted({timestep for curve in curves.values() for timestep in curve})
    return {t: sum(curve[t] for curve in curves.values()) / len(curves) for t in timesteps}

"""The one loop in which every run is trained, federated or centralised, begun or resumed."""

from collections.abc import Iterable
from dataclasses import replace

from srfed.observer import Observer, Observers
from srfed.records import TaskInfo
from srfed.runs.trainer import Trainer
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import RunState, ServerCheckpoints
from srfed.training.divergence import Divergence


def run_rounds(run: RunFolder, trainer: Trainer, observers: Iterable[Observer] = ()) -> None:
    """Begin a run or go on with it, to its last evaluation.

    Stopped anywhere and gone on with, it ends in the bits of a run that was never stopped.

    Args:
        run: its folder.
        trainer: trains and judges.
        observers: told what happens.

    Raises:
        UserError: the folder is in use or damaged, or the trainer cannot go on; and whatever an
            observer raises. The last finished round is on disk.
    """
    config, log = run.config, MetricsLog(run.metrics)
    tell = Observers([_Joining(log), *observers])
    checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
    with run.in_use():
        try:
            found = checkpoints.load_last() if run.started else None
            if found is not None:
                found = _with_known_best(found, checkpoints, tell)
            state = trainer.begin(found, tell)
            if found is None:
                checkpoints.save(state)
            tasks, lost = log.begin(state.round, trainer.tasks)
            moved = ""
            if (place := trainer.place) is not None:
                moved = run.note_place(place, state.round)
                tell.on_place(place)
            tell.on_begin(tasks, state.round)
            if moved:
                tell.on_notice(moved)
            if lost:
                tell.on_notice(lost)
            watched = Divergence(config.training, log.rounds())
            while True:
                final = state.round == config.federation.rounds
                due = config.evaluation_due(state.round)
                if due and not log.has_evaluation(state.round, final=final):
                    tell.on_start("evaluation", state.round, final=final)
                    evaluation = trainer.evaluate(state, tell, final=final)
                    if evaluation is not None:
                        tell.on_judged(evaluation)
                        log.add_evaluation(evaluation)
                        tell.on_evaluation(evaluation)
                if state.round >= config.federation.rounds:
                    return
                tell.on_start("round", state.round + 1)
                state, record = trainer.train_round(state, tell)
                record = replace(record, lowered=run.lowered_after(record.round - 1))
                # First: a resumed run drops records of rounds that have no checkpoint, but could
                # not make up for one that is missing.
                log.add_round(record)
                checkpoints.save(state)
                tell.on_round(record)
                if said := watched.add(record.round, record.loss_by_client, record.refused):
                    tell.on_notice(said)
        finally:
            tell.on_end()


def _with_known_best(found: RunState, checkpoints: ServerCheckpoints, tell: Observer) -> RunState:
    """The state without its best round where the checkpoint of that has been removed; says so."""
    if found.best is None or found.best.round in checkpoints.rounds():
        return found
    tell.on_notice(
        f"the checkpoint of round {found.best.round}, the best by validation, is gone; the best "
        "round begins anew"
    )
    return replace(found, best=None)


class _Joining(Observer):
    """Puts clients that come later on record."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in {known.client for known in self._log.tasks()}:
            self._log.add_task(task)

"""The reporter: what the server tells goes to the terminal, metrics.jsonl, TensorBoard and
pictures.
"""

import re
import sys
from contextlib import suppress
from typing import Never

from tqdm import tqdm

from srfed.files import list_folder
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo
from srfed.reporting.pace import Pace
from srfed.reporting.pictures import draw_grid, write_png
from srfed.reporting.tensorboard import TensorBoard
from srfed.reporting.units import bytes_in_words, seconds_in_words
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder


class Console:
    """Observes one run (see srfed.federation.flower.strategy.Observer).

    On a terminal a bar counts the clients' replies of the current exchange; elsewhere there is one
    plain line for each round and each evaluation, and nothing between.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._log = MetricsLog(run.metrics)
        self._tensorboard: TensorBoard | None = None
        self._bar: tqdm[Never] | None = None
        self._order: list[str] = []
        self._pace = Pace(run.config)

    def begin(self, last_round: int, tasks: list[TaskInfo]) -> None:
        """Start, or go on after ``last_round``; ``tasks`` in the order of display, before those
        that are away.
        """
        here = {task.client for task in tasks}
        tasks = [
            *tasks,
            *(task for task in self._log.tasks() if last_round and task.client not in here),
        ]
        if last_round and not self._log.rounds():
            self.on_notice(
                f"{self._run.metrics} has nothing of rounds 1 to {last_round}; it begins anew"
            )
        self._log.begin(last_round, tasks)
        self._drop_pictures(last_round)
        self._tensorboard = TensorBoard(
            self._run.tensorboard, self._run.config, last_round, self.on_notice
        )
        self._order = [task.client for task in tasks]
        self._pace.begin(last_round)
        if last_round:
            over = last_round >= self._run.config.federation.rounds
            print(
                "going on after round "
                f"{last_round}{', the last: nothing is trained' if over else ''}",
                flush=True,
            )

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in self._order:
            self._order.append(task.client)
            self._log.add_task(task)
        self.on_notice(f"{task.client} joins with {task.images} images")

    def has_evaluation(self, number: int) -> bool:
        """Whether the evaluation after this round is on record, as the one it has to be."""
        final = number == self._run.config.federation.rounds
        return any(
            line["round"] == number and line["final"] >= final for line in self._log.evaluations()
        )

    def on_reply(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        bar = self._bar or tqdm(
            total=total, desc=what, unit="client", leave=False, dynamic_ncols=True
        )
        bar.update(done - bar.n)
        self._bar = bar

    def on_round(self, record: RoundRecord) -> None:
        self._close_bar()
        self._log.add_round(record)
        if self._tensorboard is not None:
            self._tensorboard.add_round(record)
        last = self._run.config.federation.rounds
        left = self._pace.seconds_left(record, clients=len(self._order))
        print(
            f"round {record.round:>{len(str(last))}}/{last}  loss {record.loss:.4f}  "
            f"{record.images_per_second:,.0f} images/s  up {bytes_in_words(record.bytes_up)}  down "
            f"{bytes_in_words(record.bytes_down)}  left {seconds_in_words(left)}",
            flush=True,
        )
        self._tell_absent(record.refused, record.missing)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._close_bar()
        shown = [client for client in self._order if client in record.grids]
        pictures = {}
        if shown:
            pictures["samples"] = draw_grid({client: record.grids[client] for client in shown})
            pictures["reverse_process"] = draw_grid(
                {client: record.strips[client] for client in shown}
            )
            write_png(self._run.samples / f"round-{record.round:05d}.png", pictures["samples"])
            write_png(
                self._run.samples / f"reverse-process-{record.round:05d}.png",
                pictures["reverse_process"],
            )
        self._log.add_evaluation(record)
        self._pace.count(record, clients=len(self._order))
        if self._tensorboard is not None:
            self._tensorboard.add_evaluation(record, pictures)
        words = [f"{record.score_name} {record.score:.3f} ({record.samples} samples"]
        words[0] += ")" if record.floor is None else f"; real training images {record.floor:.3f})"
        if record.ssim_timestep in record.ssim:
            words.append(f"SSIM-rec@{record.ssim_timestep} {record.ssim[record.ssim_timestep]:.3f}")
        words.append(seconds_in_words(record.seconds))
        print(f"evaluation {record.round}: {'  '.join(words)}", flush=True)
        for client, audit in record.audits.items():
            if audit.fires:
                print(
                    f"  {client} has memorised: {audit.pixels.share:.1%} (pixels) and "
                    f"{audit.features.share:.1%} (features) of its samples are nearer to a "
                    f"training image than {audit.pixels.quantile:.1%} of held-out images",
                    flush=True,
                )
        unaudited = [client for client in record.score_by_client if client not in record.audits]
        if record.final and unaudited and self._run.config.evaluation.memorisation_quantile:
            print(
                f"  no memorisation audit: {', '.join(unaudited)}; a client's own log says why",
                flush=True,
            )
        self._tell_absent(record.refused, record.missing)

    def on_notice(self, text: str) -> None:
        self._close_bar()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close what is open; safe to call at any time."""
        self._close_bar()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _drop_pictures(self, last_round: int) -> None:
        """A resumed run draws those of later rounds again."""
        for name in list_folder(self._run.samples):
            number = re.fullmatch(r"(?:round|reverse-process)-(\d+)\.png", name)
            if number is not None and int(number[1]) > last_round:
                with suppress(OSError):
                    (self._run.samples / name).unlink()

    def _tell_absent(self, refused: dict[str, str], missing: dict[str, str]) -> None:
        for word, reasons in (("refused", refused), ("missing", missing)):
            for client, reason in reasons.items():
                print(f"  {word} {client}: {reason}", flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

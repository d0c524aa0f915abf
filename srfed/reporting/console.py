"""What a run says on the terminal."""

import sys
from collections.abc import Sequence
from typing import Never

from tqdm import tqdm

from srfed.config import RunConfig
from srfed.observer import Observer
from srfed.records import EvaluationRecord, RoundRecord, TaskInfo, ValidationRecord
from srfed.reporting.joining import joining_in_words
from srfed.reporting.pace import Pace
from srfed.units import bytes_in_words, seconds_in_words


class Console(Observer):
    """Prints what happens in a run.

    On a terminal a bar counts the clients' replies of the current exchange; elsewhere there is one
    plain line for each round and each evaluation, and nothing between.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._bar: tqdm[Never] | None = None
        self._clients: list[str] = []
        self._pace = Pace(config)

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        self._clients = [task.client for task in tasks]
        self._pace.begin(last_round)
        if last_round:
            over = last_round >= self._config.federation.rounds
            print(
                "going on after round "
                f"{last_round}{', the last: nothing is trained' if over else ''}",
                flush=True,
            )

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in self._clients:
            self._clients.append(task.client)
        self.on_notice(f"{task.client} joins with {task.images} images")

    def on_progress(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        bar = self._bar or tqdm(
            total=total, desc=what, unit="client", leave=False, dynamic_ncols=True
        )
        bar.update(done - bar.n)
        self._bar = bar

    def on_round(self, record: RoundRecord) -> None:
        self._close_bar()
        last = self._config.federation.rounds
        left = self._pace.seconds_left(record, clients=len(self._clients))
        print(
            f"round {record.round:>{len(str(last))}}/{last}  loss {record.loss:.4f}  "
            f"{record.images_per_second:,.0f} images/s  up {bytes_in_words(record.bytes_up)}  down "
            f"{bytes_in_words(record.bytes_down)}  left {seconds_in_words(left)}",
            flush=True,
        )
        self._tell_absent(record.refused, record.missing)
        if record.validation is not None:
            self._tell_validation(record.validation)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._close_bar()
        self._pace.count(record, clients=len(self._clients))
        words = [f"{record.score_name} {record.score:.3f} ({record.samples} samples"]
        words[0] += ")" if record.floor is None else f"; real training images {record.floor:.3f})"
        if record.ssim_timestep in record.ssim:
            words.append(f"SSIM-rec@{record.ssim_timestep} {record.ssim[record.ssim_timestep]:.3f}")
        words += [f"{n} {own.all:.4g}" for n, own in record.own.items() if own.all is not None]
        words.append(seconds_in_words(record.seconds))
        if record.result is not None:
            print(f"the result: {record.result.in_words(record.round)}", flush=True)
        print(f"evaluation {record.round}: {'  '.join(words)}", flush=True)
        for client, audit in record.audits.items():
            if audit.fires:
                print(
                    f"  {client} has memorised: {audit.pixels.share:.1%} (pixels) and "
                    f"{audit.features.share:.1%} (features) of its samples are nearer to a "
                    f"training image than {audit.pixels.quantile:.1%} of held-out images",
                    flush=True,
                )
        if record.comparisons:
            print(f"  {joining_in_words(list(record.comparisons.values()))}", flush=True)
        unaudited = [client for client in record.score_by_client if client not in record.audits]
        if record.final and unaudited and self._config.evaluation.memorisation_quantile:
            print(
                f"  no memorisation audit: {', '.join(unaudited)}; a client's own log says why",
                flush=True,
            )
        self._tell_absent(record.refused, record.missing)

    def on_notice(self, text: str) -> None:
        self._close_bar()
        print(text, file=sys.stderr, flush=True)

    def on_end(self) -> None:
        self._close_bar()

    def _tell_validation(self, record: ValidationRecord) -> None:
        loss = "told by nobody" if record.loss is None else f"{record.loss:.4f}"
        best = record.result
        so_far = "" if best is None else f"  best {best.loss:.4f} after round {best.round}"
        print(f"  validation loss {loss}{so_far}", flush=True)
        self._tell_absent(
            *(
                {client: f"{reason} (validation)" for client, reason in reasons.items()}
                for reasons in (record.refused, record.missing)
            )
        )

    def _tell_absent(self, refused: dict[str, str], missing: dict[str, str]) -> None:
        for word, reasons in (("refused", refused), ("missing", missing)):
            for client, reason in reasons.items():
                print(f"  {word} {client}: {reason}", flush=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

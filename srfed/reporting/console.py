"""What a run says on the terminal."""

import select
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Never

from tqdm import tqdm

from srfed.config import RunConfig
from srfed.memory import memory_of_processes
from srfed.observer import Observer, Stage
from srfed.records import (
    LOST_STORE_WORDS,
    EvaluationRecord,
    Place,
    RoundRecord,
    TaskInfo,
    ValidationRecord,
    ssim_name,
)
from srfed.reporting.joining import joining_in_words
from srfed.reporting.pace import Pace
from srfed.units import bytes_in_words, seconds_in_words

BETWEEN_LINES = 60.0
"""Where there is no terminal: seconds of silence after which it is said how far the run is, and the
least between two lines of rounds that went well.
"""
TURN, MEMORY_TURN = 0.5, 5.0
"""Seconds between two looks at the run, and at its memory."""
LONGEST_STOP = 5.0


class Console(Observer):
    """Prints what happens in a run: one plain line for each round and each evaluation.

    On a terminal a bar below them shows how much of the round or evaluation at hand is done, the
    time left and the memory. Elsewhere rounds have a line a minute at most, besides the first, the
    last and those in which somebody was absent; and a line says how far the run is where nothing
    was said for a minute. A pipe that nobody reads any more is noticed at the end of every round.
    The last line says what the run took. A thread of its own looks on; it touches nothing of the
    run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._bar: tqdm[Never] | None = None
        self._clients: list[str] = []
        self._pace = Pace(config)
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        self._began = self._said = self._looked = time.monotonic()
        self._told_round: float | None = None
        self._stage = self._answered = ""
        self._lost: set[str] = set()
        self._memory = self._processes = self._at_most = 0

    def on_place(self, place: Place) -> None:
        self._say(f"trains on {place.in_words}")

    def on_begin(self, tasks: Sequence[TaskInfo], last_round: int) -> None:
        self._clients = [task.client for task in tasks]
        self._pace.begin(tasks, last_round)
        self._began = self._said = time.monotonic()
        self._told_round = None
        if last_round:
            over = last_round >= self._config.federation.rounds
            self._say(
                "going on after round "
                f"{last_round}{', the last: nothing is trained' if over else ''}"
            )
        self._look_at_memory()
        self._over.clear()
        self._watcher = threading.Thread(target=self._watch, name="console", daemon=True)
        self._watcher.start()

    def on_join(self, task: TaskInfo) -> None:
        if task.client not in self._clients:
            self._clients.append(task.client)
        self._pace.join(task)
        self.on_notice(f"{task.client} joins with {task.images} images")

    def on_start(self, what: Stage, number: int, *, final: bool = False) -> None:
        with self._lock:
            self._pace.start(what, number, final=final)
            self._answered = ""
            rounds = f"/{self._config.federation.rounds}" if what == "round" else ""
            self._stage = f"{what} {number}{rounds}"

    def on_progress(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._pace.hear(done, total)
            of = "" if self._stage.startswith(what) else f" ({what})"
            self._answered = f"{done} of {total} clients{of}"

    def on_round(self, record: RoundRecord) -> None:
        last = self._config.federation.rounds
        with self._lock:
            self._end_stage()
            self._pace.end_round(record)
            left = self._pace.seconds_left()
        if not self._tells(record):
            if _nobody_reads_output():
                raise BrokenPipeError
            return
        self._told_round = time.monotonic()
        absent = {*record.refused, *record.missing}
        of = f" of {len(record.accepted)} clients" if absent else ""
        self._say(
            f"round {record.round:>{len(str(last))}}/{last}  loss {record.loss:.4f}{of}  "
            f"{record.images_per_second:,.0f} images/s  up {bytes_in_words(record.bytes_up)}  down "
            f"{bytes_in_words(record.bytes_down)}  left {_time_in_words(left)}"
        )
        self._tell_absent(record.refused, record.missing)
        if record.validation is not None:
            self._tell_validation(record.validation)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        with self._lock:
            self._end_stage()
            self._pace.end_evaluation(record)
        words = [f"{record.score_name} {record.score:.3f} ({record.samples} samples"]
        if absent := {*record.refused, *record.missing}:
            words[0] += f", without {len(absent)} client{'s' if len(absent) > 1 else ''}"
        words[0] += ")" if record.floor is None else f"; real training images {record.floor:.3f})"
        if record.ssim_timestep in record.ssim:
            ssim = ssim_name(record.ssim_timestep, record.ssim_steps)
            words.append(f"{ssim} {record.ssim[record.ssim_timestep]:.3f}")
        words += [f"{n} {own.all:.4g}" for n, own in record.own.items() if own.all is not None]
        words.append(seconds_in_words(record.seconds))
        if record.result is not None:
            self._say(f"the result: {record.result.in_words(record.round)}")
        self._say(f"evaluation {record.round}: {'  '.join(words)}")
        for client, colour in record.colours.items():
            if said := colour.differences:
                self._say(f"  samples of {client} are {said} (mean {colour.in_words})")
        for client, audit in record.audits.items():
            if audit.fires:
                self._say(
                    f"  {client} has memorised: {audit.pixels.share:.1%} (pixels) and "
                    f"{audit.features.share:.1%} (features) of its samples are nearer to a "
                    f"training image than {audit.pixels.quantile:.1%} of held-out images"
                )
        if record.comparisons:
            self._say(f"  {joining_in_words(list(record.comparisons.values()))}")
        unaudited = [client for client in record.score_by_client if client not in record.audits]
        if record.final and unaudited and self._config.evaluation.memorisation_quantile:
            self._say(
                f"  no memorisation audit: {', '.join(unaudited)}; a client's own log says why"
            )
        self._tell_absent(record.refused, record.missing)

    def on_notice(self, text: str) -> None:
        with self._lock:
            self._hide_bar()
            print(text, file=sys.stderr, flush=True)

    def on_end(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        self._over.set()
        # Longer only where nobody takes what it is printing.
        watcher.join(LONGEST_STOP)
        with self._lock:
            self._hide_bar()
        self._look_at_memory()
        # Whoever cannot read this has been told by the lines before it, or by what stops the run.
        with suppress(OSError, ValueError):
            self._say(f"after {seconds_in_words(time.monotonic() - self._began)}{self._at_peak()}")

    def _tells(self, record: RoundRecord) -> bool:
        absent = bool(record.refused or record.missing)
        if record.validation is not None:
            absent |= bool(record.validation.refused or record.validation.missing)
        return (
            absent
            or self._told_round is None
            or record.round == self._config.federation.rounds
            or sys.stdout.isatty()
            or time.monotonic() - self._told_round >= BETWEEN_LINES
        )

    def _tell_validation(self, record: ValidationRecord) -> None:
        loss = "told by nobody" if record.loss is None else f"{record.loss:.4f}"
        best = record.result
        so_far = "" if best is None else f"  best {best.loss:.4f} after round {best.round}"
        self._say(f"  validation loss {loss}{so_far}")
        self._tell_absent(
            *(
                {client: f"{reason} (validation)" for client, reason in reasons.items()}
                for reasons in (record.refused, record.missing)
            )
        )

    def _tell_absent(self, refused: dict[str, str], missing: dict[str, str]) -> None:
        for word, reasons in (("refused", refused), ("missing", missing)):
            for client, reason in reasons.items():
                if reason.startswith(LOST_STORE_WORDS):
                    # It stays so until somebody does something: once is enough.
                    if client in self._lost:
                        continue
                    self._lost.add(client)
                self._say(f"  {word} {client}: {reason}")

    def _say(self, line: str) -> None:
        with self._lock:
            self._hide_bar()
            self._said = time.monotonic()
            print(line, flush=True)

    # --- Between the lines ------------------------------------------------------------------------

    def look(self) -> None:
        """Show how far the run is, on a terminal; elsewhere where nothing was said for a minute.

        Raises:
            OSError, ValueError: nobody reads it any more.
        """
        if time.monotonic() - self._looked >= MEMORY_TURN:
            self._look_at_memory()
        with self._lock:
            if self._stage and not self._over.is_set():
                self._show_stage()

    def _watch(self) -> None:
        with suppress(OSError, ValueError):
            while not self._over.wait(TURN):
                self.look()

    def _show_stage(self) -> None:
        # All of it is done when its line is there.
        percent = min(99, int(100 * self._pace.share()))
        memory = f"memory {bytes_in_words(self._memory)}" if self._memory else ""
        words = [self._answered, f"left {_time_in_words(self._pace.seconds_left())}", memory]
        words = [word for word in words if word]
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    desc=self._stage,
                    total=100,
                    leave=False,
                    dynamic_ncols=True,
                    bar_format="{desc} {percentage:3.0f}% |{bar}| {unit}",
                    delay=1e-9,  # at once would be empty
                )
            self._bar.unit = "  ".join(words)
            self._bar.n = percent
            self._bar.refresh()
        if not sys.stdout.isatty() and time.monotonic() - self._said >= BETWEEN_LINES:
            self._say("  ".join([f"at {self._stage}: {percent}%", *words]))

    def _end_stage(self) -> None:
        self._stage = self._answered = ""

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _look_at_memory(self) -> None:
        self._looked = time.monotonic()
        memory, processes = memory_of_processes()
        with self._lock:
            self._memory = memory
            if memory > self._at_most:
                self._at_most, self._processes = memory, processes

    def _at_peak(self) -> str:
        if not self._at_most:
            return ""
        many = f" in {self._processes} processes" if self._processes > 1 else ""
        return f"  memory at most about {bytes_in_words(self._at_most)}{many}"


def _nobody_reads_output() -> bool:
    """Whether standard output is a pipe whose reader has gone; to write to it is not needed."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        # There is no standard output, or it is closed, or something in place of it.
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _time_in_words(seconds: float | None) -> str:
    return "?" if seconds is None else seconds_in_words(seconds)

"""One submitted run of Flower, followed to its end."""

import json
import re
import time
from collections.abc import Callable, Iterator

from srfed.deployment.flower import CONNECTION
from srfed.deployment.process import POLL_SECONDS, READY_SECONDS, Process


class FlowerRun:
    """A run that was submitted, followed through the log that ``flwr run --stream`` writes.

    Args:
        process: the process of ``flwr run``.
        flwr: gives the output of a command of ``flwr``, asked of the SuperLink that has the run.
    """

    def __init__(self, process: Process, flwr: Callable[..., str]) -> None:
        self._process = process
        self._flwr = flwr

    def lines(self) -> Iterator[str]:
        """The output as it comes, Flower's own words included, until the run ends."""
        with self._process.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._process.begin)
            rest = ""
            while True:
                # Asked before reading, so that the last words are not missed.
                lives = self._process.lives
                rest += file.read()
                *lines, rest = rest.split("\n")
                yield from lines
                if not lives:
                    break
                if not lines:
                    time.sleep(POLL_SECONDS)
        if rest:
            yield rest

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until ``flwr run`` ends; its exit code, which says nothing of success, or None after
        the timeout.
        """
        return self._process.wait(timeout)

    @property
    def run_id(self) -> str | None:
        """Flower's number of the run, as soon as it was accepted."""
        found = re.search(r"Successfully started run (\d+)", self._process.output())
        return found[1] if found else None

    def result(self) -> tuple[str, str]:
        """How the run ended, such as "finished:completed", and why.

        The log ends a little before the SuperLink knows of it, so this waits; a run that goes on
        for longer is reported as it stands then, such as "running".

        Raises:
            UserError: it was not accepted, or the SuperLink does not answer; the text has the last
                words.
        """
        number = self.run_id
        if number is None:
            raise self._process.failure("did not start")
        deadline = time.monotonic() + READY_SECONDS
        while True:
            answer = self._flwr("ls", CONNECTION, "--run-id", number, "--format", "json")
            (run,) = json.loads(answer[answer.index("{") :])["runs"]
            if str(run["status"]).startswith("finished") or time.monotonic() > deadline:
                return str(run["status"]), str(run["status-details"])
            time.sleep(POLL_SECONDS)

"""One child process: started, its output read, waited for, ended.

Nothing here imports Flower or PyTorch; only the processes do.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from srfed.deployment.flower import plain
from srfed.errors import UserError
from srfed.files import private

READY_SECONDS = 120.0
"""How long a process may take until it is ready: each imports much, and machines are busy."""
POLL_SECONDS = 0.05


class Process:
    """A process of its own session, so that a terminal's Ctrl-C does not reach it, with its output
    in a file.
    """

    def __init__(
        self, command: Sequence[str], part: str, environment: Mapping[str, str], log: Path
    ) -> None:
        self.part = part
        self.log = log
        self.begin = log.stat().st_size if log.exists() else 0
        self._name = Path(command[0]).name + (f" of {part}" if part.startswith("site") else "")
        with private(), log.open("ab") as file:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,  # databases and logs are nobody else's
            )

    @property
    def lives(self) -> bool:
        return self._popen.poll() is None

    def output(self) -> str:
        """What it has written since it started."""
        with self.log.open("rb") as file:
            file.seek(self.begin)
            return file.read().decode(errors="replace")

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; None where it lives on after the timeout."""
        with suppress(subprocess.TimeoutExpired):
            return self._popen.wait(timeout)
        return None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until it is ready; raises UserError where it ends, or takes too long."""
        deadline = time.monotonic() + READY_SECONDS
        while not ready():
            if not self.lives:
                raise self.failure(f"ended with code {self._popen.returncode}")
            if time.monotonic() > deadline:
                raise self.failure(f"is not ready after {READY_SECONDS:g} s")
            time.sleep(POLL_SECONDS)

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def failure(self, what: str) -> UserError:
        """An error with what the process said last of an error, or at all."""
        lines = [line for line in map(plain, self.output().splitlines()) if line] or ["no output"]
        said = [number for number, line in enumerate(lines) if line.startswith("ERROR")]
        # Flower's own errors take three lines: the code, the matter, the reason.
        first, count = (
            (said[-1], 3 if "Exit Code" in lines[said[-1]] else 1) if said else (len(lines) - 1, 1)
        )
        return UserError(
            f"{self._name} {what}: {' '.join(lines[first : first + count])} (all of it: {self.log})"
        )

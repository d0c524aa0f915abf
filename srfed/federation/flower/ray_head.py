"""A Ray for one run, begun by a process of its own:
``python -m srfed.federation.flower.ray_head``.

Ray takes seconds to start, and so does all that the run imports; in two processes they do so at
once. What Ray starts inherits the environment of that process, which is the clients', and ends with
it, and it ends with the run's: it waits for the end of its standard input, which comes however the
run's process goes.
"""

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from srfed.config import RunConfig
from srfed.cores import usable_cores
from srfed.errors import UserError
from srfed.federation import report_nothing

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"
START_SECONDS = "200"
END_SECONDS = 60.0
INSTEAD = "resources.backend = inline (--backend inline) does without Ray"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of them is there where a process can use a GPU: NVIDIA's, under WSL 2, AMD's."""


def cores_for(config: RunConfig) -> int:
    """Cores of this machine that all clients have together."""
    resources = config.resources
    return min(resources.cpus or usable_cores(), config.federation.clients * resources.client_cpus)


def variables_of_processes(config: RunConfig) -> dict[str, str]:
    """Variables of the processes that clients answer in."""
    # They do not inherit what Python has put on its path since it started.
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path,
        # Each would start its own pool of threads for all cores before the first message arrives.
        "OMP_NUM_THREADS": str(config.resources.client_cpus),
    }


class RayHead:
    """A Ray of one's own that is starting, or has started.

    Args:
        config: of the run that it is for.
        gpus: that clients' processes may use; None where this process has not asked PyTorch.

    Attributes:
        token: without which nobody joins it; in the environment of its processes and nowhere else.
        folder: a folder of the user's alone that is removed when Ray ends; known with the address.
    """

    folder: str | None = None

    def __init__(self, config: RunConfig, gpus: int | None = None) -> None:
        self.token = secrets.token_hex(32)
        self._cores, self._threads = cores_for(config), config.resources.client_cpus
        report_nothing()
        environment = {
            # Thirty seconds, Ray's own limit, are not enough where the cores have much else to do.
            "RAY_raylet_start_wait_time_s": START_SECONDS,
            **os.environ,
            **variables_of_processes(config),
            MODE: "token",
            TOKEN: self.token,
        }
        environment.pop(TOKEN_FILE, None)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                # Ctrl-C is the run's to hear.
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"Ray cannot start: {error}; {INSTEAD}") from error
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(
                json.dumps({"cpus": self._cores, "gpus": gpus}).encode() + b"\n"
            )
            self._process.stdin.flush()

    def is_for(self, config: RunConfig) -> bool:
        """Whether a run would ask for the same."""
        return (self._cores, self._threads) == (cores_for(config), config.resources.client_cpus)

    def address(self) -> str:
        """Where it is, as soon as it has started.

        Raises:
            UserError: it does not start.
        """
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            reason = f"the process that starts it has ended ({self._process.wait()})"
        else:
            told = json.loads(said)
            if "address" in told:
                self.folder = told["folder"]
                return str(told["address"])
            reason = told["reason"]
        shorter = "; name a shorter folder in TMPDIR" if "AF_UNIX path length" in reason else ""
        raise UserError(f"Ray cannot start: {reason}{shorter}; {INSTEAD}")

    def end(self, *, wait: bool = True) -> None:
        """End Ray; without ``wait`` that goes on after this returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        if wait:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                # What it has started ends with it.
                self._process.kill()
                self._process.wait()


_ahead: RayHead | None = None
"""Begun before the run that is to take it."""


@contextmanager
def begun_ahead() -> Iterator[None]:
    """End, afterwards, a Ray that :func:`begin_ahead` has begun and no run has taken."""
    global _ahead
    try:
        yield
    finally:
        if _ahead is not None:
            # What went wrong is to be said at once.
            _ahead.end(wait=False)
            _ahead = None


def begin_ahead(config: RunConfig) -> None:
    """Begin the Ray of a run that is about to begin, if it will have one of its own, under
    :func:`begun_ahead`.
    """
    global _ahead
    resources = config.resources
    if resources.backend == "ray" and resources.ray_address is None and _ahead is None:
        _ahead = RayHead(config)


@contextmanager
def head_for(config: RunConfig, gpus: int) -> Iterator[RayHead]:
    """The Ray that has been begun for such a run, or one with so many GPUs that begins now; ended
    afterwards.

    Raises:
        UserError: it cannot be begun.
    """
    global _ahead
    head, _ahead = _ahead, None
    if head is not None and not head.is_for(config):
        head.end(wait=False)
        head = None
    head = head or RayHead(config, gpus)
    try:
        yield head
    finally:
        head.end()


def main() -> int:
    """Start what standard input asks for, say where it is, and end it with standard input."""
    asked = json.loads(sys.stdin.readline())
    # What Ray prints, and what it starts, is not to get into the answer.
    answer = os.dup(1)
    os.dup2(2, 1)

    def say(**told: str) -> None:
        with suppress(BrokenPipeError):
            os.write(answer, json.dumps(told).encode() + b"\n")

    try:
        folder = tempfile.TemporaryDirectory(
            prefix="srfed-ray-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
        )
    except OSError as error:
        say(reason=f"{first_reason(error)} (the folder is RAY_TMPDIR's, or else TMPDIR's)")
        return 1
    # Of the user's alone: Ray lets everybody write into its own, but nobody else gets as far.
    with folder as name:
        return _run_ray(asked, name, say)


def _run_ray(asked: dict[str, Any], folder: str, say: Callable[..., None]) -> int:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=asked["cpus"],
            # Ray looks for GPUs in ways of its own, and may find another number than PyTorch.
            num_gpus=_gpus() if asked["gpus"] is None else asked["gpus"],
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=os.path.join(folder, "r"),
        )
    except Exception as error:
        # Ray raises what its parts raise: OSError, ValueError, ConnectionError, RuntimeError and
        # its own.
        say(reason=first_reason(error))
        return 1
    say(address=ray.get_runtime_context().gcs_address, folder=folder)
    sys.stdin.read()
    ray.shutdown()
    return 0


def _gpus() -> int:
    if not any(map(os.path.exists, GPU_DEVICES)):
        # To ask PyTorch takes two seconds.
        return 0
    from srfed.device import gpus_here

    return gpus_here()


def first_reason(error: BaseException) -> str:
    """What began it, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())

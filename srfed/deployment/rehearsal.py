"""A whole federation rehearsed on one machine: real processes, TLS, keys, and each site with its
own images.
"""

import io
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np

from srfed.config import RunConfig
from srfed.data import RECORD_FILE, load_recorded_tasks
from srfed.deployment.agree import agree_as_rehearsed
from srfed.deployment.certificates import CA_CERTIFICATE
from srfed.deployment.deployment import Deployment
from srfed.errors import UserError
from srfed.files import held, list_folder, write_bytes
from srfed.interrupts import SIGNALS, Interrupted, signals_to, tell
from srfed.storage.run_folder import RunFolder

_FLOWERS = re.compile(
    r"(\x1b\[\d+m)?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) *(\x1b\[0m)?:|Successfully "
    r"installed "
)
"""How a line of Flower's begins, as against one that the ServerApp prints."""


def rehearse(folder: Path, config: RunConfig) -> None:
    """Run a configuration's federation as it would be deployed, or go on with the run that the
    folder holds.

    Each site gets its task's images as ``sites/<client>/images.npz``, and the task's name as its
    id; so the run has the same bits as a simulation of the same configuration.

    Args:
        folder: where everything goes: ``run`` (the server's), ``sites/<client>/state``,
            ``certificates``, ``superlink.db``, ``logs``.
        config: the run's configuration.

    Raises:
        UserError: the folder holds something else, the configuration is impossible, a process fails
            or the run does.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; every process has been ended.
    """
    folder = folder.absolute()
    used = folder.exists() and (not folder.is_dir() or set(list_folder(folder)) - {"lock"})
    if used and not (folder / "certificates").is_dir():
        raise UserError(
            f"{folder} is neither an empty folder nor that of a rehearsal; name another one with "
            "--dir"
        )
    with held(folder / "lock", wait=False):
        if (folder / "run" / "run.json").exists():
            # Refused here, and not after everything has been started.
            RunFolder.open(folder / "run").reconfigure(config)
        _rehearse(folder, config)


def _rehearse(folder: Path, config: RunConfig) -> None:
    tasks = load_recorded_tasks(
        config.data,
        config.federation.clients,
        folder / "run" / RECORD_FILE,
        remedy="rehearse in another folder, --dir",
    )
    for task in tasks:
        buffer = io.BytesIO()
        # The site itself sets the same images aside again.
        train = np.concatenate([task.train, task.validation])
        np.savez(buffer, train_images=train, test_images=task.test)
        write_bytes(_images(folder, task.name), buffer.getvalue())
    names = [task.name for task in tasks]
    with (
        _signals_as_interrupts(),
        Deployment(folder, threads=config.resources.client_cpus) as deployment,
    ):
        write_bytes(folder / "config.yaml", config.to_yaml().encode())
        deployment.start_superlink()
        _say(f"SuperLink on {deployment.superlink_address}, with TLS and authentication")
        for name in names:
            images, state = _images(folder, name), folder / "sites" / name / "state"
            agree_as_rehearsed(
                config, images, state, name, deployment.certificates / CA_CERTIFICATE
            )
            deployment.add_site(name, images, state, wait=False)
        for name in names:
            deployment.wait_for_site(name)
        _say(f"connected: {', '.join(names)}")
        run = deployment.run(folder / "run", folder / "config.yaml")
        for line in _own_lines(run.lines()):
            _say(line)
        status, details = run.result()
    if status != "finished:completed":
        reason = " ".join(details.split()).removeprefix("ServerApp failed with exception: ")
        raise UserError(f"the run did not succeed ({status}): {reason} (logs: {folder / 'logs'})")


def _images(folder: Path, client: str) -> Path:
    return folder / "sites" / client / "images.npz"


def _say(line: str) -> None:
    print(line, flush=True)


def _own_lines(lines: Iterable[str]) -> Iterator[str]:
    """What the ServerApp itself prints; an error ends it, as it is told at the end, in one line."""
    started = False
    for line in lines:
        if flowers := _FLOWERS.match(line):
            started = started or "Starting logstream" in line
            if flowers["level"] in ("ERROR", "CRITICAL"):
                return
        elif started and line.strip():
            yield line


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """The first signal raises KeyboardInterrupt; more of them change nothing, as all is being ended
    already.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        tell("ending all processes")
        raise Interrupted(number)

    with signals_to(interrupt):
        yield

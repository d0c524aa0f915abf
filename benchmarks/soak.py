"""Kill a federation's processes at random, compare its bits with an undisturbed run's: ``python -m
benchmarks.soak``.

Each episode is a small federation of real processes (SuperLink, SuperNodes, TLS, keys). While it
runs, one process after another gets SIGKILL: a ClientApp in the middle of its work, a SuperNode
with all below it, the ServerApp, the SuperLink with all below it. What a service manager would
start again is started again, and a run that has lost its server goes on with the one command that
began it. Under ``on_missing: wait`` the end must have the bits of an in-process run that nobody
disturbed; under ``skip`` the run must reach its end and name who was missing. Episodes run side by
side, as they mostly wait for Flower's heartbeats.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from srfed.commands.options import Parser
from srfed.config import RunConfig, parse_config
from srfed.data import load_tasks
from srfed.deployment.agree import agree_as_rehearsed
from srfed.deployment.deployment import Deployment
from srfed.deployment.flower_run import FlowerRun
from srfed.federation.flower.in_process import run_in_process
from srfed.storage.checkpoint import read_checkpoint
from srfed.storage.client_store import ClientStore
from srfed.storage.manifest import read_manifest
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import ServerCheckpoints

KINDS = ("client", "supernode", "serverapp", "superlink")
LONGEST_EPISODE = 1500.0
"""Seconds after which an episode has failed."""
START_SECONDS = 90.0
"""A ServerApp that has not come up in this time is submitted again."""


def soak_config(clients: int, rounds: int, on_missing: str) -> RunConfig:
    """A network of a few thousand weights on the embedded digits; a round is mostly Flower's own
    time.
    """
    content: dict[str, Any] = {
        "name": "soak",
        "model": {"channels": [8, 16, 16, 16], "groups": 4},
        "training": {"batch_size": 16, "local_steps": 4, "learning_rate_schedule": "constant"},
        "federation": {
            "clients": clients,
            "rounds": rounds,
            "on_missing": on_missing,
            "keep_attempts": 2,
        },
        "sampling": {"steps": 5},
        "evaluation": {
            "every": 3,
            "samples": 12,
            "samples_between": 6,
            "ssim_images": 2,
            "ssim_timestep": 5,
        },
        "resources": {"backend": "inline", "device": "cpu"},
    }
    content["evaluation"] |= {"ssim_curve": [5], "grid_columns": 2, "strip_steps": 2}
    if on_missing == "skip":
        # A client that was killed is given up long before Flower's heartbeat is overdue.
        content["federation"] |= {"round_timeout": 30.0, "join_timeout": 300.0}
    return parse_config(content)


def bits(run: RunFolder, store_of: Callable[[str], Path]) -> dict[str, str]:
    """The hash of the server's last checkpoint and of each client's accepted attempt; all are read
    and checked.
    """
    state = ServerCheckpoints(run.server, 1).load_last()
    last = run.server / f"round-{state.round:05d}"
    found = {"server": f"{state.round} {read_manifest(last)['sha256']}"}
    for client, attempt in state.attempts.items():
        store = ClientStore(store_of(client), client, run.lineage, 2)
        store.load(attempt)
        found[client] = read_manifest(store.folder / attempt)["sha256"]
        for folder in store.folder.glob("[!.]*"):
            read_checkpoint(folder)
    return found


def undisturbed(folder: Path, config: RunConfig) -> dict[str, str]:
    """The bits of an in-process run."""
    run = RunFolder.create(folder, config)
    run_in_process(run)
    return bits(run, lambda client: run.clients)


class Episode:
    """One federation that is disturbed until it ends.

    Args:
        folder: where it lies.
        config: the run's configuration.
        kills: which kinds of process to kill, in order; once all are dead the run may end in peace.
        seed: decides when, and which of several.
        say: told what happens.
        longest_pause: seconds between two kills, at most; at least one.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        kills: Sequence[str],
        seed: int,
        say: Callable[[str], None],
        longest_pause: float = 15.0,
    ) -> None:
        self._folder, self._config, self._say, self._longest_pause = (
            folder,
            config,
            say,
            longest_pause,
        )
        self._waiting = list(kills)
        self._random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self._run: FlowerRun | None = None
        self._submitted = 0.0

    def run(self) -> RunFolder:
        """Run it to the end; raises RuntimeError where it does not get there."""
        tasks = load_tasks(self._config.data, self._config.federation.clients)
        self._folder.mkdir(parents=True)
        (self._folder / "config.yaml").write_text(self._config.to_yaml())
        with Deployment(self._folder) as deployment:
            deployment.start_superlink()
            for task in tasks:
                images = self._folder / f"{task.name}.npz"
                np.savez(images, train_images=task.train, test_images=task.test)
                agree_as_rehearsed(self._config, images, self.state_dir(task.name), task.name)
                deployment.add_site(task.name, images, self.state_dir(task.name), wait=False)
            for task in tasks:
                deployment.wait_for_site(task.name)
            self._submit(deployment)
            deadline = time.monotonic() + LONGEST_EPISODE
            pause = time.monotonic() + self._random.uniform(5, 12)
            while not self._finished():
                time.sleep(0.2)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self._folder} has not ended after {LONGEST_EPISODE:g} s")
                if (
                    not deployment.pids("serverapp")
                    and time.monotonic() - self._submitted > START_SECONDS
                ):
                    self._submit(deployment)
                if (
                    self._waiting
                    and time.monotonic() > pause
                    and self._kill(deployment, self._waiting[0])
                ):
                    self._waiting.pop(0)
                    pause = time.monotonic() + self._random.uniform(1, self._longest_pause)
        return RunFolder.open(self._folder / "run")

    def state_dir(self, client: str) -> Path:
        """Where a site keeps its state."""
        return self._folder / "state" / client

    def _submit(self, deployment: Deployment) -> None:
        """Begin the run, or go on with it: the one command for both."""
        self._run = deployment.run(self._folder / "run", self._folder / "config.yaml")
        self._submitted = time.monotonic()

    def _finished(self) -> bool:
        log = MetricsLog(self._folder / "run" / "metrics.jsonl")
        return any(line["final"] for line in log.evaluations())

    def _kill(self, deployment: Deployment, kind: str) -> bool:
        """Kill one process of a kind, if there is one, and start again what a service manager
        would.
        """
        sites = [client for client in self._state_owners() if deployment.pids("supernode", client)]
        if kind == "client":
            working = deployment.pids("client")
            if not working:
                return False
            time.sleep(self._random.uniform(0, 3))
            victims = [pid for pid in working if pid in deployment.pids("client")]
            if not victims:
                return False
            _kill_process(self._random.choice(victims))
        elif kind == "supernode":
            site = self._random.choice(sites)
            deployment.kill_site(site)
            self._told(kind)
            deployment.start_site(site)
            return True
        elif kind == "serverapp":
            servers = deployment.pids("serverapp")
            if not servers or not (self._folder / "run" / "run.json").exists():
                return False
            for pid in servers:
                _kill_process(pid)
            self._told(kind)
            self._submit(deployment)
            return True
        else:
            deployment.kill_superlink()
            self._told(kind)
            deployment.start_superlink()
            self._submit(deployment)
            return True
        self._told(kind)
        return True

    def _state_owners(self) -> list[str]:
        return [
            task.name for task in load_tasks(self._config.data, self._config.federation.clients)
        ]

    def _told(self, kind: str) -> None:
        self.killed[kind] += 1
        rounds = len(MetricsLog(self._folder / "run" / "metrics.jsonl").rounds())
        self._say(f"{self._folder.name}: killed a {kind} after round {rounds}")


def _kill_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 where an episode ends in other bits, or not at all."""
    parser = Parser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=50, help="processes to kill in all (default 50)"
    )
    parser.add_argument("--each", type=int, default=5, help="of them in one episode (default 5)")
    parser.add_argument("--side-by-side", type=int, default=3, help="episodes at once (default 3)")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--pause", type=float, default=15.0, help="longest pause between two kills, s (default 15)"
    )
    parser.add_argument("--on-missing", choices=["wait", "skip"], default="wait")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/soak"), help="emptied first (default runs/soak)"
    )
    options = parser.parse_args(arguments)
    shutil.rmtree(options.dir, ignore_errors=True)
    config = soak_config(options.clients, options.rounds, options.on_missing)
    expected = undisturbed(options.dir / "undisturbed", config)
    began, lock = time.monotonic(), threading.Lock()

    def say(text: str) -> None:
        with lock:
            print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    draw = random.Random(options.seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(options.kills)]
    draw.shuffle(kinds)
    plans = [kinds[first : first + options.each] for first in range(0, len(kinds), options.each)]

    def attempt(number: int) -> tuple[Counter[str], bool]:
        episode = Episode(
            options.dir / f"episode-{number:02d}",
            config,
            plans[number],
            options.seed + number,
            say,
            options.pause,
        )
        try:
            run = episode.run()
            same = bits(run, episode.state_dir) == expected
        except Exception as error:
            say(f"episode {number} FAILED: {error}")
            return episode.killed, False
        missing = Counter(
            client for line in MetricsLog(run.metrics).rounds() for client in line["missing"]
        )
        outcome = "the same bits" if same else "OTHER BITS"
        say(f"episode {number} ended in {outcome}; missing in rounds: {dict(missing) or 'nobody'}")
        return episode.killed, same or options.on_missing == "skip"

    with ThreadPoolExecutor(options.side_by_side) as pool:
        results = list(pool.map(attempt, range(len(plans))))
    total = sum((killed for killed, _ in results), Counter())
    good = sum(fine for _, fine in results)
    print(
        f"{total.total()} processes killed ({dict(total)}) in {len(plans)} episodes; {good} ended "
        "as they must"
    )
    return 0 if good == len(plans) else 1


if __name__ == "__main__":
    sys.exit(main())

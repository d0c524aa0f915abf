"""Where the time of a deployed round goes: ``python -m benchmarks.deployed_round``.

One SuperLink and three sites with TLS and keys on this machine. First apps of Flower alone, whose
clients answer with as many values as φ has: at once; after importing torch; after importing torch,
and with the values in 90 arrays, as many as φ has tensors. Then srfed with one local step a round,
on the default network. What it takes beyond the second is its own; the third shows what it would
take if φ travelled tensor by tensor.

With ``--parts`` what a ClientApp's process costs before it does anything, as each message starts
one.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srfed.commands.options import Parser
from srfed.config import load_config
from srfed.data import load_tasks
from srfed.deployment.agree import agree_as_rehearsed
from srfed.deployment.deployment import Deployment, Role
from srfed.deployment.flower import CONNECTION
from srfed.storage.metrics_log import MetricsLog

SITES = 3
ROLES: tuple[Role, ...] = ("superlink", "supernode", "serverapp", "client")
VALUES = 779_136
"""Of φ in the default network."""
PARTS = {
    "Python": "pass",
    "Flower's program": "import flwr.supernode.worker.run_clientapp",
    "the same, torch": "import flwr.supernode.worker.run_clientapp, torch",
    "the same, torch, "
    "srfed": "import flwr.supernode.worker.run_clientapp, srfed.federation.flower.client_app",
}
"""What a ClientApp's process imports, each with what comes before it."""
PART_REPEATS = 7
TICKS = os.sysconf("SC_CLK_TCK")
PROJECT = """[project]
name = "{name}"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "peer"
[tool.flwr.app.components]
serverapp = "{name}.server:app"
clientapp = "{name}.client:app"
"""
SERVER = """import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    for number in range({rounds} + 1):
        start = time.perf_counter()
        parts = np.array_split(np.arange({values}, dtype=np.float32) + number, {arrays})
        arrays = ArrayRecord({{str(i): Array(part) for i, part in enumerate(parts)}})
        record = RecordDict({{"shared": arrays}})
        messages = [Message(record, node, "train") for node in grid.get_node_ids()]
        waiting = set(grid.push_messages(messages))
        while waiting:
            for reply in grid.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(0.2)
        print("SECONDS", time.perf_counter() - start, flush=True)
"""
CLIENT = """{imports}
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""


class Watch:
    """CPU seconds of a deployment's processes by role, and how long its clients live."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._seen: dict[int, tuple[Role, float, float, float]] = {}
        self._begun: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def cpu(self, role: Role) -> float:
        """CPU seconds of all processes of a role since it began."""
        return sum(
            cpu - self._begun[pid] for pid, (own, _, _, cpu) in self._seen.items() if own == role
        )

    def lives(self, role: Role) -> list[float]:
        """Seconds for which each process of a role has been seen."""
        return [last - first for own, first, last, _ in self._seen.values() if own == role]

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for role in ROLES:
                for pid in self._deployment.pids(role):
                    try:
                        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                    except OSError:
                        continue
                    now, cpu = time.monotonic(), (int(fields[11]) + int(fields[12])) / TICKS
                    first = self._seen[pid][1] if pid in self._seen else now
                    # What a process had used when it was first seen counts only if it had just been
                    # born.
                    self._begun.setdefault(pid, 0.0 if role in ("serverapp", "client") else cpu)
                    self._seen[pid] = (role, first, now, cpu)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.deployed_round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--parts", action="store_true", help="only what a ClientApp's process costs before it works"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/deployed-round"), help="emptied first"
    )
    options = parser.parse_args(arguments)
    if options.parts:
        _print_parts()
        return
    folder: Path = options.dir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [
        f"federation.clients={SITES}",
        f"federation.rounds={options.rounds}",
        "training.local_steps=1",
    ]
    overrides += ["evaluation.every=0", "evaluation.samples=12", "evaluation.ssim_images=0"]
    config = load_config(None, overrides)
    with Deployment(folder) as deployment:
        deployment.start_superlink()
        for task in load_tasks(config.data, SITES):
            images = folder / f"{task.name}.npz"
            np.savez(images, train_images=task.train, test_images=task.test)
            agree_as_rehearsed(config, images, folder / "state" / task.name, task.name)
            deployment.add_site(task.name, images, folder / "state" / task.name)
        peers = {}
        for name, imports, arrays in (
            ("Flower, clients do nothing", "", 1),
            ("Flower, clients import torch", "import torch", 1),
            ("the same, 90 arrays", "import torch", 90),
        ):
            watch = Watch(deployment)
            peers[name] = _peer(deployment, folder, imports, arrays, options.rounds), watch
            watch.stop()
        watch = Watch(deployment)
        for line in deployment.run(folder / "run", None, overrides).lines():
            print(line, flush=True)
        watch.stop()
        lines = MetricsLog(folder / "run" / "metrics.jsonl").rounds()
    peers["srfed, one local step"] = [line["seconds"] for line in lines], watch
    print(f"\n{'':<30}  seconds a round  CPU seconds a round: {', '.join(ROLES)}; a client's life")
    for name, (seconds, seen) in peers.items():
        # One exchange more than rounds: a peer's first is warm-up; srfed asks for descriptions and
        # evaluates.
        exchanges = len(seconds) + (2 if name.startswith("srfed") else 1)
        cpu = "  ".join(f"{seen.cpu(role) / exchanges:5.1f}" for role in ROLES)
        life = statistics.median(seen.lives("client"))
        print(f"{name:<30}  {statistics.median(seconds):8.1f}         {cpu}   {life:5.1f}")


def _print_parts() -> None:
    """Each part by turns, so that what else the machine does meets all alike."""
    spent: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(PART_REPEATS):
        for name, code in PARTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    for name, seconds in spent.items():
        print(
            f"{name:<24} {statistics.median(seconds):5.2f} CPU s ({min(seconds):.2f} to "
            f"{max(seconds):.2f})"
        )


def _peer(
    deployment: Deployment, folder: Path, imports: str, arrays: int, rounds: int
) -> list[float]:
    """Seconds of each round of an app that sends as many values as φ has, and gets them back."""
    name = f"peer{len(imports)}x{arrays}"
    app = folder / name
    (app / name).mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT.format(name=name))
    (app / name / "__init__.py").write_text("")
    (app / name / "server.py").write_text(
        SERVER.format(rounds=rounds, values=VALUES, arrays=arrays)
    )
    (app / name / "client.py").write_text(CLIENT.format(imports=imports))
    output = deployment.flwr("run", str(app), CONNECTION, "--stream", timeout=1200.0)
    return [float(line.split()[1]) for line in output.splitlines() if line.startswith("SECONDS")][
        1:
    ]


if __name__ == "__main__":
    main()

"""Training with little memory left: the address space of the process is limited for so long.

In a process of its own, as what fails for want of memory may leave a library unable to work.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from srfed.federation.flower.client_app import guarded_app
from srfed.federation.messages import TRAIN
from srfed.federation.worker import Worker
from srfed.training.local import Job, LocalResult
from support.agreed_site import AgreedSite
from support.commands import run_here
from support.tiny_run import CHEAP, all_bits, begin, round_lines, run_in_process

ROOM = 250 * 2**20
BATCH = 2**12
"""Of which a step of the tiny network takes far more than the room."""
ATTEMPTS = 3
LARGE: dict[str, Any] = {
    **CHEAP,
    "federation.clients": 1,
    "federation.rounds": 1,
    "training.local_steps": 1,
    "training.minibatches": "continued",
    "training.batch_size": BATCH,
}


@contextmanager
def little_room() -> Iterator[None]:
    """So many bytes more than what is taken, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def limiting(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    if message.metadata.message_type != TRAIN:
        return call_next(message, context)
    with little_room():
        return call_next(message, context)


app = guarded_app([limiting])


def in_a_process_of_its_own(case: str, *arguments: object) -> dict[str, Any]:
    """What a case below has found. Arguments that are paths are of folders that do not exist.

    A library that does not look whether it got memory ends the process once in a while, which
    nothing in Python could tell: then another process tries, at most twice.
    """
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            [sys.executable, "-m", "support.short_memory", case, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=Path(__file__).parents[1],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
            },
        )
        if done.returncode != -signal.SIGSEGV:
            break
        for folder in arguments:
            if isinstance(folder, Path):
                shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored(folder: Path) -> dict[str, str]:
    """The files of tensors, and what is in them."""
    return {str(path): path.read_bytes().hex() for path in sorted(folder.rglob("*.safetensors"))}


def resumed(folder: str) -> dict[str, Any]:
    """A run's second round has little room; then it is resumed with as much as there is."""
    run = begin(Path(folder), LARGE)
    # What its first round takes is not given back to the system by this process.
    child = os.fork()
    if not child:
        run_in_process(run)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    before, bits = stored(run.path), all_bits(run)
    carry_out = Worker._run

    def in_little_room(worker: Worker, job: Job) -> LocalResult:
        with little_room():
            return carry_out(worker, job)

    # While it trains, and not while Python imports what cannot be without memory.
    Worker._run = in_little_room  # type: ignore[method-assign]
    ended = run_here("simulate", "--resume", run.path, "--set", "federation.rounds=2")
    return {
        "code": ended.returncode,
        "said": ended.stderr,
        "as it was": stored(run.path) == before and all_bits(run) == bits,
        "rounds": [line["round"] for line in round_lines(run)],
    }


def fits(folder: str, batch: str) -> dict[str, Any]:
    """A run of a batch that is said to fit; then a deployed site with one that does not."""
    settings = {**LARGE, "training.batch_size": int(batch)}
    run = run_in_process(begin(Path(folder) / "run", settings), app)
    site = AgreedSite(Path(folder), LARGE, client_app=app)
    reply = site.ask(TRAIN)
    return {
        "accepted": round_lines(run)[0]["accepted"],
        "code": reply.error.code,
        "reason": reply.error.reason,
        "stored": site.stored,
        "log": site.log,
    }


if __name__ == "__main__":
    cases = {"resumed": resumed, "fits": fits}
    print(json.dumps(cases[sys.argv[1]](*sys.argv[2:])))

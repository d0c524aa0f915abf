"""The default run as a user starts it: ``python -m benchmarks.default_run`` (Linux).

Starts ``python -m srfed.simulate --clients 10`` as a process of its own and prints its wall time,
split into start-up (and shutdown), training and evaluation, and the greatest memory of the whole
process tree.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from srfed.commands.options import Parser
from srfed.reporting.summary import totals
from srfed.storage.metrics_log import MetricsLog

POLL_SECONDS = 1.0


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments", nargs="*", default=["--clients", "10"], help="of srfed.simulate, after --"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "srfed",
            "simulate",
            "--run-dir",
            str(run),
            *options.arguments,
        ]
        start = time.monotonic()
        process = subprocess.Popen(command)
        memory = 0
        while process.poll() is None:
            memory = max(memory, tree_memory(process.pid))
            time.sleep(POLL_SECONDS)
        wall = time.monotonic() - start
        if process.returncode:
            raise SystemExit(process.returncode)
        sums = totals(MetricsLog(run / "metrics.jsonl"))
    rest = wall - sums.training_seconds - sums.evaluation_seconds
    print(f"\nwall time        {wall:6.1f} s")
    print(f"  training       {sums.training_seconds:6.1f} s ({sums.rounds} rounds)")
    print(f"  evaluation     {sums.evaluation_seconds:6.1f} s")
    print(f"  start-up, end  {rest:6.1f} s")
    print(f"peak memory      {memory / 1e9:6.2f} GB (proportional set size of all processes)")


def tree_memory(root: int) -> int:
    """Bytes of a process and all below it: proportional set sizes, so shared pages count once."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    return sum(_memory(process) for process in parents if _descends(process, root, parents))


def _descends(process: int, root: int, parents: dict[int, int]) -> bool:
    while process in parents:
        if process == root:
            return True
        process = parents[process]
    return False


def _memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()

"""From the command to the first training step: ``python -m benchmarks.start``.

Each line is a process of its own, by turns with one that does nothing but ``import torch; import
flwr``: the seconds until the first local step of ``srfed simulate`` begins, in process or, with
``--backend ray``, in the first of Ray's processes that gets there, and the same over what the two
imports take. Seconds on the clock say how long a user waits on a machine that is otherwise idle;
processor seconds, of the process that takes the step, change less with what else runs.

``--imports`` prints instead which modules the process has loaded by then, the dearest packages
first, by Python's own ``-X importtime``.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from srfed.commands.options import Parser

HOOK = """
import importlib.abc, importlib.util, os, sys, time

class First(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name != "srfed.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)

        def first(*arguments):
            try:
                file = os.open(os.environ["FIRST_STEP"], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                time.sleep(60)
            os.write(file, f"{time.time()} {time.process_time()}".encode())
            sys.stderr.flush()
            os._exit(0)

        module.LocalStep.run = first

sys.meta_path.insert(0, First())
"""
"""As sitecustomize, in every process that Python starts: the first local step writes down when it
began, and ends its process."""
IMPORTS = "import torch; import flwr"
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("inline", "ray"), default="inline")
    parser.add_argument("--repeats", type=int, default=5, help="counted processes (default 5)")
    parser.add_argument("--imports", action="store_true", help="what is loaded by then")
    options = parser.parse_args()
    if options.imports:
        _print_imports()
        return
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.repeats + 1):
        found[IMPORTS].append(_imported())
        found[f"srfed simulate --backend {options.backend}"].append(_first_step(options.backend))
    print(f"{'':<32} {'seconds':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6}")
    # The first of each has read its files from the disk.
    medians = {
        name: [statistics.median(column) for column in zip(*pairs[1:], strict=True)]
        for name, pairs in found.items()
    }
    wall, cpu = medians[IMPORTS]
    for name, (seconds, processor) in medians.items():
        print(
            f"{name:<32} {seconds:>8.2f} {seconds / wall:>6.2f} {processor:>7.2f} "
            f"{processor / cpu:>6.2f}"
        )


def _imported() -> tuple[float, float]:
    """Seconds, and processor seconds, of a process that imports."""
    program = f"{IMPORTS}; import time; print(time.time(), time.process_time())"
    start = time.time()
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    end, processor = map(float, said.split())
    return end - start, processor


def _first_step(backend: str, *options: str) -> tuple[float, float]:
    """Seconds until the first local step, and processor seconds of the process that takes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(HOOK)
        path = os.pathsep.join([name, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "FIRST_STEP": str(folder / "first")}
        words = ["--clients", "10", "--backend", backend, "--run-dir", str(folder / "run")]
        start = time.time()
        with (
            (folder / "err").open("wb") as log,
            subprocess.Popen(
                [sys.executable, *options, "-m", "srfed.simulate", *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            ) as process,
        ):
            try:
                while not (folder / "first").exists() and process.poll() is None:
                    time.sleep(0.01)
            finally:
                # Ctrl-C, which takes Ray's processes along.
                process.terminate()
                process.wait(timeout=120)
        if options:
            sys.stderr.write((folder / "err").read_text())
        if not (folder / "first").exists():
            raise SystemExit((folder / "err").read_text())
        end, processor = map(float, (folder / "first").read_text().split())
    return end - start, processor


def _print_imports() -> None:
    """Seconds by package, of the process up to its first step."""
    program = "from benchmarks.start import _first_step; _first_step('inline', '-X', 'importtime')"
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, stderr=subprocess.PIPE, text=True
    ).stderr
    packages: dict[str, int] = defaultdict(int)
    for match in map(LINE.match, said.splitlines()):
        if match:
            packages[match[2].partition(".")[0]] += int(match[1])
    for name, microseconds in sorted(packages.items(), key=lambda item: -item[1])[:30]:
        print(f"{name:<24} {microseconds / 1e6:>7.2f} s")


if __name__ == "__main__":
    main()

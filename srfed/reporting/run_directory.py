"""The folder of one run, and where everything in it lies.

config.yaml      the whole configuration
run.json         lineage, version, when it began
images.json      fingerprints of the images that it was begun with
metrics.jsonl    one line a round, one an evaluation: what TensorBoard shows, as numbers
summary.txt      the table printed at the end
samples/         grids of samples and reverse-process strips, PNG
tensorboard/     event files
server/          checkpoints of φ
clients/         simulation only: each client's own store, with θ_i and the client's log
"""

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from srfed import __version__
from srfed.config import RunConfig, load_config
from srfed.errors import UserError
from srfed.files import held, read_json, write_bytes, write_json


@dataclass(frozen=True)
class RunDirectory:
    """One run's folder, its configuration and its identity."""

    path: Path
    config: RunConfig
    lineage: str

    @classmethod
    def create(cls, path: Path | None, config: RunConfig) -> "RunDirectory":
        """Begin a run in a new or empty folder; None takes runs/<name>-<time>.

        Raises:
            UserError: the folder holds something already, or cannot be written.
        """
        if path is None:
            path = Path("runs") / f"{config.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
        path = path.absolute()
        if (path / "run.json").exists():
            raise UserError(f"{path} holds a run already; continue it with --resume {path}, or name another folder")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not an empty folder; name another one with --run-dir")
        run = cls(path, config, uuid4().hex[:12])
        write_bytes(run.config_file, config.to_yaml().encode())
        identity = {
            "lineage": run.lineage,
            "srfed": __version__,
            "torch": version("torch"),
            "python": platform.python_version(),
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": config.fingerprint(),
        }
        write_json(path / "run.json", identity)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open a run's folder; raises UserError where it is none, or its files are damaged."""
        path = path.absolute()
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not the folder of a run: it has no run.json")
        identity = read_json(path / "run.json", "lineage")
        return cls(path, load_config(path / "config.yaml"), str(identity["lineage"]))

    def reconfigure(self, config: RunConfig) -> "RunDirectory":
        """The same run under a configuration that may differ in what does not decide its result.

        Raises:
            UserError: it differs in something else; the text names it.
        """
        if config.fingerprint() != self.config.fingerprint():
            changed = ", ".join(self.config.decisive_differences(config))
            raise UserError(f"{self.path} was begun with another configuration: {changed}")
        write_bytes(self.config_file, config.to_yaml().encode())
        return RunDirectory(self.path, config, self.lineage)

    def in_use(self) -> AbstractContextManager[None]:
        """Hold the run for this process; entering raises UserError where another one has it."""
        return held(self.path / "lock", wait=False)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def images(self) -> Path:
        return self.path / "images.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.txt"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def server(self) -> Path:
        return self.path / "server"

    @property
    def clients(self) -> Path:
        return self.path / "clients"

    @property
    def started(self) -> bool:
        """Whether the server has written a checkpoint."""
        return any(self.server.glob("round-*"))

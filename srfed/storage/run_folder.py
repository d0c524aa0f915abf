"""The folder of one run, and where everything in it lies.

README.txt       who may see what
config.yaml      the whole configuration
run.json         lineage, version, when it began, where it trains, the settings that decide its
                 result
images.json      fingerprints of the images that it was begun with
metrics.jsonl    one line a round, one an evaluation: what TensorBoard shows, as numbers
summary.txt      the table printed at the end
report.html      the run on one page; of a simulation with real training images
samples/         grids of samples and reverse-process strips, PNG
tensorboard/     event files
server/          checkpoints of φ
start/           where it starts from another run: the φ that it took
clients/         simulation only: each client's own store, with θ_i and the client's log
share.json       of a copy that `srfed share` has made: what it has and has not
"""

import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml

from srfed import __version__
from srfed.config import RunConfig, parse_config
from srfed.config.run import REMOVED, fingerprint_of
from srfed.config.yaml import read_yaml
from srfed.errors import DamagedError, UserError
from srfed.files import (
    close_to_others,
    exists,
    held,
    list_folder,
    new_folder,
    private,
    read_bytes,
    read_json,
    remove_folder,
    remove_temporary_files,
    write_bytes,
    write_json,
)
from srfed.records import Place

if TYPE_CHECKING:
    from srfed.networks.partition import Shared
    from srfed.storage.start import Origin

LOCK = "lock"
README = """The folder of a run of srfed; docs/run_folder.md says what each file is.

Who may see it? Not everybody. Where all parties are simulated on one machine, clients/ holds what
no party of a real federation gives away: every exclusive part, and in memorisation/ crops of real
training images. The folder is therefore its owner's alone (mode 0700); whoever passes it on passes
on those images too; srfed share makes a copy without them. config.yaml, run.json, metrics.jsonl and
summary.txt are settings and numbers, samples/ and tensorboard/ hold generated images besides.
server/ holds the shared part, which every party has seen.
"""
LOWERED = (
    "training.learning_rate",
    "training.exclusive_learning_rate",
    "training.owned_learning_rate",
    "training.gradient_clip",
)
"""The settings that decide the result and that a resumption may lower."""
_LOWERED_KEY, _MOVED_KEY = "lowered", "moved"
_KINDS = {"lineage": str, "fingerprint": str}
_REMOVED = {"federation.largest_update": 100.0}
"""What settings that are no more were unless somebody set them: old fingerprints are of them too.
"""
_BEFORE = {"evaluation.ssim_steps": None}
"""What a run did before there was a setting, where that is not the setting's default."""
_held: set[Path] = set()
"""The runs that this process has."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, its configuration and its identity."""

    path: Path
    config: RunConfig
    lineage: str

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: RunConfig,
        start: "tuple[Origin, Shared] | None" = None,
    ) -> "RunFolder":
        """Begin a run in a new or empty folder; None takes runs/<name>-<time>, which no other run
        has.

        Args:
            path: the folder.
            config: the run's.
            start: the φ that it starts from, and whose that is; None begins with initial values.

        Raises:
            UserError: the folder holds something already, another process begins a run there, or it
                cannot be written.
        """
        if path is None:
            path = usual_folder(config)
        path, config = path.absolute(), config.with_absolute_paths()
        _refuse_used(path)
        with held(path / LOCK, wait=False):
            _refuse_used(path)
            close_to_others(path)
            remove_temporary_files(path)
            remove_folder(path / "start", ("state.safetensors", "manifest.json"))
            run = cls(path, config, uuid4().hex[:12])
            write_bytes(path / "README.txt", README.encode())
            write_bytes(run.config_file, config.to_yaml().encode())
            identity: dict[str, Any] = {
                "lineage": run.lineage,
                "srfed": __version__,
                "torch": version("torch"),
                "python": platform.python_version(),
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                **_of_configuration(config),
            }
            if start is not None:
                # It imports torch, and beginning a run otherwise needs none of it.
                from srfed.storage.start import START, save_start

                origin, shared = start
                save_start(path, origin, shared)
                identity[START] = origin.to_json()
            write_json(run.identity_file, identity)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open a run's folder.

        Raises:
            UserError: it is none, its files are damaged, or its config.yaml is not what the run was
                begun with.
        """
        path = path.absolute()
        if not exists(path / "run.json"):
            raise UserError(f"{path} is not the folder of a run: it has no run.json")
        identity = read_json(path / "run.json", kinds=_KINDS)
        config, named = _load(path / "config.yaml")
        run = cls(path, config, str(identity["lineage"]))
        run._refuse_edited(identity, named)
        return run

    def reconfigure(self, config: RunConfig) -> "RunFolder":
        """The same run under a configuration that may differ in what does not decide its result,
        and in learning rates and a gradient clip that are lower, as a run that has diverged needs.

        Nothing is written before somebody has the run to himself, see :meth:`in_use`.

        Raises:
            UserError: it differs in something else, or ends before what there is already; the text
                names it. Or it is a copy, which has not all that the next round needs.
        """
        if self.copied_tasks is not None:
            raise UserError(
                f"{self.path} is a copy without what its owners keep, and cannot go on; go on with "
                "the run that srfed share has made it of"
            )
        config = self._as_before(config)
        lowered = _lowered(self.config, config)
        changed = [
            one
            for one in self.config.decisive_differences(config)
            if one.partition(":")[0] not in lowered
        ]
        if changed:
            raise UserError(
                f"{self.path} was begun with another configuration: {', '.join(changed)}"
            )
        run = RunFolder(self.path, config.with_absolute_paths(), self.lineage)
        run._refuse_fewer_rounds()
        return run

    @property
    def was_lowered(self) -> bool:
        """Whether a resumption has lowered settings."""
        return bool(read_json(self.identity_file, kinds=_KINDS).get(_LOWERED_KEY))

    def lowered_after(self, round_number: int) -> dict[str, float]:
        """The settings that a resumption has lowered after this round, by name."""
        entries = read_json(self.identity_file, kinds=_KINDS).get(_LOWERED_KEY, [])
        return {
            name: value
            for entry in entries
            if entry["after"] == round_number
            for name, value in entry["settings"].items()
        }

    def note_place(self, place: Place, after: int) -> str:
        """Write down where the run trains from now on; for who has it to himself.

        Args:
            place: where.
            after: the last round that is done.

        Returns:
            What changes, in a sentence; empty where nothing does, or nobody wrote down where it
            trained before.
        """
        identity = read_json(self.identity_file, kinds=_KINDS)
        now = asdict(place)
        before = {name: str(identity[name]) for name in now if name in identity}
        if before == now:
            return ""
        moved = len(before) == len(now)
        if moved:
            entry = {"after": after, "from": before, "to": now}
            identity[_MOVED_KEY] = [*identity.get(_MOVED_KEY, []), entry]
        write_json(self.identity_file, {**identity, **now})
        if not moved:
            return ""
        return (
            f"the run has trained elsewhere: {Place(**before).in_words} -> {place.in_words}; its "
            "draws stay the same, the rounding of sums does not"
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the run for this process, then write down its configuration; a process that has it
        may enter again.

        Whatever is made meanwhile, by libraries too, is for the owner alone.

        Raises:
            UserError: another process has it, or the configuration no longer fits what that has
                left.
        """
        if self.path in _held:
            yield
            return
        with held(self.path / LOCK, wait=False), private():
            _held.add(self.path)
            try:
                self._sweep()
                self._refuse_fewer_rounds()
                self._write_configuration()
                yield
            finally:
                _held.discard(self.path)

    @property
    def starts_from(self) -> str:
        """Which run's φ it began with, in words; empty where it has initial values of its own."""
        if (origin := read_json(self.identity_file).get("start")) is None:
            return ""
        return f"{origin['run']}, round {origin['round']}, φ {origin['phi_sha256'][:12]}"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def images(self) -> Path:
        return self.path / "images.json"

    @property
    def identity_file(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

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
    def has_every_party(self) -> bool:
        """Whether all parties are in one place: simulated, from the first round on, or centralised.
        Of a deployed run the images are the sites' own, and of a copy to pass on nobody's here.
        """
        everybody = self.config.training.method != "federated" or exists(self.clients)
        return everybody and self.copied_tasks is None

    @property
    def copy_file(self) -> Path:
        return self.path / "share.json"

    @property
    def copied_tasks(self) -> list[str] | None:
        """Of a copy that was made to be passed on, the tasks that can be sampled from it; None
        where this is no copy, but the run itself.

        Raises:
            UserError: what says so cannot be read.
        """
        if not exists(self.copy_file):
            return None
        return list(map(str, read_json(self.copy_file, kinds={"tasks": list})["tasks"]))

    @property
    def last_round(self) -> int | None:
        """The round of the last checkpoint, None before the first; raises UserError where that
        cannot be read.
        """
        # Importing torch takes seconds, and beginning a run needs none of it.
        from srfed.storage.server_checkpoints import ServerCheckpoints

        return max(ServerCheckpoints(self.server, 1).rounds(), default=None)

    @property
    def started(self) -> bool:
        """Whether the server has written a checkpoint."""
        return self.last_round is not None

    def _sweep(self) -> None:
        """Remove the halves of files that killed processes have left; nobody else is writing."""
        for folder in (self.path, self.samples, self.path / "start"):
            remove_temporary_files(folder)
        for client in list_folder(self.clients):
            for kept in ("", "samples", "memorisation"):
                remove_temporary_files(self.clients / client / kept)

    def _as_before(self, config: RunConfig) -> RunConfig:
        """A configuration, but what the run did before there was a setting where that has its
        default: nobody can have said it of the run.
        """
        named, usual = _load(self.config_file)[1], RunConfig().settings()
        for name, before in _BEFORE.items():
            section, _, key = name.partition(".")
            if name not in named and config.settings()[name] == usual[name]:
                settings = getattr(config, section).model_copy(update={key: before})
                config = config.model_copy(update={section: settings})
        return config

    def _refuse_edited(self, identity: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        """Compare config.yaml with what run.json says of the settings that decide the result."""
        now, begun = self.config.decisive_settings(), identity.get("settings")
        if begun is None:
            # Of before formats had versions: the fingerprint of the settings that there were then.
            then = {name: value for name, value in named.items() if name in now or name in _REMOVED}
            if identity["fingerprint"] in (fingerprint_of(then), fingerprint_of(_REMOVED | then)):
                return
            changed = "the fingerprint in run.json is another"
        else:
            # A process that was stopped between the two files has lowered nothing yet.
            lowering = identity.get(_LOWERED_KEY, [{}])[-1].get("before", {})
            changed = ", ".join(
                f"{name}: {value!r} -> {now[name]!r}"
                for name, value in dict(begun).items()
                if name in now and now[name] not in (value, lowering.get(name, value))
            )
        if changed:
            raise UserError(
                f"{self.config_file} is not what the run was begun with ({changed}): put it back; "
                "what may change is changed with --resume and --set"
            )

    def _refuse_fewer_rounds(self) -> None:
        done, asked = self.last_round, self.config.federation.rounds
        if done is not None and asked < done:
            raise UserError(
                f"federation.rounds = {asked}, and {self.path} has {done} already; allowed: {done} "
                "or more"
            )

    def _write_configuration(self) -> None:
        before = _load(self.config_file)[0]
        if before == self.config:
            return
        identity = read_json(self.identity_file, kinds=_KINDS)
        if lowered := _lowered(before, self.config):
            settings = before.settings()
            entry = {
                "after": self.last_round or 0,
                "settings": lowered,
                "before": {name: settings[name] for name in lowered},
            }
            identity = {**identity, _LOWERED_KEY: [*identity.get(_LOWERED_KEY, []), entry]}
            write_json(self.identity_file, {**identity, **_of_configuration(self.config)})
        if "settings" not in identity:
            # Its fingerprint is of the settings that config.yaml names now, which may become more.
            write_json(self.identity_file, {**identity, **_of_configuration(self.config)})
        write_bytes(self.config_file, self.config.to_yaml().encode())


def _lowered(before: RunConfig, now: RunConfig) -> dict[str, float]:
    """The settings of :data:`LOWERED` that are lower now than they were."""
    then, found = before.settings(), now.settings()
    training = before.training
    # What null stands for; a clip of null is none.
    usual = {
        "training.exclusive_learning_rate": training.learning_rate,
        "training.owned_learning_rate": training.exclusive_learning_rate or training.learning_rate,
        "training.gradient_clip": math.inf,
    }
    lowered = {}
    for name in LOWERED:
        was = usual[name] if then[name] is None else then[name]
        if found[name] is not None and found[name] != then[name] and found[name] <= was:
            lowered[name] = float(found[name])
    return lowered


def usual_folder(config: RunConfig) -> Path:
    """A new folder, runs/<name>-<time>, which no other run has; raises UserError where it cannot be
    made.
    """
    return new_folder(Path("runs") / f"{config.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}")


def _of_configuration(config: RunConfig) -> dict[str, Any]:
    return {"fingerprint": config.fingerprint(), "settings": config.decisive_settings()}


def _refuse_used(path: Path) -> None:
    if exists(path / "run.json"):
        raise UserError(
            f"{path} holds a run already; continue it with --resume {path}, or name another folder"
        )
    if exists(path) and (not path.is_dir() or set(list_folder(path)) - _begun_only(path)):
        raise UserError(f"{path} is not an empty folder; name another one with --run-dir")


def _begun_only(path: Path) -> set[str]:
    """The names in a folder in which a run may be begun all the same: those that a process has left
    which was killed before it had given the run its identity.
    """
    readme = path / "README.txt"
    # One that cannot be read is not ours, and the folder is refused as used.
    with suppress(UserError):
        if read_bytes(readme) == README.encode():
            return {LOCK, readme.name, "config.yaml", "start"}
    return {LOCK}


def _load(file: Path) -> tuple[RunConfig, dict[str, Any]]:
    """A run's own configuration without settings that there are no more, and all that the file
    names.

    Raises:
        UserError: it cannot be read, or is no configuration.
    """
    try:
        content = read_yaml(read_bytes(file))
    except yaml.YAMLError as error:
        raise DamagedError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file} is damaged: it names no settings")
    sections = {name: value for name, value in content.items() if isinstance(value, dict)}
    named = {name: value for name, value in content.items() if name not in sections}
    named |= {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in keys.items()
    }
    for section, _, key in (name.partition(".") for name in REMOVED):
        sections.get(section, {}).pop(key, None)
    # A run's file names every setting that there was.
    for name, value in _BEFORE.items():
        section, _, key = name.partition(".")
        sections.get(section, {}).setdefault(key, value)
    return parse_config(content, str(file)), named

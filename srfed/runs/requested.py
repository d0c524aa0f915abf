"""What a command was asked for: a file, overrides and options, and what follows from the data where
nobody said it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srfed.config import RunConfig, SamplingConfig, parse_config, read_settings
from srfed.config.choices import SAMPLERS, chosen, constants
from srfed.config.loading import said_in
from srfed.config.presets import is_preset
from srfed.errors import UserError
from srfed.paths import user_path

OWN = ("folder", "npz")
"""The data sets that are somebody's own images: how many tasks there are is theirs to say."""
WITHOUT_DIR = ("digits", "sites")
"""The data sets that have nothing in ``data.dir``."""
SHOWN = 20
"""Most names of tasks in one line."""


def requested_config(
    path: Path | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    start: RunConfig | None = None,
) -> RunConfig:
    """The configuration that a command's file, overrides and options name.

    Where nobody says it, ``data.dataset`` is what lies in ``data.dir``, as is said on standard
    output; ``federation.clients`` all tasks of an owner's own data; ``name`` that of the data.
    Paths are absolute, as other processes, and later resumptions, may stand in other folders.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: each "section.key=value", the value in YAML.
        options: by setting, what the command has an option of its own for, in YAML; None where it
            was not given.
        start: of the run whose φ this one starts from: its ``model`` and ``diffusion`` are those of
            a preset's, where nobody says otherwise.

    Raises:
        UserError: as :func:`~srfed.config.load_config`; a setting is said twice, or would be
            ignored; the data are not what they should be.
    """
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if any(override.partition("=")[0].strip() == key for override in overrides):
            raise UserError(
                f"{key} is set twice, by an option of its own and by --set; leave one out"
            )
    said = [*overrides, *(f"{key}={value}" for key, value in given.items())]
    content = read_settings(path, said)
    if start is not None and (path is None or is_preset(path)):
        mine, theirs = read_settings(None, overrides), start.model_dump(mode="json")
        content |= {name: {**theirs[name], **mine.get(name, {})} for name in ("model", "diffusion")}
    source = said_in(path, said)
    if isinstance(data := content.get("data", {}), dict):
        _complete(content, data, source)
    config = parse_config(content, source).with_absolute_paths()
    refuse_ignored_dir(config)
    return config


def requested_sampling(
    config: RunConfig,
    sampler: str | None,
    steps: int | None,
    eta: float | None,
    guidance: float | None,
    batch_size: int | None = None,
) -> SamplingConfig:
    """A run's way of sampling with what --sampler, --steps, --eta, --guidance and --batch-size
    change; None leaves the run's.

    Raises:
        UserError: a value is impossible, or would be ignored.
    """
    given = {
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "guidance": guidance,
        "batch_size": batch_size,
    }
    content = config.model_dump(mode="json")
    content["sampling"] |= {key: value for key, value in given.items() if value is not None}
    sampling = parse_config(content, "--sampler, --steps, --eta, --guidance, --batch-size").sampling
    if steps is not None and chosen(SAMPLERS, sampling.sampler).every_timestep:
        raise UserError(
            f"--steps {steps} would be ignored: the {sampling.sampler} sampler always takes all "
            f"{config.diffusion.timesteps} steps; leave it out, or name --sampler ddim"
        )
    if eta is not None and "eta" not in constants(chosen(SAMPLERS, sampling.sampler), sampling):
        raise UserError(
            f"--eta {eta} would be ignored: the noise of the {sampling.sampler} sampler is fixed; "
            "leave it out, or name --sampler ddim"
        )
    return sampling


def refuse_ignored_dir(config: RunConfig) -> None:
    """Raise UserError where ``data.dir`` names images that the data set does not look at."""
    if config.data.dir and config.data.dataset in WITHOUT_DIR:
        raise UserError(
            f"data.dir = {config.data.dir} would be ignored: data.dataset = {config.data.dataset} "
            "takes nothing from there; leave --data-dir out, or name the data set, for example "
            "--set data.dataset=folder"
        )


def _complete(content: dict[str, Any], data: dict[str, Any], source: str) -> None:
    """Put into ``content`` what follows from its section ``data``."""
    # numpy and Pillow, which --help and a wrong setting need not.
    from srfed.data import task_names
    from srfed.data.recognise import recognise

    folder = data.get("dir")
    if isinstance(folder, str) and folder and "dataset" not in data:
        content["data"] = data = {**data, "dataset": recognise(folder)}
        print(f"data: {folder} is taken as data.dataset = {data['dataset']}")
    settings = parse_config({"data": data}, source).data if data.get("dataset") in OWN else None
    federation = content.get("federation", {})
    if settings is not None and isinstance(federation, dict) and "clients" not in federation:
        names = task_names(settings)
        content["federation"] = {**federation, "clients": len(names)}
        shown = [*names[:SHOWN], *(["…"] if len(names) > SHOWN else [])]
        print(f"tasks: all {len(names)} of {settings.dir}: {', '.join(shown)}")
    if "name" not in content and "dataset" in data:
        content["name"] = (
            data["dataset"] if settings is None else name_of(settings.dir, str(data["dataset"]))
        )


def name_of(folder: str, otherwise: str) -> str:
    """A run's name from the place of its images; ``otherwise`` where no name can be made of it."""
    from srfed.data.source import slugs

    try:
        return slugs([user_path(folder).resolve().stem])[0]
    except UserError:
        return otherwise

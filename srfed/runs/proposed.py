"""What a run on somebody's own images begins from, where nobody says it: a recipe for the number of
images, a size and channels for their looks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from srfed.config import DatasetName, parse_config, read_settings
from srfed.config.presets import is_preset, preset_file
from srfed.data.recognise import published_in, recognise
from srfed.data.survey import Survey, survey
from srfed.errors import UserError
from srfed.runs.requested import OWN, name_of

FEW = 60
"""Below so many training images an owner the recipe is that for few images."""
LEAST_TRAINED = 8
"""Where an owner has fewer, two images are set aside, and not four."""
SIDES = (32, 28, 24, 16, 12, 8)
"""Pixels that are proposed; what a few cores learn in an evening is no larger."""
QUICK_SIDE = 16
QUICK_OWNERS = 10
QUICK_SAMPLES = 64
QUICK: dict[str, Any] = {
    "model.channels": [16, 32, 64, 64],
    "training.decay_rounds": None,
    "evaluation.every": 0,
    "evaluation.ssim_images": 8,
    "evaluation.ssim_timestep": 10,
    "evaluation.ssim_curve": [],
    "resources.backend": "inline",
}
"""What makes a run of minutes one of seconds; its rounds follow from the machine's pace."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """What a run begins from.

    Attributes:
        base: a file; None for the defaults.
        settings: what differs from it and was not said, by name.
        words: a line for each choice, with its reason.
        free: whether the network was left open.
        fitted: whether the rounds are to be as many as are quick.
    """

    base: Path | None
    settings: Settings
    words: list[str]
    free: bool
    fitted: bool = False

    @property
    def overrides(self) -> list[str]:
        """The settings as ``--set`` takes them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


def propose(
    data: str | None,
    base: Path | None,
    overrides: Sequence[str],
    options: Mapping[str, str | None],
    *,
    quick: bool = False,
) -> Proposal:
    """Choose what was not said.

    Args:
        data: where the images are; None leaves the data to ``base``.
        base: a preset, which leaves the data open; or somebody's own file, whose settings are said.
        overrides: each "section.key=value"; these are said.
        options: by setting, what the command has an option of its own for; None: not given.
        quick: whether the run is to take less than two minutes.

    Raises:
        UserError: the data are not there, cannot be read, or are not clear; a setting cannot be
            read; ``quick`` with a file of one's own.
    """
    given = [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    own = base is not None and not is_preset(base)
    if own and quick:
        raise UserError(
            f"--quick would be ignored, as {base} says what the run is; leave one of them out, or "
            "name a preset"
        )
    said = read_settings(base if own else None, given)
    free = base is None and not any(has(said, name) for name in ("model.channels", "model.network"))
    settings: Settings = {}
    words: list[str] = []
    side = QUICK_SIDE
    if data is not None:
        dataset = _dataset(data, said, read_settings(base))
        settings["data.dataset"] = dataset
        words.append(f"data:       {data} is taken as data.dataset = {dataset}")
        if dataset in OWN:
            settings["name"] = name_of(data, dataset)
            found = _look(data, dataset, said)
            settings["federation.clients"] = len(found.names)
            settings |= _shape(found, said, words)
            if base is None:
                base = preset_file("few_images" if found.usual < FEW else "small")
                words.append(
                    f"recipe:     {base.stem}, for owners of {found.usual} training images (the "
                    f"one in the middle; few is below {FEW}); --preset NAME takes another"
                )
            if base.stem == "few_images" and min(found.training) < LEAST_TRAINED:
                settings["data.validation_images"] = 2
            side = found.short_side
        else:
            settings["name"] = dataset
            base = base or preset_file(dataset)
            words.append(f"recipe:     {base.stem}")
            side = SIDES[0]
    asked = read_settings(base, [*Proposal(base, settings, [], free).overrides, *given])
    clients = value(asked, "federation.clients")
    clients = clients if isinstance(clients, int) else QUICK_OWNERS
    if quick:
        if not has(said, "federation.clients"):
            clients = min(clients, QUICK_OWNERS)
        settings |= QUICK | {"federation.clients": clients}
        if data is not None and side > QUICK_SIDE:
            settings["data.image_size"] = QUICK_SIDE
        if value(asked, "model.network") not in (None, "unet"):
            del settings["model.channels"]
        words.append("quick:      small pictures, a small network, few rounds: a look, no result")
    for key in ("evaluation.samples", "evaluation.samples_between"):
        usual = QUICK_SAMPLES if quick else value(asked, key)
        # A score needs two of each owner.
        if isinstance(usual, int) and (quick or 2 * clients > usual):
            settings[key] = max(usual, 2 * clients)
    unsaid = {name: one for name, one in settings.items() if not has(said, name)}
    return Proposal(base, unsaid, words, free, quick and not has(said, "federation.rounds"))


def has(settings: Mapping[str, Any], name: str) -> bool:
    """Whether nested settings have "section.key", or "name"."""
    section, _, key = name.rpartition(".")
    values = settings.get(section, {}) if section else settings
    return not isinstance(values, Mapping) or key in values


def value(settings: Mapping[str, Any], name: str) -> Any:
    """What nested settings have for "section.key"; None where they have it not."""
    section, _, key = name.partition(".")
    values = settings.get(section, {})
    return values.get(key) if isinstance(values, Mapping) else None


def _dataset(data: str, said: Mapping[str, Any], preset: Mapping[str, Any]) -> DatasetName:
    """What is said to lie there, or does; of several published sets the preset's."""
    for known in get_args(DatasetName):
        if value(said, "data.dataset") == known:
            return known  # type: ignore[no-any-return]
    published = published_in(data)
    for name in published:
        if len(published) == 1 or value(preset, "data.dataset") == name:
            return name
    return recognise(data)


def _look(data: str, dataset: DatasetName, said: Mapping[str, Any]) -> Survey:
    """Look at the images as they lie there."""
    section = said.get("data", {})
    section = {**(section if isinstance(section, Mapping) else {}), "dataset": dataset, "dir": data}
    config = parse_config({"data": section | {"validation_images": 0}}).data
    clients = value(said, "federation.clients")
    return survey(config, clients if isinstance(clients, int) and clients > 0 else None)


def _shape(found: Survey, said: Mapping[str, Any], words: list[str]) -> Settings:
    """Size and channels, where the pictures differ in them or are too large, and why."""
    settings: Settings = {}
    sides = sorted(side for size in found.sizes for side in size)
    if not has(said, "data.image_size") and (sides[0] < sides[-1] or sides[-1] > SIDES[0]):
        side = next((one for one in SIDES if one <= found.short_side), SIDES[-1])
        settings["data.image_size"] = side
        words.append(
            f"size:       {side} x {side}, as the pictures have sides of {sides[0]} to {sides[-1]} "
            "pixels; --set data.image_size=N takes another"
        )
    if not has(said, "data.channels") and len({*found.grey}) > 1:
        settings["data.channels"] = 3
        words.append("channels:   3, as some pictures are grey and some in colour")
    return settings

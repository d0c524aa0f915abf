"""The configurations that come with srfed, by name."""

from pathlib import Path

from srfed.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent.parent / "presets"
"""In a clone ``configs/``, in an installed srfed a copy of it."""


def preset_names() -> list[str]:
    """Every preset, in alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The file of a preset; a hyphen in its name is as good as an underscore.

    Raises:
        UserError: there is no such preset.
    """
    stem, names = name.replace("-", "_"), preset_names()
    if stem not in names:
        raise UserError(
            f"there is no preset {name}{did_you_mean(stem, names)}; allowed: {', '.join(names)}"
        )
    return FOLDER / f"{stem}.yaml"


def is_preset(path: Path) -> bool:
    """Whether a file is one of the presets, and so nobody's own."""
    return path.resolve().parent == FOLDER.resolve()

"""Every swappable part by its name in the configuration: name -> "module:Class".

A part's own constants are settings of the section that names it; they reach the part as keyword
arguments of the same names.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field

from srfed.config.settings import Section
from srfed.errors import UserError

OWN = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$"
"""A part of one's own, "module:Class"."""


class Parts(dict[str, str]):
    """The parts that can stand in one place, by name.

    Args:
        setting: which names one of them.
        what: it is, in a word.
        base: "module:Class" of what one of one's own must be.
        parts: those of srfed: name -> "module:Class".
    """

    def __init__(self, setting: str, what: str, base: str, parts: Mapping[str, str]) -> None:
        super().__init__(parts)
        self.setting, self.what, self.base = setting, what, base

    @property
    def names(self) -> Any:
        """The type of the setting: a name, or "module:Class"."""
        return Literal[tuple(self)] | Annotated[str, Field(pattern=OWN)]


OBJECTIVES = Parts(
    "diffusion.prediction",
    "objective",
    "srfed.diffusion.objective:Objective",
    {
        "noise": "srfed.diffusion.objectives.noise:NoisePrediction",
        "velocity": "srfed.diffusion.objectives.velocity:VelocityPrediction",
        "edm": "srfed.diffusion.objectives.edm:PreconditionedDenoising",
    },
)

SAMPLERS = Parts(
    "sampling.sampler",
    "sampler",
    "srfed.diffusion.sampler:Sampler",
    {
        "ddim": "srfed.diffusion.samplers.ddim:Ddim",
        "ancestral": "srfed.diffusion.samplers.ancestral:Ancestral",
        "dpm_solver": "srfed.diffusion.samplers.dpm_solver:DpmSolver",
    },
)

UPDATE_STEPS = Parts(
    "updates.steps",
    "step on an update",
    "srfed.federation.updates:UpdateStep",
    {
        "clip": "srfed.federation.updates.clip:Clip",
        "quantise": "srfed.federation.updates.quantise:Quantise",
    },
)
"""In the order in which they may follow each other: a clipped update can be quantised, codes cannot
be clipped. Those of one's own may stand anywhere among them."""

NETWORKS = Parts(
    "model.network",
    "network",
    "srfed.networks.network:Network",
    {"unet": "srfed.networks.unet:UNet"},
)
"""The settings of each are a section in ``srfed/config/model.py``."""


def chosen(parts: Parts, name: str) -> Any:
    """The class of a name, loaded now, so that reading a configuration loads nothing.

    Raises:
        UserError: one of one's own cannot be loaded, or is something else.
    """
    if name in parts:
        return _loaded(parts[name])
    try:
        found = _loaded(name)
    except Exception as error:
        # The module is somebody else's program, and may raise anything while it is loaded.
        raise UserError(
            f"{parts.setting} = {name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, _loaded(parts.base))):
        raise UserError(
            f"{parts.setting} = {name} is no {parts.what}; allowed: a class of "
            f"{parts.base.replace(':', '.')}"
        )
    return found


def make(parts: Parts, name: str, section: Section, *given: Any) -> Any:
    """A part with the settings of its section that it takes.

    Raises:
        UserError: as :func:`chosen`; or it cannot be made of these.
    """
    made = chosen(parts, name)
    try:
        return made(*given, **constants(made, section))
    except (TypeError, ValueError) as error:
        raise UserError(f"{parts.setting} = {name} cannot be made: {error}") from error


def _loaded(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def constants(made: Any, section: Section) -> dict[str, Any]:
    """The settings of a section that a class, or function, takes as keyword arguments, by name."""
    taken = {
        name
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    return {name: value for name, value in section if name in taken}

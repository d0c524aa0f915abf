"""Every swappable part by its name in the configuration: name -> "module:Class".

A part's own constants are settings of the section that names it; they reach the part as keyword
arguments of the same names.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from srfed.config.settings import Section

OBJECTIVES: Mapping[str, str] = {
    "noise": "srfed.diffusion.objectives.noise:NoisePrediction",
    "velocity": "srfed.diffusion.objectives.velocity:VelocityPrediction",
    "edm": "srfed.diffusion.objectives.edm:PreconditionedDenoising",
}
"""``diffusion.prediction``; a class of :class:`srfed.diffusion.objective.Objective`."""

SAMPLERS: Mapping[str, str] = {
    "ddim": "srfed.diffusion.samplers.ddim:Ddim",
    "ancestral": "srfed.diffusion.samplers.ancestral:Ancestral",
    "dpm_solver": "srfed.diffusion.samplers.dpm_solver:DpmSolver",
}
"""``sampling.sampler``; a class of :class:`srfed.diffusion.sampler.Sampler`."""

UPDATE_STEPS: Mapping[str, str] = {
    "clip": "srfed.federation.updates.clip:Clip",
    "quantise": "srfed.federation.updates.quantise:Quantise",
}
"""``updates.steps``; classes of :class:`srfed.federation.updates.UpdateStep`, in the order in which
they may follow each other: a clipped update can be quantised, codes cannot be clipped."""

NETWORKS: Mapping[str, str] = {"unet": "srfed.networks.unet:UNet"}
"""``model.network``; a class of :class:`srfed.networks.network.Network`, whose settings are a
section in ``srfed/config/model.py``."""


def chosen(table: Mapping[str, str], name: str) -> Any:
    """The class that a table has under a name; loaded now, so that reading a configuration loads
    nothing.
    """
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def constants(made: Any, section: Section) -> dict[str, Any]:
    """The settings of a section that a class, or function, takes as keyword arguments, by name."""
    taken = {
        name
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    return {name: value for name, value in section if name in taken}

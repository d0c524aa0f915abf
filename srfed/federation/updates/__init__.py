"""A client's update Δ_i = φ_i - φ^r, and what becomes of it before it travels: named steps, one
after the other, undone by the server in reverse.

Without steps φ_i itself travels. With them Δ_i does, in the record ``update``: both sides compute
it in φ's own type, float32, one rounding an operation and value by value, so that neither threads
nor backend change a bit; sums are float64.

A step is a class in a file of its own, and a line in
:data:`srfed.config.choices.UPDATE_STEPS`; its constants are settings of the section ``updates``.
Anybody's own is named "module:Class".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType, Protocol, runtime_checkable

import torch
from torch import Tensor

from srfed.config import RunConfig, UpdatesConfig
from srfed.config.choices import UPDATE_STEPS, make
from srfed.federation.layout import Layout
from srfed.randomness import derive_generator

Delta = NewType("Delta", dict[str, Tensor])
"""Δ_i, or what a step has made of it: what travels instead of φ_i."""
Memory = dict[str, Tensor]
"""What a step keeps at the client from one accepted round to the next; it never leaves."""


@dataclass(frozen=True)
class Length:
    """How long an update can be.

    Attributes:
        norm: its Euclidean norm, in the round at hand.
        value: its largest absolute value, in any round of the run.
    """

    norm: float
    value: float


@runtime_checkable
class UpdateStep(Protocol):
    """One thing that is done to an update before it travels; its constructor takes settings of the
    section ``updates`` as keyword arguments of the same names.
    """

    def layout(self, layout: Layout) -> Layout:
        """What travels in place of tensors of this layout."""

    def encode(
        self, delta: Delta, memory: Memory, generator: torch.Generator
    ) -> tuple[Delta, Memory]:
        """What travels in place of an update, and what the client keeps for the next one.

        Args:
            delta: the update, or what the step before has made of it.
            memory: what was kept after the last accepted round; empty at first.
            generator: named by seed, step, client and round, so known to the server too.
        """

    def decode(self, delta: Delta, layout: Layout) -> Delta:
        """What the server takes the update to be, of the layout that :meth:`encode` was given.

        Raises:
            ValueError: no :meth:`encode` has made this; the text says why.
        """

    def longest(self, length: Length, layout: Layout) -> Length:
        """How long the decoded update can be where what is encoded is no longer than this."""

    def in_words(self) -> str:
        """What the step does, for whoever agrees to it: "quantised to 8 bits"."""


def steps_of(settings: UpdatesConfig) -> dict[str, UpdateStep]:
    """The steps of a run by name, in their order."""
    return {name: make(UPDATE_STEPS, name, settings) for name in settings.steps}


def difference(trained: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Delta:
    """Δ_i = φ_i - φ^r."""
    return Delta({name: tensor - shared[name] for name, tensor in trained.items()})


def encode_update(
    config: RunConfig,
    delta: Delta,
    memory: Mapping[str, Memory],
    client: str,
    round_number: int,
) -> tuple[Delta, dict[str, Memory]]:
    """What travels in place of an update, and what each step keeps, by its name.

    Args:
        config: the run's configuration.
        delta: Δ_i.
        memory: what the steps kept after the client's last accepted round.
        client: its id, and
        round_number: the round; both name the draws.
    """
    kept = {}
    for name, step in steps_of(config.updates).items():
        generator = derive_generator(config.seed, f"update {name}", client, round_number)
        delta, kept[name] = step.encode(delta, memory.get(name, {}), generator)
    return delta, {name: tensors for name, tensors in kept.items() if tensors}


def decode_update(settings: UpdatesConfig, update: Delta, layout: Layout) -> Delta:
    """Δ_i as the server takes it to be.

    Args:
        settings: the steps.
        update: what travelled, of :func:`layout_of_update`.
        layout: φ's.

    Raises:
        ValueError: no client can have encoded this.
    """
    undone = []
    for step in steps_of(settings).values():
        undone.append((step, layout))
        layout = step.layout(layout)
    for step, before in reversed(undone):
        update = step.decode(update, before)
    return update


def layout_of_update(settings: UpdatesConfig, layout: Layout) -> Layout:
    """What travels in place of an update of φ's layout."""
    for step in steps_of(settings).values():
        layout = step.layout(layout)
    return layout


def longest_update(settings: UpdatesConfig, length: Length, layout: Layout) -> float:
    """The largest norm of a decoded update, where Δ_i is no longer than this."""
    for step in steps_of(settings).values():
        length, layout = step.longest(length, layout), step.layout(layout)
    return length.norm


def update_in_words(settings: UpdatesConfig) -> str:
    """What the steps do, one after the other."""
    return ", ".join(step.in_words() for step in steps_of(settings).values())


def norm_of(delta: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all values together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))

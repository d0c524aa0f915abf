"""Control variates (SCAFFOLD, Karimireddy et al. 2020): how c and c_i travel, and what is kept.

c_i is the mean gradient of φ over a client's last round, c the mean of the c_i of a round; to each
local step's gradient a client adds c - c_i, so that clients with different images drift apart less.
c goes down beside φ, and like it: as float32, or as codes of ``updates.shared_bits``. What goes up
in place of c_i is its codes of 8 bits (:class:`~srfed.federation.updates.quantise.Quantise`),
without error feedback, as c_i is not summed up over rounds. Client and server both go on with what
the codes of c_i stand for, so that the c_i's which are added and taken away are the same to the
bit.

A mean of clipped gradients is no longer than ``training.gradient_clip``, but rounding can make it
longer: its scales are then shortened, so that the bound holds of what the codes stand for too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from srfed.config import RunConfig, TrainingConfig
from srfed.errors import UserError
from srfed.federation.layout import Layout, check_finite, layout_of
from srfed.federation.updates import Delta, Memory, norm_of
from srfed.federation.updates.quantise import SCALES, Quantise
from srfed.networks.partition import Control
from srfed.randomness import derive_generator

OLDEST = 5
"""Rounds after which a client's c_i says nothing of its gradients any more."""
MEMORY = "control"
"""Under which name a client keeps c_i; no step on an update is called so."""
ROUND = ".round"
"""The tensor that says of which round a kept c_i is. No module's tensor begins with a dot."""
ROUNDING = 1e-6
"""What scales, and what they are multiplied by, may be off in float32, relative to it, and more."""

_CODES = Quantise(quantise_bits=8)


def layout_of_control(shared: Layout) -> Layout:
    """What travels in place of a c_i of φ's layout."""
    return _CODES.layout(shared)


def control_in_words(training: TrainingConfig) -> str:
    """What a c_i is when it leaves, for whoever agrees to it."""
    limit = training.gradient_clip
    norm = "" if limit is None else f", of norm {limit:g} at most"
    return f"the mean gradient of φ over the round's steps{norm}, in 8 bits a value"


def encode_control(
    config: RunConfig, gradient: Control, client: str, round_number: int
) -> tuple[Control, Control]:
    """What travels in place of a round's mean gradient, and the c_i that it stands for.

    Args:
        config: the run's configuration.
        gradient: the mean gradient.
        client: its id, and
        round_number: the round; both name the draws.

    Raises:
        UserError: the gradient has values that are not finite.
    """
    generator = derive_generator(config.seed, "control variates", client, round_number)
    return _encode(_CODES, config.training, gradient, round_number, generator)


def decode_control(training: TrainingConfig, codes: Control, shared: Layout) -> Control:
    """The c_i that a client has kept.

    Args:
        training: the run's settings.
        codes: what travelled, of :func:`layout_of_control`.
        shared: φ's layout.

    Raises:
        ValueError: no client can have encoded this.
    """
    decoded = _CODES.decode(Delta(codes), shared)
    check_finite(decoded)
    limit = training.gradient_clip
    if limit is not None and (norm := norm_of(decoded)) > limit * (1 + ROUNDING):
        raise ValueError(
            f"it has norm {norm:.3g}, and {limit:g} is the most that gradients clipped by "
            "training.gradient_clip can have on average"
        )
    return Control(decoded)


def kept_control(control: Control, round_number: int) -> dict[str, Memory]:
    """c_i, and of which round it is, as a client's memory."""
    return {MEMORY: {**control, ROUND: torch.tensor(round_number)}}


def own_control(memory: Mapping[str, Memory], round_number: int) -> tuple[Control, str]:
    """The c_i of a client's memory, and why it is none, in words; empty where it is one.

    Args:
        memory: what was kept after its last accepted round.
        round_number: the round that begins.
    """
    kept = dict(memory.get(MEMORY, {}))
    if not kept:
        return Control({}), "no control variate is kept here; c_i begins at 0"
    made = int(kept.pop(ROUND))
    if round_number - made > OLDEST:
        return Control({}), (
            f"the control variate that is kept here is of round {made}, more than {OLDEST} rounds "
            "ago; c_i begins at 0"
        )
    return Control(kept), ""


def correction(control: Control, own: Control) -> Control:
    """c - c_i; an empty c_i is 0."""
    return Control({name: c - own[name] if own else c for name, c in control.items()})


def encode_sent(
    config: RunConfig,
    control: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    round_number: int,
) -> Control:
    """What comes to every client of a round in place of c: in the order and the type of φ, or its
    codes; an empty c is 0.

    Args:
        config: the run's configuration.
        control: c.
        shared: φ.
        round_number: the round; it names the draws.

    Raises:
        UserError: c has values that are not finite, and is to come in codes.
    """
    whole = Control(
        {
            name: control[name].to(tensor.dtype) if control else torch.zeros_like(tensor)
            for name, tensor in shared.items()
        }
    )
    bits = config.updates.shared_bits
    if bits is None:
        return whole
    generator = derive_generator(config.seed, "c of control variates", round_number)
    step = Quantise(quantise_bits=bits)
    codes, _ = _encode(step, config.training, whole, round_number, generator)
    return codes


def _encode(
    step: Quantise,
    training: TrainingConfig,
    gradient: Control,
    round_number: int,
    generator: torch.Generator,
) -> tuple[Control, Control]:
    """Codes of a mean gradient, and what they stand for, no longer than clipped gradients are."""
    layout, limit = layout_of(gradient), training.gradient_clip
    codes, _ = step.encode(Delta(gradient), {}, generator)
    if not bool(codes[SCALES].isfinite().all()):
        raise UserError(f"the gradients of round {round_number} have values that are not finite")
    decoded = step.decode(codes, layout)
    if limit is not None and (norm := norm_of(decoded)) > limit:
        codes[SCALES] = (codes[SCALES].double() * (limit / norm)).float()
        decoded = step.decode(codes, layout)
    return Control(codes), Control(decoded)

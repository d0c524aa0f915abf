"""What comes to all clients of a round: φ, and c of control variates, as float32 or, with
``updates.shared_bits``, as codes of so many bits and a scale a tensor.

A client trains from what the codes stand for, φ̂, and its update Δ_i is relative to that. The
server adds the mean Δ_i to φ itself, so what rounding takes away in one round is not missing in
the next. An evaluation is of φ's moving average as it is, float32.
"""

from collections.abc import Mapping

from torch import Tensor

from srfed.config import RunConfig, UpdatesConfig
from srfed.errors import UserError
from srfed.federation.layout import Layout, check_finite, layout_of
from srfed.federation.updates import Delta
from srfed.federation.updates.quantise import SCALES, Quantise
from srfed.networks.partition import Shared
from srfed.randomness import derive_generator


def layout_of_coming(settings: UpdatesConfig, shared: Layout) -> Layout:
    """What comes in place of φ, or of c, of this layout."""
    bits = settings.shared_bits
    return shared if bits is None else Quantise(quantise_bits=bits).layout(shared)


def encode_shared(config: RunConfig, shared: Shared, round_number: int) -> tuple[Shared, Shared]:
    """What comes in place of φ^r to every client of a round, and the φ̂ that it stands for.

    Args:
        config: the run's configuration.
        shared: φ^r.
        round_number: the round; it names the draws.

    Raises:
        UserError: φ^r has values that are not finite.
    """
    if config.updates.shared_bits is None:
        return shared, shared
    step, layout = Quantise(quantise_bits=config.updates.shared_bits), layout_of(shared)
    # At random, not to the nearest code: that would be wrong by the same amount, round after
    # round, where φ moves by less than half a scale in one.
    generator = derive_generator(config.seed, "φ of a round", round_number)
    codes, _ = step.encode(Delta(shared), {}, generator)
    if not bool(codes[SCALES].isfinite().all()):
        raise UserError(f"φ of round {round_number} has values that are not finite")
    return Shared(codes), Shared(step.decode(codes, layout))


def decode_coming(
    settings: UpdatesConfig, came: Mapping[str, Tensor], shared: Layout
) -> dict[str, Tensor]:
    """φ̂, or c, as a client trains with it.

    Args:
        settings: how many bits there are.
        came: what came, of :func:`layout_of_coming`.
        shared: φ's layout.

    Raises:
        ValueError: no server can have encoded this.
    """
    bits = settings.shared_bits
    if bits is None:
        return dict(came)
    decoded = Quantise(quantise_bits=bits).decode(Delta(dict(came)), shared)
    check_finite(decoded)
    return decoded


def coming_in_words(settings: UpdatesConfig) -> str:
    """How the values come, for whoever agrees to it."""
    bits = settings.shared_bits
    return "in float32" if bits is None else f"in {bits} bits a value"

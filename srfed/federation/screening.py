"""Screening: what a reply must be before it may touch φ. One bad reply is refused, never the round.

What it may say is declared in :mod:`srfed.federation.contract`; here every reply, description and
error is held to it, the size of what is to be read before it is read.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srfed.errors import UserError
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.metrics.memorisation import Audit
from srfed.evaluation.references import ClientStatistics
from srfed.federation.bounds import (
    LARGEST_FEATURE,
    LONGEST_TEXT,
    MOST_ARRAYS,
    MOST_IMAGES,
    SLACK,
    SLACK_BYTES,
    EvaluatePlan,
    Number,
    TrainPlan,
)
from srfed.federation.contract import DESCRIBED, Contract, Form
from srfed.federation.control import decode_control
from srfed.federation.layout import Layout, check_finite, layout_bytes, layout_of, value_bytes
from srfed.federation.messages import (
    AGAINST_TRIVIAL,
    CONTROL,
    DIED,
    FAILED,
    GENERATED,
    IMPOSSIBLE_CONFIG,
    LOST_STORE,
    METRICS,
    OTHER_PROTOCOL,
    PROTOCOL,
    REFUSED,
    REPLY,
    RESTARTED,
    SETS,
    SHARED,
    STATISTICS,
    UPDATE,
    Description,
    Failure,
    Packed,
    Reply,
    ReplyHeader,
    other_protocol,
    protocol_of,
    read_audit,
    read_comparison,
)
from srfed.federation.updates import Delta, decode_update, norm_of
from srfed.flat import joined
from srfed.networks.partition import Control
from srfed.records import LOST_STORE_WORDS, Comparison
from srfed.storage.client_store import check_name
from srfed.training.divergence import DIVERGED
from srfed.training.optimizer import Reach
from srfed.units import printable

CLEARLY = 0.01
"""By so much a norm in float32 is never wrong."""


class RefusedError(Exception):
    """A reply is refused; the text says why, in the server's words, printable whatever it
    quotes.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


class NotFiniteError(RefusedError):
    """A reply is refused for values that are no numbers."""


@dataclass(frozen=True)
class TrainReply:
    """An accepted update.

    Attributes:
        shared: φ_i, shortened where it was too long.
        plan: what the server knows of the client's round.
        loss: mean loss, its own word.
        loss_by_quarter: the same by quarter of the timestep range; NaN where none was drawn.
        shortened: what its update was multiplied by; 1 where it was not too long.
        control: c_i of control variates; empty without them.
        against_trivial: its loss over that of a predictor that has learned nothing, its own word; 0
            in rounds in which that is not asked.
        restarted: whether it had nothing to go on from, and began anew.
    """

    shared: dict[str, Tensor]
    plan: TrainPlan
    loss: float
    loss_by_quarter: list[float]
    shortened: float
    control: Control
    against_trivial: float = 0.0
    restarted: bool = False


@dataclass(frozen=True)
class EvaluateReply:
    """An accepted evaluation, in one of the two modes.

    Attributes:
        images, strip: in ``samples`` mode, uint8 N x H x W x C and K x H x W x C.
        statistics: in ``statistics`` mode, statistics of the client's features.
        ssim: SSIM-rec by timestep.
        audit: the memorisation audit, if there was one.
        comparison: what joining is worth to the client, its own word, if that is told.
    """

    images: Tensor | None
    strip: Tensor | None
    statistics: ClientStatistics | None
    ssim: dict[int, float]
    audit: Audit | None
    comparison: Comparison | None


@dataclass(frozen=True)
class ValidateReply:
    """An accepted loss on validation images.

    Attributes:
        loss: the client's own word; None where too few images stand behind it to be told.
    """

    loss: float | None


def screen_description(reply: Reply) -> Description:
    """Check what a client says of itself: its fields, printable texts, possible numbers. Raises
    RefusedError.
    """
    if reply.failure is not None:
        if reply.failure.code == REFUSED:
            # The guard's own refusals say why; other errors may quote anything.
            words = reason_of_failure(reply.failure)
            if IMPOSSIBLE_CONFIG in words:
                # Sites from before there was a protocol see but settings that they do not know.
                words += (
                    f"; install the same srfed at both if its own speaks no protocol {PROTOCOL}"
                )
            if words.endswith(OTHER_PROTOCOL):
                # Sites of protocol 3 look for the request under another name.
                words += f" than {PROTOCOL}; install the same srfed at both"
            raise RefusedError(words)
        if reply.failure.code == DIED:
            raise RefusedError(f"{reason_of_failure(reply.failure)}, over and over")
        raise RefusedError("it cannot describe itself; the reason is in its client.log")
    theirs = protocol_of(reply.header)
    if theirs != PROTOCOL:
        raise RefusedError(other_protocol("site", theirs, "server"))
    try:
        _check_records(reply, DESCRIBED)
        description = Description.of(reply.header)
    except (ValueError, RefusedError) as error:
        raise RefusedError(
            f"it describes itself in another way ({error}); is its srfed another version?"
        ) from error
    try:
        check_name(description.client)
    except UserError as error:
        raise RefusedError(str(error)) from error
    declared = DESCRIBED.header_numbers
    _check_numbers({name: getattr(description, name) for name in declared}, declared)
    return description


@contextmanager
def _divergence_by_its_name() -> Iterator[None]:
    """Values of an update that are no numbers are called what they come of."""
    try:
        yield
    except NotFiniteError as error:
        raise RefusedError(f"{DIVERGED}: {error}") from error


@_divergence_by_its_name()
def screen_train(
    reply: Reply,
    expected: ReplyHeader,
    contract: Contract,
    plan: TrainPlan,
    reach: Reach | None,
    shared: Mapping[str, Tensor],
) -> TrainReply:
    """Check an update against φ as it came to the client: who, which attempt, key set, shapes,
    dtypes, finite values, numbers, its length. Steps on it are undone: what is accepted is φ_i, in
    φ's own type. So is a control variate, decoded and no longer than clipped gradients can make it.

    Args:
        reply: as it came.
        expected: the client and attempt that it must answer for.
        contract: what the run's messages hold.
        plan: what the client was to do.
        reach: how far its optimizer can have moved φ; None where nothing bounds it.
        shared: φ as it came to the client, in the partition's order; what it was changed from.

    Raises:
        RefusedError: it is not what was asked for.
    """
    form = contract.trained(plan)
    _check_header(reply, expected, form)
    tensors = _tensors(reply, form)
    metrics = reply.numbers
    _check_numbers(metrics, form.numbers)
    reach = contract.reach(reach)
    if SHARED in form.arrays:
        update = tensors[SHARED]
        moved = {} if _surely_usual(update, shared, reach) else _difference(update, shared)
    else:
        try:
            delta = decode_update(contract.config.updates, Delta(tensors[UPDATE]), contract.shared)
        except ValueError as error:
            raise RefusedError(f"its update cannot be decoded: {error}") from error
        _check_finite(delta)
        moved = {name: tensor.double() for name, tensor in delta.items()}
        update = _moved(shared, moved, 1.0)
    shortened = 1.0 if reach is None else _shortening(norm_of(moved), reach)
    if shortened < 1:
        update = _moved(shared, moved, shortened)
    control = Control({})
    if CONTROL in form.arrays:
        codes, training = Control(tensors[CONTROL]), contract.config.training
        try:
            control = decode_control(training, codes, contract.shared)
        except ValueError as error:
            raise RefusedError(f"its control variate is impossible: {error}") from error
    quarters = metrics["loss_by_quarter"]
    assert isinstance(quarters, list), "the numbers were checked"
    losses = [float(loss) for loss in quarters]
    against = _one(metrics, AGAINST_TRIVIAL) if plan.judged else 0.0
    restarted = plan.restarts and bool(_one(metrics, RESTARTED))
    loss = _one(metrics, "loss")
    return TrainReply(update, plan, loss, losses, shortened, control, against, restarted)


def screen_validation(reply: Reply, expected: ReplyHeader, contract: Contract) -> ValidateReply:
    """Check a loss on validation images, and that as many stand behind it as were asked for. Raises
    RefusedError.
    """
    # Equal images are on one side, so there can be more than the setting says.
    images = Number(contract.config.data.validation_images, MOST_IMAGES, whole=True)
    form = contract.validated(images)
    _check_header(reply, expected, form)
    _check_numbers(reply.numbers, form.numbers)
    loss = _one(reply.numbers, "loss")
    return ValidateReply(None if math.isnan(loss) else loss)


def _surely_usual(
    update: Mapping[str, Tensor], shared: Mapping[str, Tensor], reach: Reach | None
) -> bool:
    """Whether φ_i is clearly nearer to φ than is usual, as almost all are: found in float32, and in
    a fraction of the time that the norm in float64 takes.
    """
    if reach is None:
        return True
    given, before = list(update.values()), [shared[name] for name in update]
    if any(tensor.dtype != torch.float32 for tensor in (*given, *before)):
        return False
    return float((joined(given) - joined(before)).norm()) < (1 - CLEARLY) * reach.usual


def _difference(update: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Δ_i in float64."""
    return {name: tensor.double() - shared[name].double() for name, tensor in update.items()}


def _moved(
    shared: Mapping[str, Tensor], moved: Mapping[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """φ as it came and so much of an update, in φ's own type."""
    return {
        name: (shared[name].double() + factor * delta).to(shared[name].dtype)
        for name, delta in moved.items()
    }


def screen_samples(
    reply: Reply, expected: ReplyHeader, contract: Contract, plan: EvaluatePlan
) -> EvaluateReply:
    """Check samples: number, shape, uint8; and the numbers beside them. Raises RefusedError."""
    form = contract.evaluated(plan, None)
    _check_header(reply, expected, form)
    arrays = _tensors(reply, form)[GENERATED]
    curve, audit = _evaluation_numbers(reply, plan, form)
    compared = read_comparison(reply.numbers)
    return EvaluateReply(arrays["images"], arrays["strip"], None, curve, audit, compared)


def screen_statistics(
    reply: Reply,
    expected: ReplyHeader,
    contract: Contract,
    plan: EvaluatePlan,
    dimension: int,
    features: str,
    highest: float = LARGEST_FEATURE,
) -> EvaluateReply:
    """Check statistics: of this feature network, of so many samples, possible numbers; SSIM as for
    samples.

    Args:
        reply: as it came.
        expected: the client and attempt that it must answer for.
        contract: what the run's messages hold.
        plan: what the client was to do.
        dimension: D, of the features.
        features: fingerprint of the feature network.
        highest: of its features; see :class:`srfed.evaluation.features.network.FeatureNetwork`.

    Raises:
        RefusedError: it is not what was asked for.
    """
    form = contract.evaluated(plan, dimension)
    _check_header(reply, expected, form)
    if ReplyHeader.of(reply.header).features != features:
        raise RefusedError(
            "its features are of another network, other weights or another resize rule"
        )
    arrays = _tensors(reply, form)[STATISTICS]
    curve, audit = _evaluation_numbers(reply, plan, form)
    statistics = {}
    for name, count in zip(SETS, (plan.samples, plan.test_images, plan.images), strict=True):
        mean, scatter = arrays[f"{name}.mean"], arrays[f"{name}.scatter"]
        if count < 2:
            raise RefusedError(f"statistics of {count} {name} images are none")
        if max(float(mean.abs().max()), float(scatter.abs().max()) / count) > LARGEST_FEATURE:
            raise RefusedError(f"its {name} features are impossibly large")
        statistics[name] = FeatureStatistics(count, mean.numpy(), scatter.numpy())
        try:
            statistics[name].check_possible(highest)
        except ValueError as error:
            raise RefusedError(f"its statistics of {name} features are none: {error}") from error
    compared = read_comparison(reply.numbers)
    return EvaluateReply(None, None, ClientStatistics(**statistics), curve, audit, compared)


def reason_of_failure(failure: Failure) -> str:
    """An error reply in one line, printable."""
    if failure.code == FAILED:
        return "it failed; the reason is in the client's own log"
    if failure.code == LOST_STORE:
        return (
            f"{LOST_STORE_WORDS}: put the site's state folder back, or go on with "
            "federation.on_lost_store=restart"
        )
    reason = printable(failure.reason or "no reason given")
    if failure.code == REFUSED:
        return printable(f"it refuses: {reason}")
    if failure.code == DIED:
        return printable(f"its process died: {reason}")
    return printable(f"it failed: Flower's error {failure.code}, {reason}")


def _shortening(norm: float, reach: Reach) -> float:
    """What to multiply an update of this norm by; raises RefusedError where no optimizer can have
    made it.
    """
    if norm > reach.largest:
        raise RefusedError(
            f"its update has norm {norm:.3g}, and {reach.largest:.3g} is the most that a round can "
            "move φ"
        )
    return min(1.0, reach.usual / norm) if norm else 1.0


def _evaluation_numbers(
    reply: Reply, plan: EvaluatePlan, form: Form
) -> tuple[dict[int, float], Audit | None]:
    """SSIM-rec by timestep, and the audit; raises RefusedError where a number is not what it can
    be.
    """
    metrics = reply.numbers
    # The client knows whether its held-out images can be a measure; where they cannot there is no
    # audit.
    _check_numbers(metrics, form.numbers_of(metrics))
    curve: dict[int, float] = {}
    if plan.timesteps:
        timesteps, values = metrics["ssim_timesteps"], metrics["ssim"]
        assert isinstance(timesteps, list), "the numbers were checked"
        assert isinstance(values, list), "the numbers were checked"
        if tuple(timesteps) != plan.timesteps:
            raise RefusedError(
                f"its SSIM curve is measured at {timesteps}, not at {list(plan.timesteps)}"
            )
        curve = dict(zip(plan.timesteps, map(float, values), strict=True))
    try:
        return curve, read_audit(metrics)
    except ValueError as error:
        raise RefusedError(f"its memorisation audit is malformed: {error}") from error


def _check_header(reply: Reply, expected: ReplyHeader, form: Form) -> None:
    if reply.failure is not None:
        raise RefusedError(reason_of_failure(reply.failure))
    _check_records(reply, form)
    try:
        header = replace(ReplyHeader.of(reply.header), features=expected.features)
    except ValueError as error:
        raise RefusedError(f"its header is malformed: {error}") from error
    if header != expected:
        raise RefusedError(
            f"it answers as {header.client!r} for attempt {header.attempt!r}, not for this one"
        )


def _check_records(reply: Reply, form: Form) -> None:
    """No record and no field that nobody asked for, and no text longer than a text may be."""
    records = {REPLY, *form.arrays, *([METRICS] if form.numbers else [])}
    extra = [name for name in reply.records if name not in records]
    if extra:
        raise RefusedError(f"{len(extra)} records that nobody asked for: {extra[0]!r:.100}")
    if unknown := [name for name in reply.header if name not in form.header]:
        raise RefusedError(f"{len(unknown)} fields that nobody asked for: {unknown[0]!r:.100}")
    for name, value in reply.header.items():
        text = value if isinstance(value, str) else ""
        if len(text) > LONGEST_TEXT or text != printable(text, LONGEST_TEXT):
            raise RefusedError(
                f"{name!r} is {printable(repr(text), 50)}: {len(text)} characters, or not printable"
            )


def _tensors(reply: Reply, form: Form) -> dict[str, dict[str, Tensor]]:
    """The tensors of each record, as its layout has them; looks at a record's size before it reads
    it.
    """
    records = {}
    for name, layout in form.arrays.items():
        if (packed := reply.arrays.get(name)) is None:
            raise RefusedError(f"it has no arrays {name!r}")
        _check_size(packed, layout)
        try:
            tensors = packed.read()
        except Exception as error:
            # numpy's reader of .npy headers raises what Python's tokenizer and parser raise,
            # besides its own.
            raise RefusedError(f"its arrays {name!r} cannot be read: {error}") from error
        _check_like(tensors, layout)
        _check_finite(tensors)
        records[name] = {key: tensors[key] for key, _, _ in layout}
    return records


def _check_size(packed: Packed, expected: Layout) -> None:
    """Number of arrays, bytes of the layout and of all others, of a record that has not been read
    yet.
    """
    if packed.count > MOST_ARRAYS:
        raise RefusedError(f"it sent {packed.count} arrays, where {MOST_ARRAYS} are the most")
    for what, sent, asked in (
        ("its layout is", packed.layout_size, len(layout_bytes(expected))),
        ("its values are", packed.value_size, value_bytes(expected)),
    ):
        if sent > SLACK * asked + SLACK_BYTES:
            raise RefusedError(f"{what} {sent} bytes long, where {asked} were asked for")


def _check_like(tensors: Mapping[str, Tensor], expected: Layout) -> None:
    known = {name: (dtype, shape) for name, dtype, shape in expected}
    missing, extra = sorted(set(known) - set(tensors)), sorted(set(tensors) - set(known))
    if missing or extra:
        raise RefusedError(
            f"{len(missing)} tensors are missing {missing[:1]} and {len(extra)} unknown {extra[:1]}"
        )
    for name, dtype, shape in layout_of(tensors):
        if (dtype, shape) != known[name]:
            raise RefusedError(
                f"tensor {name!r} is torch.{dtype} {shape}, not torch.{known[name][0]} "
                f"{known[name][1]}"
            )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    try:
        check_finite(tensors)
    except ValueError as error:
        raise NotFiniteError(str(error)) from error


def _check_numbers(
    values: Mapping[str, float | list[float]], declared: Mapping[str, Number]
) -> None:
    """Just the declared numbers, each within its bounds."""
    if unknown := [name for name in values if name not in declared]:
        raise RefusedError(f"{len(unknown)} numbers that nobody asked for: {unknown[0]!r:.100}")
    for name, number in declared.items():
        value = values.get(name)
        if not number.fits(value):
            sent = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            asked = number if number.count is None else f"a list of {number.count}"
            raise RefusedError(f"its number {name!r} is {sent}, not {asked}")
        for member in value if isinstance(value, list) else [value]:
            if member is None or not number.allows(member):
                raise RefusedError(f"its number {name!r} is {member!r}, not {number}")


def _one(metrics: Mapping[str, float | list[float]], name: str) -> float:
    value = metrics[name]
    assert not isinstance(value, list), f"screening lets no list through as {name}"
    return float(value)

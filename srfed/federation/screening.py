"""Screening: what a reply must be before it may touch φ. One bad reply is refused, never the round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode
from torch import Tensor

from srfed.evaluation.central import Moments
from srfed.evaluation.frechet import FeatureStatistics
from srfed.evaluation.memorisation import Audit
from srfed.federation.messages import (
    FAILED,
    GENERATED,
    SETS,
    SHARED,
    SHARED_MOMENTS,
    STATISTICS,
    ReplyHeader,
    read_audit,
    read_metrics,
    read_tensors,
)
from srfed.training.local import LOSS_QUARTERS
from srfed.training.optimizers import MOMENTS

LOST = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    }
)
"""Flower's errors that mean that a client is gone; the others mean that it has failed."""
MOST_STEPS = 1_000_000
MOST_IMAGES = 1_000_000_000
LARGEST_FEATURE = 1e9
"""Feature networks give numbers of the order of 1; far larger ones would overflow in the score of everybody."""
LONGEST_REASON = 200


class RefusedError(Exception):
    """A reply is refused; the text says why, in the server's words only."""


@dataclass(frozen=True)
class TrainReply:
    """An accepted update.

    Attributes:
        shared: φ_i.
        shared_moments: φ's optimizer moments; empty unless they are averaged.
        examples: m_i.
        metrics: the client's numbers.
    """

    shared: dict[str, Tensor]
    shared_moments: dict[str, Tensor]
    examples: int
    metrics: dict[str, float | list[float]]


@dataclass(frozen=True)
class EvaluateReply:
    """An accepted evaluation, in one of the two modes.

    Attributes:
        images, strip: in ``samples`` mode, uint8 N x H x W x C and K x H x W x C.
        moments: in ``moments`` mode, statistics of the client's features.
        ssim: SSIM-rec by timestep.
        audit: the memorisation audit, if there was one.
        metrics: the client's numbers.
    """

    images: Tensor | None
    strip: Tensor | None
    moments: Moments | None
    ssim: dict[int, float]
    audit: Audit | None
    metrics: dict[str, float | list[float]]


def screen_train(message: Message, expected: ReplyHeader, shared: Mapping[str, Tensor], moments: bool) -> TrainReply:
    """Check an update against φ^r: who, which attempt, key set, shapes, dtypes, finite values.

    Args:
        message: the reply as it came.
        expected: the client and attempt that it must answer for.
        shared: φ^r, in the partition's order.
        moments: whether φ's moments must come too.

    Raises:
        RefusedError: it is not what was asked for.
    """
    _check_header(message, expected)
    update = _tensors(message, SHARED)
    _check_like(update, shared)
    metrics = read_metrics(message.content)
    examples = _number(metrics, "examples")
    for name in ("loss", "images", "seconds", "shared_steps"):
        _number(metrics, name)
    if examples < 1 or examples != int(examples):
        raise RefusedError(f"it claims {examples} training images")
    # The server counts the steps off one by one, in the decay of its moving average.
    if not 0 <= _number(metrics, "shared_steps") <= MOST_STEPS:
        raise RefusedError(f"it claims {metrics['shared_steps']} steps in a round")
    quarters = metrics.get("loss_by_quarter")
    if not isinstance(quarters, list) or len(quarters) != LOSS_QUARTERS:
        raise RefusedError(f"its loss by quarter is {quarters!r}")
    averaged: dict[str, Tensor] = {}
    if moments:
        averaged = _tensors(message, SHARED_MOMENTS)
        _check_like(averaged, moment_templates(shared))
    return TrainReply(update, averaged, int(examples), metrics)


def screen_samples(
    message: Message, expected: ReplyHeader, samples: int, shape: tuple[int, int, int], timestep: int
) -> EvaluateReply:
    """Check samples: number, shape, uint8; SSIM at most 1, and at ``timestep`` too. Raises RefusedError."""
    _check_header(message, expected)
    arrays = _tensors(message, GENERATED)
    if set(arrays) != {"images", "strip"}:
        raise RefusedError(f"it sent arrays {sorted(arrays)} for samples")
    for name, count in (("images", (samples,)), ("strip", arrays["strip"].shape[:1])):
        if arrays[name].dtype != torch.uint8 or tuple(arrays[name].shape) != (*count, *shape):
            raise RefusedError(
                f"its {name} are {arrays[name].dtype} {tuple(arrays[name].shape)}, not uint8 {(*count, *shape)}"
            )
    metrics = read_metrics(message.content)
    curve = _ssim_curve(metrics, timestep)
    return EvaluateReply(arrays["images"], arrays["strip"], None, curve, _audit(metrics), metrics)


def screen_moments(
    message: Message, expected: ReplyHeader, samples: int, dimension: int, features: str, timestep: int
) -> EvaluateReply:
    """Check statistics: of this feature network, of so many samples, possible numbers; SSIM as for samples.

    Args:
        message: the reply as it came.
        expected: the client and attempt that it must answer for.
        samples: the number of images it was to generate.
        dimension: D, of the features.
        features: fingerprint of the feature network.
        timestep: t*, at which SSIM must be measured if it is.

    Raises:
        RefusedError: it is not what was asked for.
    """
    _check_header(message, expected)
    if ReplyHeader.of(message.content).features != features:
        raise RefusedError("its features are of another network, other weights or another resize rule")
    arrays, metrics = _tensors(message, STATISTICS), read_metrics(message.content)
    shapes = {"mean": (dimension,), "scatter": (dimension, dimension)}
    templates = {
        f"{name}.{part}": torch.empty(shape, dtype=torch.float64) for name in SETS for part, shape in shapes.items()
    }
    _check_like(arrays, templates)
    statistics = {}
    for name in SETS:
        count, scatter = _number(metrics, f"{name}_count"), arrays[f"{name}.scatter"]
        if not count.is_integer() or (count != samples if name == "generated" else not 2 <= count <= MOST_IMAGES):
            raise RefusedError(f"it claims statistics of {count:g} {name} images")
        mean = arrays[f"{name}.mean"]
        if max(float(mean.abs().max()), float(scatter.abs().max()) / count) > LARGEST_FEATURE:
            raise RefusedError(f"its {name} features are impossibly large")
        if not torch.allclose(scatter, scatter.T) or bool((scatter.diagonal() < 0).any()):
            raise RefusedError(f"its scatter of {name} features is none")
        statistics[name] = FeatureStatistics(int(count), mean.numpy(), scatter.numpy())
    curve = _ssim_curve(metrics, timestep)
    return EvaluateReply(None, None, Moments(**statistics), curve, _audit(metrics), metrics)


def _audit(metrics: Mapping[str, float | list[float]]) -> Audit | None:
    try:
        return read_audit(metrics)
    except ValueError as error:
        raise RefusedError(f"its memorisation audit is malformed: {error}") from error


def _ssim_curve(metrics: Mapping[str, float | list[float]], timestep: int) -> dict[int, float]:
    """SSIM-rec by timestep; raises RefusedError where it is malformed, impossible or not measured at ``timestep``."""
    timesteps, values = metrics.get("ssim_timesteps", []), metrics.get("ssim", [])
    if not isinstance(timesteps, list) or not isinstance(values, list) or len(timesteps) != len(values):
        raise RefusedError("its SSIM curve is malformed")
    if not all(-1 <= value <= 1 for value in values):
        raise RefusedError(f"its SSIM values {values} are impossible")
    if timesteps:
        _number(metrics, "ssim_window")
        if timestep not in timesteps or not all(float(number).is_integer() for number in timesteps):
            raise RefusedError(f"its SSIM curve is measured at {timesteps}, not at t = {timestep}")
    return {int(number): value for number, value in zip(timesteps, values, strict=True)}


def moment_templates(shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero tensors with the names, shapes and dtypes of Adam's moments of φ."""
    return {
        f"{moment}.{name}": torch.zeros(()) if moment == "step" else torch.zeros_like(tensor)
        for moment in MOMENTS
        for name, tensor in shared.items()
    }


def reason_of_failure(message: Message) -> str:
    """An error reply in one line."""
    if message.error.code == FAILED:
        return "it failed; the reason is in the client's own log"
    reason = " ".join((message.error.reason or "no reason given").split())[:LONGEST_REASON]
    return f"it failed: Flower's error {message.error.code}, {reason}"


def _check_header(message: Message, expected: ReplyHeader) -> None:
    if message.has_error():
        raise RefusedError(reason_of_failure(message))
    try:
        header = replace(ReplyHeader.of(message.content), features=expected.features)
    except ValueError as error:
        raise RefusedError(f"its header is malformed: {error}") from error
    if header != expected:
        raise RefusedError(f"it answers as {header.client!r} for attempt {header.attempt!r}, not for this one")


def _tensors(message: Message, name: str) -> dict[str, Tensor]:
    try:
        return read_tensors(message.content, name)
    except Exception as error:
        # numpy's reader of .npy headers raises what Python's tokenizer and parser raise, besides its own.
        raise RefusedError(f"its arrays {name!r} cannot be read: {error}") from error


def _check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise RefusedError(f"{len(missing)} tensors are missing {missing[:1]} and {len(extra)} unknown {extra[:1]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise RefusedError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"not {expected[name].dtype} {tuple(expected[name].shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise RefusedError(f"tensor {name!r} has values that are not finite")


def _number(metrics: Mapping[str, float | list[float]], name: str) -> float:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise RefusedError(f"its number {name!r} is {value!r}")
    return float(value)

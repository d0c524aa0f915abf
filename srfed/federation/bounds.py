"""What a client may say: the bound of each of its numbers and texts, declared once, and what it is
that is computed.

A number that follows from the configuration and from what a client said of itself at first is not
believed: the reply must repeat it. Every other number has a range.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from srfed.config import RunConfig
from srfed.data.images import SMALLEST
from srfed.diffusion.process import QUARTERS
from srfed.evaluation.metrics.denoising_loss import LARGEST_LOSS
from srfed.evaluation.metrics.memorisation import Memorisation
from srfed.evaluation.metrics.ssim import ssim_window
from srfed.federation.messages import (
    AGAINST_TRIVIAL,
    AUDIT,
    EXAMPLES,
    FIGURES,
    MOST_ROUNDS,
    RESTARTED,
    SETS,
)
from srfed.networks.partition import Partition
from srfed.training.local import phases
from srfed.training.minibatches import MinibatchOrder

LONGEST_TEXT = 100
"""Characters of a client's id, its task's name, and whatever else of it is shown."""
MOST_IMAGES = 10**9
MOST_STEPS = 10**6
MOST_PIXELS = 65_536
"""Of a side of an image."""
MOST_CHANNELS = 16
"""Of an image: the server makes room for features of each of them."""
"""Of a round: the server counts them off one by one, in the decay of its moving average."""
BELIEVED_STEPS = 50
"""Of a round, on the word of a client alone: in 1,600 steps an honest one with Adam came 43 rates
far in each value, which 50 bound.
"""
BELIEVED_RATIO = 10
"""So many times the steps that others take are believed of a client in any case."""
LEAST_LOSS = 1e-9
"""Of held-out images; a ratio to it is a number."""
LARGEST_FEATURE = 1e9
"""Feature networks give numbers of the order of 1; far larger ones would overflow in the score of
everybody.
"""
MOST_ARRAYS = 16
"""Of a record: one for each dtype, and the layout."""
SLACK = 2
"""A record may take this many times the bytes of the one asked for before it is read, so that the
refusal can say what is wrong with it; reading takes time and memory in proportion."""
SLACK_BYTES = 4096


@dataclass(frozen=True)
class Number:
    """What one number of a reply, or each number of a list, may be.

    Attributes:
        low, high: the range, both ends allowed; equal where the server computes the number itself.
        whole: without a fraction.
        count: how many there must be in a list; None: one number, no list.
        gaps: NaN is allowed: nothing was measured.
    """

    low: float
    high: float
    whole: bool = False
    count: int | None = None
    gaps: bool = False

    def allows(self, value: float) -> bool:
        if math.isnan(value):
            return self.gaps
        return self.low <= value <= self.high and (not self.whole or value == int(value))

    def fits(self, value: object) -> bool:
        """Whether a value is one number, or a list of as many as there are to be; whatever they
        are.
        """
        members = [value] if self.count is None else value
        if not isinstance(members, list) or len(members) != (
            1 if self.count is None else self.count
        ):
            return False
        return all(type(member) in (int, float) for member in members)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:g}"
        return f"{'a whole number ' if self.whole else ''}from {self.low:g} to {self.high:g}"


def exactly(value: float) -> Number:
    """A number that the server knows."""
    return Number(value, value)


COMPARISON: Mapping[str, Number] = {
    "alone": Number(LEAST_LOSS, LARGEST_LOSS),
    "together": Number(LEAST_LOSS, LARGEST_LOSS),
    "low": Number(0, LARGEST_LOSS / LEAST_LOSS),
    "high": Number(0, LARGEST_LOSS / LEAST_LOSS),
    "alone_round": Number(1, MOST_ROUNDS, whole=True),
}
"""The figures of a comparison."""
DESCRIPTION: Mapping[str, Number] = {
    "height": Number(SMALLEST, MOST_PIXELS, whole=True),
    "width": Number(SMALLEST, MOST_PIXELS, whole=True),
    "channels": Number(1, MOST_CHANNELS, whole=True),
    "index": Number(-1, MOST_IMAGES, whole=True),
    "images": Number(1, MOST_IMAGES, whole=True),
    "test_images": Number(0, MOST_IMAGES, whole=True),
}
"""A client's numbers of itself that the run does not prescribe."""


def judged_against_trivial(config: RunConfig, round_number: int) -> bool:
    """Whether a round is the one after the first tenth of a run, when every client says whether its
    network has learned anything; a run of fewer than ten rounds is too short for that.
    """
    return 0 < round_number == config.federation.rounds // 10


def validation_in_words(config: RunConfig) -> list[str]:
    """What of the validation images leaves, for their owner to read; nothing where the last round
    is the result.
    """
    if config.federation.result == "last":
        return []
    return [
        f"every {config.federation.validate_every} rounds, and at the end: the mean loss on your "
        f"{config.data.validation_images} validation images"
    ]


def comparison_in_words(config: RunConfig) -> list[str]:
    """What of a comparison leaves, for its owner to read; nothing where nothing is compared."""
    federation = config.federation
    if federation.compare == "none":
        return []
    if not federation.compare_told:
        return ["nothing of what joining is worth to you: that is for your eyes (comparison.json)"]
    return [
        f"what joining is worth to you, on your test images ({len(COMPARISON)} numbers, of losses "
        "alone and together)"
    ]


def validation_numbers(images: Number) -> dict[str, Number]:
    """The numbers of a reply about validation images, of which there are so many; the loss is NaN
    where too few images stand behind it to be told.
    """
    return {"loss": Number(0, LARGEST_LOSS, gaps=True), EXAMPLES: images}


def believed_steps(claimed: Mapping[str, int], sure: Collection[str]) -> dict[str, int]:
    """The steps of a round that decide how far a client may move φ, where they follow from the
    number of its images, which is its own word.

    More than :data:`BELIEVED_STEPS`, and than :data:`BELIEVED_RATIO` times the others' median, are
    not believed; a client without others is. So no claim widens the bound of who makes it without
    end, and none of a few hostile ones narrows that of the others below :data:`BELIEVED_STEPS`.

    Args:
        claimed: steps by client, as its number of images has them.
        sure: the clients whose number the server knows by itself.
    """
    ordered = sorted(claimed.values())
    middle = (len(ordered) - 1) // 2
    believed = dict(claimed)
    for client in claimed.keys() - set(sure) if len(ordered) > 1 else ():
        steps = claimed[client]
        median = ordered[middle + (bisect_left(ordered, steps) <= middle)]
        believed[client] = min(steps, max(BELIEVED_STEPS, BELIEVED_RATIO * median))
    return believed


@dataclass(frozen=True)
class TrainPlan:
    """A client's round, as the configuration and its number of images have it.

    Attributes:
        examples: m_i.
        minibatches: minibatches, of both parts' steps.
        images: images seen in them, with repetition.
        shared_steps: optimizer steps on φ.
        seconds: how long it may have taken.
        judged: whether its loss is compared with that of a predictor that has learned nothing.
        restarts: whether it may have begun anew.
    """

    examples: int
    minibatches: int
    images: int
    shared_steps: int
    seconds: float
    judged: bool = False
    restarts: bool = False

    @classmethod
    def of(
        cls,
        config: RunConfig,
        partition: Partition,
        client: str,
        examples: int,
        before: int,
        round_number: int = 0,
    ) -> "TrainPlan":
        """The plan of a client.

        Args:
            config: the run's configuration.
            partition: of the run's model.
            client: its id.
            examples: m_i.
            before: minibatches behind the attempt that it starts from.
            round_number: the round.

        Raises:
            UserError: the configuration's batch size does not fit so few images.
        """
        training = config.training
        order = MinibatchOrder.of(training, examples, training.batch_size, config.seed, client)
        steps = phases(training, order.steps_per_pass, partition.exclusive, partition.shared)
        minibatches = sum(count for count, _ in steps)
        return cls(
            examples=examples,
            minibatches=minibatches,
            images=order.images_until(before + minibatches) - order.images_until(before),
            shared_steps=sum(count for count, parts in steps if "shared" in parts),
            seconds=config.federation.round_timeout,
            judged=judged_against_trivial(config, round_number),
            restarts=config.federation.on_lost_store == "restart",
        )

    def numbers(self) -> dict[str, Number]:
        """The numbers of its reply."""
        numbers = {
            EXAMPLES: exactly(self.examples),
            "shared_steps": exactly(self.shared_steps),
            # Computed, and not compared: a checkpoint of earlier versions does not say where a pass
            # began.
            "images": Number(1, MOST_IMAGES, whole=True),
            "loss": Number(0, LARGEST_LOSS),
            "loss_by_quarter": Number(0, LARGEST_LOSS, count=QUARTERS, gaps=True),
            "seconds": Number(0, self.seconds),
        }
        if self.judged:
            numbers[AGAINST_TRIVIAL] = Number(0, LARGEST_LOSS / LEAST_LOSS)
        if self.restarts:
            numbers[RESTARTED] = Number(0, 1, whole=True)
        return numbers


@dataclass(frozen=True)
class EvaluatePlan:
    """A client's part of an evaluation, as the configuration and its numbers of images have it.

    Attributes:
        samples: images to generate.
        shape: H, W, C of an image.
        strip: pictures of the reverse process.
        timesteps: where SSIM-rec is measured; empty where it is not.
        judged: test images judged by it.
        window: side of its window, px; 0 where it is not measured.
        audited: whether the memorisation audit may come with it.
        quantile: q, of the audit.
        images, test_images: m_i, and held-out images.
        statistics: whether statistics are asked for, not samples.
        compared: whether figures of what joining is worth come with it.
        seconds: how long it may have taken.
    """

    samples: int
    shape: tuple[int, int, int]
    strip: int
    timesteps: tuple[int, ...]
    judged: int
    window: int
    audited: bool
    quantile: float
    images: int
    test_images: int
    statistics: bool
    compared: bool
    seconds: float

    @classmethod
    def of(
        cls,
        config: RunConfig,
        shape: tuple[int, int, int],
        images: int,
        test_images: int,
        samples: int,
        final: bool,
        *,
        compared: bool,
    ) -> "EvaluatePlan":
        """The plan of a client with so many training and test images, and, where it is
        ``compared``, a model of them alone.
        """
        settings = config.evaluation
        judged = min(settings.ssim_images, test_images)
        timesteps = {settings.ssim_timestep, *(settings.ssim_curve if final else ())}
        return cls(
            samples=samples,
            shape=shape,
            strip=settings.strip_steps if samples else 0,
            timesteps=tuple(sorted(timesteps)) if judged else (),
            judged=judged,
            window=ssim_window(*shape[:2]) if judged else 0,
            audited=bool(final and settings.memorisation_quantile and test_images and samples),
            quantile=settings.memorisation_quantile,
            images=images,
            test_images=test_images,
            statistics=settings.mode == "statistics",
            compared=bool(
                compared
                and test_images
                and config.federation.compare == "alone"
                and config.federation.compare_told
            ),
            seconds=config.federation.round_timeout,
        )

    def numbers(self) -> dict[str, Number]:
        """The numbers of its reply, but for the audit's."""
        numbers = {"seconds": Number(0, self.seconds)}
        if self.timesteps:
            numbers |= {
                "ssim_timesteps": Number(
                    1, self.timesteps[-1], whole=True, count=len(self.timesteps)
                ),
                "ssim": Number(-1, 1, count=len(self.timesteps)),
                "ssim_images": exactly(self.judged),
                "ssim_window": exactly(self.window),
            }
        if self.statistics:
            counts = (self.samples, self.test_images, self.images)
            numbers |= {
                f"{name}_count": exactly(count) for name, count in zip(SETS, counts, strict=True)
            }
        if self.compared:
            numbers |= {f"{FIGURES}{name}": number for name, number in COMPARISON.items()}
        return numbers

    def audit_numbers(self) -> dict[str, Number]:
        """The numbers of the memorisation audit, all of which come or none."""
        known = {
            "quantile": self.quantile,
            "generated": self.samples,
            "held_out": self.test_images,
            "training": self.images,
        }
        shares = {name: Number(0, 1) for name in ("share", "tolerance")}
        numbers = {}
        # Pixels are of [0, 1], and so are root mean square differences of them.
        for space, farthest in (("pixels", 1.0), ("features", LARGEST_FEATURE)):
            for field in fields(Memorisation):
                name = field.name
                number = (
                    exactly(known[name]) if name in known else shares.get(name, Number(0, farthest))
                )
                numbers[f"{AUDIT}{space}_{name}"] = number
        return numbers

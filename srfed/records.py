"""What happened, as plain records: what the server tells and what is written, printed and drawn."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    # It imports torch, and a command says what is wrong with its options before that.
    from srfed.evaluation.metrics.memorisation import Audit

LEAST_COMPARED = 5
"""Samples, and held-out images, below which nothing is said of their colours' difference."""
BEYOND_CHANCE = 4.0
"""Standard errors that chance does not reach."""
LEAST_LEVELS = 4.0
"""Levels of 255 that nobody sees."""
MUCH_SPREAD = 1.5
"""A ratio of spreads that is told."""
Images = NDArray[np.uint8]
Shape = tuple[int, int, int]
"""H, W, C of an image."""


@dataclass(frozen=True)
class Place:
    """Where weights are trained.

    Attributes:
        device: "cpu", or "cuda" with the card's name in brackets.
        precision: of ``resources``.
    """

    device: str
    precision: str

    @property
    def in_words(self) -> str:
        """Both, as a run's first line has them."""
        return f"{self.device}, {self.precision}"


@dataclass(frozen=True)
class TaskInfo:
    """A task as the reports show it: its client's id, its name, and how many images it has."""

    client: str
    task: str
    images: int
    test_images: int


@dataclass(frozen=True)
class Comparison:
    """What joining is worth to one owner, on its held-out images (see
    srfed.evaluation.metrics.denoising_loss).

    Attributes:
        alone, together: mean denoising loss of the model of its own images alone, and of its model
            of the federation.
        low, high: 95% interval of alone over together, from resampling the held-out images.
        alone_round: the round of the model alone: its best by validation images, or the last.
    """

    alone: float
    together: float
    low: float
    high: float
    alone_round: int

    @property
    def ratio(self) -> float:
        """Alone over together: above 1 where joining is better."""
        return self.alone / self.together

    @property
    def verdict(self) -> str:
        """In a word: whether the interval lies on one side of 1."""
        return "pays" if self.low > 1 else "costs" if self.high < 1 else "open"


@dataclass(frozen=True)
class ResultRound:
    """The round whose weights are a run's result under ``federation.result: best``.

    Attributes:
        round: the best by validation images.
        loss: mean validation loss after it.
        last: the same after the last round.
    """

    round: int
    loss: float
    last: float

    def in_words(self, rounds: int) -> str:
        """Which round of so many, and its loss."""
        return (
            f"best round by validation: {self.round} of {rounds}, loss {self.loss:.4f}; last "
            f"{self.last:.4f}"
        )


@dataclass(frozen=True)
class OwnScore:
    """What a metric of one's own says.

    Attributes:
        all: of all owners' images together; None where these are of different shapes.
        by_client: of each owner's.
    """

    all: float | None
    by_client: dict[str, float]


@dataclass(frozen=True)
class Colour:
    """The mean colour of samples and of held-out images of one task, in levels of 0 to 255.

    Attributes:
        samples, real: by channel, over all images.
        samples_spread, real_spread: standard deviation of an image's own mean colour from these,
            root mean square over the channels; 0 of one image.
        samples_count, real_count: images on either side.
    """

    samples: tuple[float, ...]
    real: tuple[float, ...]
    samples_spread: float
    real_spread: float
    samples_count: int
    real_count: int

    @property
    def differences(self) -> str:
        """In words, where the two differ by more than as many real images would; else empty."""
        if min(self.samples_count, self.real_count) < LEAST_COMPARED:
            return ""
        words = []
        shares = 1 / self.samples_count + 1 / self.real_count
        chance = max(LEAST_LEVELS, BEYOND_CHANCE * self.real_spread * math.sqrt(shares))
        own, other = (fmean(side) for side in (self.samples, self.real))
        if max(abs(a - b) for a, b in zip(self.samples, self.real, strict=True)) > chance:
            gap = own - other
            words.append(
                f"{abs(gap):.0f} levels too {'bright' if gap > 0 else 'dark'}"
                if abs(gap) > chance
                else "of another colour"
            )
        ratio = max(self.samples_spread, 1.0) / max(self.real_spread, 1.0)
        freedom = 1 / (2 * self.samples_count - 2) + 1 / (2 * self.real_count - 2)
        limit = max(math.log(MUCH_SPREAD), BEYOND_CHANCE * math.sqrt(freedom))
        if abs(math.log(ratio)) > limit:
            words.append(f"with {ratio:.2g} times the spread")
        return " and ".join(words)

    @property
    def in_words(self) -> str:
        """Mean and spread of the samples, then of the held-out images."""
        sides = ((self.samples, self.samples_spread), (self.real, self.real_spread))
        return ", held-out ".join(
            f"{' '.join(f'{level:.0f}' for level in mean)} ± {spread:.0f}" for mean, spread in sides
        )


@dataclass(frozen=True)
class ValidationRecord:
    """What the owners' validation images say of a round.

    Attributes:
        loss: mean over the clients that told one after this round; None where none did.
        loss_by_client: theirs.
        result: the best round so far.
        refused, missing: as in a round.
    """

    loss: float | None
    loss_by_client: dict[str, float]
    result: ResultRound | None
    refused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


LOST_STORE_WORDS = "its store is lost"
"""How the reason begins for which such a client takes no part."""


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    Attributes:
        round: its number, from 1.
        loss: mean training loss over the accepted clients, weighted as φ is.
        loss_by_client, loss_by_quarter: the same by client, and by quarter of the timestep range.
        accepted: clients whose update is in φ.
        refused: reason by client, for replies that are not.
        missing: reason by client, for those that were away or did not reply in time.
        shortened: what the updates that were too long were multiplied by, by client.
        images: training images seen in the round, as far as owners are believed who say how many
            they have.
        images_per_second: over the round's wall time, all clients together.
        bytes_up, bytes_down: of this round's messages.
        learning_rate: of φ at the clients.
        update_norm: ‖φ^{r+1} - φ^r‖.
        disagreement: see srfed.federation.aggregation.Aggregate.
        seconds: wall time of the round.
        validation: what the validation images say, in rounds in which they are asked.
        lowered: the settings that a resumption has lowered before this round, by name.
        restarted: clients that had lost their store, and have begun with fresh exclusive weights.
    """

    round: int
    loss: float
    loss_by_client: dict[str, float]
    loss_by_quarter: list[float]
    accepted: list[str]
    refused: dict[str, str]
    missing: dict[str, str]
    images: int
    images_per_second: float
    bytes_up: int
    bytes_down: int
    learning_rate: float
    update_norm: float
    disagreement: float
    seconds: float
    shortened: dict[str, float] = field(default_factory=dict)
    validation: ValidationRecord | None = None
    lowered: dict[str, float] = field(default_factory=dict)
    restarted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationRecord:
    """One central evaluation.

    Attributes:
        round: after which it was made.
        final: whether it ends the run.
        score_name: what the Fréchet distance is called.
        score, score_by_client: over all tasks, and for each.
        floor: the same distance of the real training images, of the evaluated tasks; None if not
            known.
        samples, references: images generated and compared with.
        ssim_timestep: t* of the headline.
        ssim: SSIM-rec by timestep, mean over clients.
        ssim_by_client: SSIM-rec@t* by client.
        ssim_window: side of the SSIM window, px.
        ssim_steps: in which images were taken back for it; None: by Algorithm 2.
        audits: the memorisation audit by client; at the end only.
        comparisons: what joining is worth by client, where that is compared and told.
        grids, strips: samples and reverse-process strips by client, uint8 N x H x W x C.
        refused, missing: as in a round.
        bytes_up, bytes_down: of its messages.
        seconds: wall time.
        recognised, recognised_by_client: share of the samples that a nearest-neighbour judge on
            real images gives to their own client, mean over clients and for each; empty where the
            server does not have the images of two.
        recognised_real: the same share of held-out real images of the judged owners.
        own: what metrics of one's own say, by name.
        colours: of samples and held-out images, by client, where the server has both.
        result: whose weights it has judged, at the end under ``federation.result: best``; None
            where they are those of ``round``.
    """

    round: int
    final: bool
    score_name: str
    score: float
    score_by_client: dict[str, float]
    floor: float | None
    samples: int
    references: int
    ssim_timestep: int
    ssim: dict[int, float]
    ssim_by_client: dict[str, float]
    ssim_window: int
    audits: "dict[str, Audit]"
    grids: dict[str, Images] = field(repr=False)
    strips: dict[str, Images] = field(repr=False)
    refused: dict[str, str]
    missing: dict[str, str]
    bytes_up: int
    bytes_down: int
    seconds: float
    ssim_steps: int | None = None
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    recognised: float | None = None
    recognised_by_client: dict[str, float] = field(default_factory=dict)
    recognised_real: float | None = None
    result: ResultRound | None = None
    own: dict[str, OwnScore] = field(default_factory=dict)
    colours: dict[str, Colour] = field(default_factory=dict)


def ssim_name(timestep: int, steps: int | None) -> str:
    """What SSIM-rec is called: values that were made in another number of steps, or by Algorithm 2
    (None), are of another quantity.

    >>> ssim_name(50, None), ssim_name(50, 4)
    ('SSIM-rec@50', 'SSIM-rec@50 (4 steps)')
    """
    if steps is None:
        return f"SSIM-rec@{timestep}"
    return f"SSIM-rec@{timestep} ({steps} {'step' if steps == 1 else 'steps'})"


def ssim_tag(steps: int | None) -> str:
    """What curves and columns of SSIM-rec begin with, as :func:`ssim_name`.

    >>> ssim_tag(None), ssim_tag(4)
    ('ssim_rec', 'ssim_rec_4_steps')
    """
    return "ssim_rec" if steps is None else f"ssim_rec_{steps}_steps"

"""Does a model give back its training images? The audit that an owner runs on images which stay
with the owner.

As in Meehan, Chaudhuri and Dasgupta 2020 (arXiv:2004.05675), held-out images say how close to the
training images an image comes that was not among them. Too many generated images that come closer
are copies. The distances are taken twice, between pixels and between the features of a network;
only numbers leave.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from srfed.data.images import Images
from srfed.errors import UserError
from srfed.evaluation.features.network import FeatureNetwork

Distances = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
FALSE_ALARM = 1e-3
"""Largest probability that fresh real images make one space of an audit fire."""
PAIRS = 12
BLOCK_BYTES = 32 * 2**20
BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Memorisation:
    """How close generated images come to training images in one space, pixels or features.

    Distances are to the nearest image of the other set: root mean square differences of grey levels
    in [0, 1] between pixels, Euclidean between features.

    Attributes:
        generated_to_training: median over the generated images.
        generated_to_held_out: median over the generated images.
        held_out_to_training: median over the held-out images.
        quantile: q, asked for.
        threshold: the q-quantile of the held-out images' distances to the training images (see
            :func:`audit`).
        share: of generated images, those closer to a training image than ``threshold``.
        tolerance: fresh real images in the generated images' place would exceed this share with a
            probability of at most 0.001; 1 where there are too few images to tell.
        generated, held_out, training: numbers of images.
    """

    generated_to_training: float
    generated_to_held_out: float
    held_out_to_training: float
    quantile: float
    threshold: float
    share: float
    tolerance: float
    generated: int
    held_out: int
    training: int

    @property
    def fires(self) -> bool:
        """Whether the share is above what chance allows."""
        return self.share > self.tolerance


@dataclass(frozen=True)
class Audit:
    """The audit of one model by the owner of its training images.

    Attributes:
        pixels, features: the two spaces.
        nearest: (generated, training) indices of suspicious pairs, the most suspicious first, for
            the owner's eyes alone: :meth:`to_numbers` leaves them out, and equality does not look
            at them.
    """

    pixels: Memorisation
    features: Memorisation
    nearest: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    @property
    def fires(self) -> bool:
        """Whether either space does."""
        return self.pixels.fires or self.features.fires

    def to_numbers(self) -> dict[str, float]:
        """All that is meant to leave the owner: every number of both spaces, as "pixels_share"."""
        return {
            f"{space}_{name}": float(value)
            for space in ("pixels", "features")
            for name, value in asdict(getattr(self, space)).items()
        }

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> Self:
        """The audit that :meth:`to_numbers` made them of, without ``nearest``.

        Raises:
            ValueError: a number is missing, too many or not finite.
        """
        expected = {
            f"{space}_{one.name}"
            for space in ("pixels", "features")
            for one in fields(Memorisation)
        }
        if set(numbers) != expected:
            raise ValueError(
                f"these are no audit's numbers: {sorted(expected ^ set(numbers))} missing or "
                "unknown"
            )
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError("an audit's numbers must be finite")
        return cls(_from_numbers(numbers, "pixels"), _from_numbers(numbers, "features"))


def audit(
    generated: Images,
    training: Images,
    held_out: Images,
    network: FeatureNetwork,
    *,
    quantile: float = 0.05,
) -> Audit:
    """Compare generated with training images, by the measure of held-out ones.

    With m held-out images the threshold is their k-th smallest distance to the training images, k =
    max(1, floor(q (m + 1))). Held-out images that are training images too (distance 0) would leave
    no room below it: where there are k or more of them, k is one more than their number.

    Args:
        generated: uint8 N x H x W x C, rounded as every generated image.
        training: uint8 M x H x W x C, all images that the model was trained on.
        held_out: uint8 K x H x W x C of the same distribution, never trained on.
        network: whose features are compared.
        quantile: q in [0, 0.5].

    Raises:
        ValueError: other dtypes, or shapes that differ.
        UserError: a set is empty, q is out of range, every held-out image is a training image, or
            the images mean nothing to the network.
    """
    if not 0 <= quantile <= 0.5:
        raise UserError(f"the memorisation audit's quantile is {quantile}; allowed: 0 to 0.5")
    sets = {"generated": generated, "training": training, "held-out": held_out}
    for name, images in sets.items():
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1:] != training.shape[1:]:
            raise ValueError(
                f"need {name} images in uint8 N x H x W x C, all of one shape, got {images.dtype} "
                f"{images.shape}"
            )
        if not len(images):
            raise UserError(
                f"the memorisation audit needs at least 1 image of each kind; there is no {name} "
                "image"
            )
    device = network.device
    pixels, nearest = _compare(generated, training, held_out, quantile, device)
    features, _ = _compare(
        network(generated), network(training), network(held_out), quantile, device
    )
    return Audit(pixels, features, nearest)


def nearest_distances(
    queries: npt.NDArray[Any],
    references: npt.NDArray[Any],
    *,
    skip_self: bool = False,
    device: torch.device | None = None,
) -> tuple[Distances, Indices]:
    """Distance of each query to its nearest reference, by brute force in blocks of bounded memory.

    Pixels are compared in whole grey levels, where float64 is exact; of equally near ones the first
    is taken.

    Args:
        queries: images, uint8 N x H x W x C; or features, floating point N x D.
        references: of the same kind, M of them.
        skip_self: queries and references are one and the same, and the nearest *other* one is
            wanted.
        device: where the nearest are sought, by float64 too, with NumPy where it is a CPU or None;
            the distances to them are NumPy's in any case.

    Returns:
        Distances, float64 (N,): of images in [0, 1], divided by the root of the number of values
        (the root mean square difference), of features Euclidean. And the nearest references'
        indices, int64 (N,).

    Raises:
        ValueError: shapes or dtypes do not fit, or there is no reference.
    """
    images = queries.dtype == np.uint8
    if queries.ndim != (4 if images else 2) or not (
        images or np.issubdtype(queries.dtype, np.floating)
    ):
        raise ValueError(
            f"need uint8 N x H x W x C or floating-point N x D, got {queries.dtype} {queries.shape}"
        )
    if references.shape[1:] != queries.shape[1:] or (references.dtype == np.uint8) != images:
        raise ValueError(
            f"queries {queries.dtype} {queries.shape} and references {references.dtype} "
            f"{references.shape} differ"
        )
    if skip_self and len(queries) != len(references):
        raise ValueError(f"{len(queries)} queries are not the {len(references)} references")
    if len(references) < 1 + skip_self:
        raise ValueError("there is no reference to be near to")
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    values = queries.shape[1]
    rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (8 * values)))
    on_card = device is not None and device.type != "cpu"
    seek = partial(nearest_on_device, device=device) if on_card else _nearest
    distances = np.empty(len(queries), np.float64)
    indices = np.empty(len(queries), np.int64)
    for first in range(0, len(queries), rows):
        part = slice(first, first + rows)
        block = queries[part].astype(np.float64)
        indices[part] = seek(block, references, rows, first if skip_self else None)
        # |x|² - 2 xᵀy + |y|² loses the digits of small distances; the winner's is taken directly.
        distances[part] = np.linalg.norm(block - references[indices[part]], axis=1)
    return (distances / (255 * math.sqrt(values)) if images else distances), indices


def draw_nearest_pairs(found: Audit, generated: Images, training: Images) -> dict[str, Images]:
    """Suspicious pairs one above the other, as rows of a grid; for the owner's eyes, since one row
    is training images.

    Args:
        found: the audit of just these images.
        generated: uint8 N x H x W x C.
        training: uint8 M x H x W x C.

    Returns:
        "generated" and "training", uint8 P x H x W x C each, P up to 12.
    """
    return {
        "generated": generated[[index for index, _ in found.nearest]],
        "training": training[[index for _, index in found.nearest]],
    }


def merge_audits(audits: Sequence[Audit]) -> dict[str, float]:
    """Several owners' audits in one line.

    Returns:
        "pixels_share" and "features_share" over all generated images; their number "generated";
        "quantile"; and "fires", whether any of the audits does.

    Raises:
        ValueError: there is no audit, or the quantiles differ.
    """
    quantiles = {one.pixels.quantile for one in audits}
    if len(quantiles) != 1:
        raise ValueError(f"need audits of one quantile, got {sorted(quantiles)}")
    weights = [one.pixels.generated for one in audits]
    return {
        "pixels_share": float(np.average([one.pixels.share for one in audits], weights=weights)),
        "features_share": float(
            np.average([one.features.share for one in audits], weights=weights)
        ),
        "generated": sum(weights),
        "quantile": quantiles.pop(),
        "fires": any(one.fires for one in audits),
    }


def chance_tolerance(generated: int, held_out: int, rank: int) -> float:
    """The share of n fresh images below the ``rank``-th smallest of m that chance exceeds once in
    1,000.

    Where all n + m are exchangeable, the number of fresh ones below has the beta-binomial
    distribution of n draws with a = rank and b = m - rank + 1, whatever the distances' own
    distribution; ties only make it less.
    """
    other = held_out - rank + 1
    above, below = 1.0, 0
    while below < generated:
        above -= math.exp(
            math.lgamma(generated + 1)
            - math.lgamma(below + 1)
            - math.lgamma(generated - below + 1)
            + _log_beta(below + rank, generated - below + other)
            - _log_beta(rank, other)
        )
        if above <= FALSE_ALARM:
            break
        below += 1
    return below / generated


def _log_beta(first: int, second: int) -> float:
    return math.lgamma(first) + math.lgamma(second) - math.lgamma(first + second)


def _compare(
    generated: npt.NDArray[Any],
    training: npt.NDArray[Any],
    held_out: npt.NDArray[Any],
    quantile: float,
    device: torch.device,
) -> tuple[Memorisation, tuple[tuple[int, int], ...]]:
    to_training, neighbours = nearest_distances(generated, training, device=device)
    to_held_out, _ = nearest_distances(generated, held_out, device=device)
    usual = np.sort(nearest_distances(held_out, training, device=device)[0])
    if not usual[-1]:
        raise UserError(
            f"all {len(held_out)} held-out images are training images too, so they cannot say how "
            "close others come; hold out images that the model is not trained on"
        )
    # 0.29 * 100 is 28.999999999999996.
    rank = max(1, math.floor(quantile * (len(usual) + 1) + 1e-9), 1 + int((usual == 0).sum()))
    threshold = usual[rank - 1]
    # An empty or blurred image is near to everything; a copy is nearer to its original than to all
    # others.
    suspicion = to_training / np.maximum(to_held_out, np.finfo(np.float64).tiny)
    order = np.argsort(suspicion, kind="stable")[:PAIRS]
    return (
        Memorisation(
            generated_to_training=float(np.median(to_training)),
            generated_to_held_out=float(np.median(to_held_out)),
            held_out_to_training=float(np.median(usual)),
            quantile=quantile,
            threshold=float(threshold),
            share=float((to_training < threshold).mean()),
            tolerance=chance_tolerance(len(generated), len(held_out), rank),
            generated=len(generated),
            held_out=len(held_out),
            training=len(training),
        ),
        tuple((int(index), int(neighbours[index])) for index in order),
    )


def _nearest(block: Distances, references: npt.NDArray[Any], rows: int, own: int | None) -> Indices:
    """Index of each row's nearest reference; ``own`` is the first row's own index, which does not
    count.
    """
    best = np.full(len(block), np.inf)
    indices = np.zeros(len(block), np.int64)
    everyone = np.arange(len(block))
    for first in range(0, len(references), rows):
        others = references[first : first + rows].astype(np.float64)
        # |x|² is the same for every reference.
        squared = block @ others.T
        squared *= -2
        squared += (others * others).sum(axis=1)
        if own is not None:
            columns = own + everyone - first
            here = (columns >= 0) & (columns < len(others))
            squared[everyone[here], columns[here]] = np.inf
        nearest = squared.argmin(axis=1)
        found = squared[everyone, nearest]
        better = found < best
        best[better], indices[better] = found[better], nearest[better] + first
    return indices


def nearest_on_device(
    block: Distances,
    references: npt.NDArray[Any],
    rows: int,
    own: int | None,
    device: torch.device | None,
) -> Indices:
    """As :func:`_nearest`, by PyTorch on a device: between images the same indices, since sums of
    whole grey levels are exact; between features the same but where two are equally near to
    float64's rounding.
    """
    there = torch.from_numpy(block).to(device)
    best = torch.full((len(block),), math.inf, dtype=torch.float64, device=device)
    indices = torch.zeros(len(block), dtype=torch.int64, device=device)
    everyone = torch.arange(len(block), device=device)
    for first in range(0, len(references), rows):
        others = torch.from_numpy(references[first : first + rows]).to(device).double()
        squared = (there @ others.T).mul_(-2).add_(others.square().sum(dim=1))
        if own is not None:
            columns = own + everyone - first
            here = (columns >= 0) & (columns < len(others))
            squared[everyone[here], columns[here]] = math.inf
        # Of equally near ones torch's argmin may name any.
        found = squared.amin(dim=1)
        places = torch.arange(len(others), device=device)
        nearest = torch.where(squared == found[:, None], places, len(others)).amin(dim=1)
        better = found < best
        best = torch.where(better, found, best)
        indices = torch.where(better, nearest + first, indices)
    return indices.cpu().numpy()


def _from_numbers(numbers: Mapping[str, float], space: str) -> Memorisation:
    own: dict[str, Any] = {one.name: numbers[f"{space}_{one.name}"] for one in fields(Memorisation)}
    return Memorisation(
        **{**own, **{name: int(own[name]) for name in ("generated", "held_out", "training")}}
    )

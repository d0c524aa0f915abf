"""What every feature network is: images in, features out, under one name, weights file and resize
rule.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from srfed.config import ResourcesConfig
from srfed.device import arithmetic


class FeatureNetwork(ABC):
    """A frozen network whose features a Fréchet distance compares.

    Attributes:
        name: "embedded" or "inception".
        score_name: what a Fréchet distance on these features is called. Only the official
            2015-12-05 Inception earns "fid"; every other network and every other weights file has a
            name of its own.
        dimension: features of one image; of one *channel* of it where ``per_channel``.
        per_channel: whether an image of C channels has C * ``dimension`` features.
        sha256: hexadecimal digest of the weights file.
        highest: no feature is above it, and none below 0.
        resize_rule: how an image reaches the network's input size; part of the score.
        batch_size: images that go through the network at once.
        device: where it computes.
    """

    name: str
    score_name: str
    dimension: int
    per_channel: bool
    sha256: str
    highest: float = 1e9
    """Of a network of which no more is known: far larger ones overflow in everybody's score."""
    resize_rule: str
    batch_size: int
    device: torch.device

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Features of images.

        Args:
            images: uint8, N x H x W x C; N may be 0. Generated images must have been rounded to
                uint8: truncation moves them by half a grey level, and the score with them.

        Returns:
            float64, N x D with D = ``dimension``, or C * ``dimension`` where ``per_channel``.

        Raises:
            ValueError: another dtype or number of dimensions.
            UserError: images of so many channels mean nothing to this network.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"need uint8 images N x H x W x C, got {images.dtype} {images.shape}")
        self._check_channels(images.shape[3])
        features = np.empty((len(images), self.dimension_of(images.shape[3])), dtype=np.float64)
        # Whatever a run trains in, scores are of one arithmetic.
        with torch.inference_mode(), arithmetic(ResourcesConfig(), self.device):
            for start in range(0, len(images), self.batch_size):
                batch = torch.from_numpy(images[start : start + self.batch_size].copy())
                batch = batch.to(self.device).permute(0, 3, 1, 2).contiguous()
                features[start : start + self.batch_size] = self._features(batch).cpu().numpy()
        return features

    def dimension_of(self, channels: int) -> int:
        """D for images of so many channels."""
        return self.dimension * (channels if self.per_channel else 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :attr:`identity`: equal where features are comparable."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for two sets of features to be comparable; stored with every
        statistics file.
        """
        return {
            "network": self.name,
            "score_name": self.score_name,
            "sha256": self.sha256,
            "resize_rule": self.resize_rule,
        }

    @abstractmethod
    def _check_channels(self, channels: int) -> None:
        """Raise UserError where images of so many channels mean nothing to the network."""

    @abstractmethod
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 N x C x H x W on ``device`` -> float N x D."""


def one_line(error: Any, limit: int = 200) -> str:
    """The beginning of an error's text, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

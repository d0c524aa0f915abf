"""The feature network that ships with the package: small, for grey digits and garments from 8 to 32
pixels.

A classifier of the 20 classes of MNIST and Fashion-MNIST, trained by
``simulations/train_embedded_network.py`` on images of every resolution from 8 to 28 pixels; its
features are the 64 pooled activations before the last layer. See ``docs/embedded_network.md``.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from srfed.errors import UserError
from srfed.evaluation.features.network import FeatureNetwork, one_line

EMBEDDED_FILE = Path(__file__).with_name("embedded.safetensors")
EMBEDDED_SHA256 = "38d74968751fc74943a2cbbf8f1e63b891e6f1cee1243be2187aa66e5258ebe2"
INPUT_SIZE = 28
CLASSES = 20
"""Of MNIST (0 to 9), then of Fashion-MNIST (10 to 19)."""


class EmbeddedNetwork(nn.Module):
    """Five convolutions, GroupNorm, ReLU, global average pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_layer(1, 32, kernel_size=5, stride=2),
            *_layer(32, 48, kernel_size=3, stride=1),
            *_layer(48, 64, kernel_size=3, stride=2),
            *_layer(64, 64, kernel_size=3, stride=1),
            *_layer(64, 64, kernel_size=3, stride=1),
        )
        self.head = nn.Linear(64, CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """float N x 1 x 28 x 28 in [-1, 1] -> float N x 64, never negative."""
        activations: torch.Tensor = self.convolutions(images)
        return activations.mean(dim=(2, 3))

    @property
    def highest(self) -> float:
        """What no feature exceeds, whatever the image: the group that GroupNorm has normalised has
        a mean square of 1, so a channel's mean of its positive values is at most the root of the
        group's channels, times its weight.
        """
        norm = next(m for m in reversed(self.convolutions) if isinstance(m, nn.GroupNorm))
        channels = norm.num_channels // norm.num_groups
        bound = norm.weight.abs() * channels**0.5 + norm.bias.clamp(min=0)
        return float(bound.max())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float N x 1 x 28 x 28 in [-1, 1] -> float N x 20, the logits."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def _layer(inputs: int, outputs: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(
        inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False
    )
    return convolution, nn.GroupNorm(8, outputs), nn.ReLU()


def network_input(images: torch.Tensor) -> torch.Tensor:
    """Bring images to the network's input: resized, scaled, each channel a grey image of its own.

    Args:
        images: uint8, N x C x H x W.

    Returns:
        float32, (N * C) x 1 x 28 x 28 in [-1, 1]; the C channels of an image are neighbours.
    """
    grey = images.flatten(0, 1).unsqueeze(1).float()
    if grey.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
        grey = F.interpolate(
            grey,
            size=(INPUT_SIZE, INPUT_SIZE),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
    return grey / 127.5 - 1


def read_embedded_network(path: Path) -> tuple[EmbeddedNetwork, str]:
    """Read a weights file of this network.

    Returns:
        The network in evaluation mode, and the file's SHA-256.

    Raises:
        UserError: the file cannot be read or does not hold exactly this network's tensors.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    network = EmbeddedNetwork()
    try:
        network.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the embedded network: {one_line(error)}") from error
    return network.eval().requires_grad_(False), hashlib.sha256(content).hexdigest()


class EmbeddedFeatures(FeatureNetwork):
    """Features of the embedded network; 64 for each channel, so that colour counts.

    Raises:
        UserError: the shipped weights file is missing or not the one this version was released
            with.
    """

    name = "embedded"
    score_name = "fd_embedded"
    dimension = 64
    per_channel = True
    resize_rule = "each channel alone, bilinear with antialiasing to 28x28"
    batch_size = 500

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        network, self.sha256 = read_embedded_network(EMBEDDED_FILE)
        if self.sha256 != EMBEDDED_SHA256:
            raise UserError(
                f"{EMBEDDED_FILE} has SHA-256 {self.sha256}, not {EMBEDDED_SHA256}; install the "
                "package again"
            )
        self.highest = network.highest
        self._network = network.to(self.device)

    def _check_channels(self, channels: int) -> None:
        """Any number will do, as the network sees one at a time."""

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self._network.features(network_input(images)).reshape(len(images), -1)

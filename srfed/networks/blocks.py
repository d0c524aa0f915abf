"""The UNet's parts: timestep embedding, residual block, self-attention, down- and upsampling."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_BLOCK = 64
"""Keys that a fused kernel for attention takes at once, at least (PyTorch's CUDA sources)."""


def sinusoidal_embedding(timesteps: Tensor, dimension: int) -> Tensor:
    """Embed timesteps as sines and cosines of geometrically spaced frequencies (Vaswani et al.,
    2017).

    Args:
        timesteps: (N,), any numeric dtype.
        dimension: an even number of features.

    Returns:
        (N, dimension) float32; cosines first.
    """
    half = dimension // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron over the sinusoidal embedding: (N,) -> (N, dimension)."""

    def __init__(self, base_channels: int, dimension: int) -> None:
        super().__init__()
        self.base_channels = base_channels
        self.expand = nn.Linear(base_channels, dimension)
        self.mix = nn.Linear(dimension, dimension)

    def forward(self, timesteps: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(timesteps, self.base_channels)
        return self.mix(F.silu(self.expand(embedding)))


class FiLM(nn.Module):
    """A task's own scale and shift of each channel, added to the timestep's (Perez et al., 2018);
    zero at first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, condition: Tensor) -> Tensor:
        return condition + self.value


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the timestep scales and shifts the second normalisation,
    and so does the task, where the block has a ``film``.

    The last convolution starts at zero, so that a fresh block is its own shortcut (Dhariwal &
    Nichol, 2021, where this conditioning is called adaptive group normalisation).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dimension: int,
        groups: int,
        dropout: float,
        film: bool = False,
    ) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding_dimension, 2 * out_channels)
        self.film = FiLM(out_channels) if film else None
        self.norm_out = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        condition = self.condition(F.silu(embedding))
        if self.film is not None:
            condition = self.film(condition)
        scale, shift = condition[:, :, None, None].chunk(2, dim=1)
        hidden = self.norm_out(hidden) * (1 + scale) + shift
        return self.shortcut(x) + self.conv_out(self.dropout(F.silu(hidden)))


def repeatable_attention(tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """The context in which attention over so many tokens repeats itself bit by bit, where
    the run asks for that: a GPU's fused kernels share a gradient's sums out over the
    keys as soon as these are more than one block of theirs, and add them up in any order.
    """
    if device.type == "cuda" and torch.backends.cudnn.deterministic and tokens > ATTENTION_BLOCK:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, added to its input; its last layer starts at
    zero.
    """

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = nn.GroupNorm(groups, channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project.weight)
        assert self.project.bias is not None
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        query, key, value = (
            self.query_key_value(self.norm(x))
            .reshape(count, 3, self.heads, channels // self.heads, height * width)
            .transpose(-1, -2)
            # CUDA's fused kernels take no other layout. A copy even where it counts as contiguous:
            # at a single pixel the strides left over make one of them fail.
            .clone(memory_format=torch.contiguous_format)
            .unbind(dim=1)
        )
        with repeatable_attention(height * width, x.device):
            attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.project(attended.transpose(-1, -2).reshape(count, channels, height, width))


class Downsample(nn.Module):
    """Strided convolution to half the size, rounded up: 28, 14, 7, 4."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour resize to exactly the size of the matching down stage, then a
    convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.conv(F.interpolate(x, size=(height, width), mode="nearest"))

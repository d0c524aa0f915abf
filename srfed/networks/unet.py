"""The denoising UNet: four stages whose borders are the borders of the partition.

Stage k works at 1/2^k of the image's size (rounded up) with ``channels[k]`` channels. Everything
that belongs to stage k lies in ``down.k`` or ``up.k``: its residual blocks, its attention, and the
convolutions that lead to and from stage k + 1. Skip connections run from ``down.k`` to ``up.k``
only, so that no activation crosses from an exclusive to a shared stage but through those
convolutions.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srfed.networks.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    Upsample,
)
from srfed.networks.network import Network


class DownStage(nn.Module):
    """Residual blocks of one resolution; returns what the next stage takes and the skips."""

    def __init__(
        self,
        channels: int,
        next_channels: int | None,
        blocks: int,
        embedding_dimension: int,
        attention_head_channels: int | None,
        groups: int,
        dropout: float,
        film: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, channels, embedding_dimension, groups, dropout, film)
            for _ in range(blocks)
        )
        self.attentions = _attentions(blocks, channels, attention_head_channels, groups)
        self.downsample = None if next_channels is None else Downsample(channels, next_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x, embedding))
            skips.append(x)
        return (x if self.downsample is None else self.downsample(x)), skips


class UpStage(nn.Module):
    """Residual blocks of one resolution, each fed with the skip of its mirror image in the down
    stage.
    """

    def __init__(
        self,
        channels: int,
        next_channels: int | None,
        blocks: int,
        embedding_dimension: int,
        attention_head_channels: int | None,
        groups: int,
        dropout: float,
        film: bool,
    ) -> None:
        super().__init__()
        self.upsample = None if next_channels is None else Upsample(next_channels, channels)
        self.blocks = nn.ModuleList(
            ResidualBlock(2 * channels, channels, embedding_dimension, groups, dropout, film)
            for _ in range(blocks)
        )
        self.attentions = _attentions(blocks, channels, attention_head_channels, groups)

    def forward(self, x: Tensor, skips: Sequence[Tensor], embedding: Tensor) -> Tensor:
        if self.upsample is not None:
            x = self.upsample(x, skips[-1].shape[-2], skips[-1].shape[-1])
        for block, attention, skip in zip(
            self.blocks, self.attentions, reversed(skips), strict=True
        ):
            x = attention(block(torch.cat([x, skip], dim=1), embedding))
        return x


class Bottleneck(nn.Module):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(
        self,
        channels: int,
        embedding_dimension: int,
        head_channels: int,
        groups: int,
        dropout: float,
        film: bool,
    ) -> None:
        super().__init__()
        self.first = ResidualBlock(channels, channels, embedding_dimension, groups, dropout, film)
        self.attention = SelfAttention(channels, head_channels, groups)
        self.second = ResidualBlock(channels, channels, embedding_dimension, groups, dropout, film)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x, embedding)), embedding)


class Head(nn.Module):
    """GroupNorm, SiLU and the convolution back to the image's channels."""

    def __init__(self, channels: int, image_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class TaskVector(nn.Module):
    """One learned vector, added to every timestep's embedding; it starts at zero."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(dimension))

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding + self.value


OWNED: Mapping[str, str] = {"vector": "task_vector", "film": "*.film"}
"""Name patterns of what ``owned`` adds."""


class UNet(Network):
    """The prediction of (x_t, t) for images of any size from 5 px and any number of channels.

    Modules, in the order of the forward pass: ``stem``, ``timestep``, ``task_table`` or
    ``task_vector`` if any, ``down.0`` to ``down.3``, ``bottleneck``, ``up.3`` to ``up.0``,
    ``head``. ``srfed.networks.partition`` divides them by name.

    Args:
        image_channels: channels of the images.
        channels: channels of the stages, outermost first.
        blocks_per_stage: residual blocks in each down stage, and in each up stage.
        attention_stages: stages with self-attention after every block.
        attention_head_channels: channels of one attention head.
        groups: groups of each GroupNorm; divides every entry of ``channels``.
        dropout: rate inside the residual blocks.
        task_embedding: "shared" adds a learned vector for each of ``tasks`` tasks to the timestep's
            embedding (class conditioning as in Nichol & Dhariwal, 2021), and the forward pass then
            needs the tasks.
        owned: what is the task's own beside the partition's stages: "vector" is added to the
            timestep's embedding, "film" to each residual block's scale and shift.
        tasks: number of tasks of a shared embedding.
        zero_head: start the last convolution at zero, so that a fresh network predicts zeros.
    """

    def __init__(
        self,
        image_channels: int,
        channels: Sequence[int],
        blocks_per_stage: int,
        attention_stages: Sequence[int],
        attention_head_channels: int,
        groups: int,
        dropout: float = 0.0,
        task_embedding: Literal["none", "shared"] = "none",
        owned: Sequence[Literal["vector", "film"]] = (),
        tasks: int = 0,
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        self.image_channels = image_channels
        embedding_dimension = 4 * channels[0]

        film = "film" in owned

        def stage_arguments(
            stage: int,
        ) -> tuple[int, int | None, int, int, int | None, int, float, bool]:
            next_channels = channels[stage + 1] if stage + 1 < len(channels) else None
            head_channels = attention_head_channels if stage in attention_stages else None
            return (
                channels[stage],
                next_channels,
                blocks_per_stage,
                embedding_dimension,
                head_channels,
                groups,
                dropout,
                film,
            )

        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.timestep = TimestepEmbedding(channels[0], embedding_dimension)
        self.down = nn.ModuleList(
            DownStage(*stage_arguments(stage)) for stage in range(len(channels))
        )
        self.bottleneck = Bottleneck(
            channels[-1], embedding_dimension, attention_head_channels, groups, dropout, film
        )
        self.up = nn.ModuleList(UpStage(*stage_arguments(stage)) for stage in range(len(channels)))
        self.head = Head(channels[0], image_channels, groups)
        self.task_table = (
            nn.Embedding(tasks, embedding_dimension) if task_embedding == "shared" else None
        )
        self.tasks = tasks if task_embedding == "shared" else 0
        self.task_vector = TaskVector(embedding_dimension) if "vector" in owned else None
        self.owned = tuple(OWNED[part] for part in owned)
        if zero_head:
            for parameter in self.head.conv.parameters():
                nn.init.zeros_(parameter)

    def shells(self) -> list[tuple[str, ...]]:
        """Stem and head, then each stage's two sides; bottleneck and timestep embedding are the
        core.
        """
        stages = [(f"down.{stage}", f"up.{stage}") for stage in range(len(self.down))]
        return [("stem", "head"), *stages]

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        """What the run's objective asks for, at x_t: the noise in it, for one.

        Args:
            x: N x C x H x W, float.
            time: (N,), in units of timesteps.
            tasks: (N,) int64, positions of the images' tasks; for a network with a shared task
                embedding only.

        Returns:
            N x C x H x W, the dtype of ``x`` outside autocast.

        Raises:
            ValueError: the shapes do not fit.
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels or min(x.shape[-2:]) < 5:
            raise ValueError(
                f"the UNet takes N x {self.image_channels} x H x W images of at least 5 px, not "
                f"{tuple(x.shape)}"
            )
        if time.shape != x.shape[:1]:
            raise ValueError(f"{x.shape[0]} images need as many times, not {tuple(time.shape)}")
        if (tasks is None) != (self.task_table is None):
            raise ValueError(
                "the images' tasks are for a UNet with a shared task embedding, which cannot do "
                "without"
            )
        embedding = self.timestep(time)
        if self.task_table is not None:
            embedding = embedding + self.task_table(tasks)
        if self.task_vector is not None:
            embedding = self.task_vector(embedding)
        hidden = self.stem(x)
        skips = []
        for down in self.down:
            hidden, stage_skips = down(hidden, embedding)
            skips.append(stage_skips)
        hidden = self.bottleneck(hidden, embedding)
        for up in reversed(self.up):
            hidden = up(hidden, skips.pop(), embedding)
        return self.head(hidden)


def _attentions(count: int, channels: int, head_channels: int | None, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Identity() if head_channels is None else SelfAttention(channels, head_channels, groups)
        for _ in range(count)
    )

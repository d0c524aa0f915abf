"""A network of one's own, trained in a federation: an MLP-mixer that srfed has never heard of.

    python examples/own_network.py [RUN_FOLDER]

srfed asks three things of it: a constructor that takes ``image_channels`` and what
``model.options`` has, the shells around its core, and a forward pass. The same class trains from a
configuration file, as ``model.network: "own_network:Mixer"``, wherever this file can be imported.
"""

import sys
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

import srfed
from srfed.networks.blocks import TimestepEmbedding
from srfed.networks.network import Network
from srfed.records import EvaluationRecord, RoundRecord


class Mix(nn.Module):
    """Tolstikhin et al. (2021): a perceptron over the patches, then one over the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm_patches, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_patches = nn.Sequential(
            nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches)
        )
        self.over_channels = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.condition = nn.Linear(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = x + self.condition(F.silu(embedding))[:, None]
        x = x + self.over_patches(self.norm_patches(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.over_channels(self.norm_channels(x))
        return x


class Mixer(Network):
    """An MLP-mixer over patches of a square image.

    Args:
        image_channels: channels of the images.
        side: height and width of the images, px.
        patch: of one patch; divides ``side``.
        width: channels inside.
        depth: blocks; the outermost two of them, first and last, are the second shell.
    """

    def __init__(
        self, image_channels: int, side: int = 8, patch: int = 2, width: int = 64, depth: int = 4
    ) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"patch {patch} does not divide side {side}")
        self.patch = patch
        values, patches = image_channels * patch**2, (side // patch) ** 2
        self.read = nn.Linear(values, width)
        self.timestep = TimestepEmbedding(width, width)
        self.blocks = nn.ModuleList(Mix(patches, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, values)

    def shells(self) -> Sequence[Sequence[str]]:
        last = len(self.blocks) - 1
        return [("read", "norm", "write"), ("blocks.0", f"blocks.{last}")]

    def forward(self, x: Tensor, time: Tensor, tasks: Tensor | None = None) -> Tensor:
        embedding = self.timestep(time)
        hidden = self.read(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        patches = self.write(self.norm(hidden)).transpose(1, 2)
        image: Tensor = F.fold(patches, tuple(x.shape[-2:]), self.patch, stride=self.patch)
        return image


class Print(srfed.Observer):
    """Says how each round went."""

    def on_round(self, record: RoundRecord) -> None:
        print(f"round {record.round}: loss {record.loss:.4f}")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        print(f"round {record.round}: {record.score_name} {record.score:.3f}")


def main() -> None:
    settings = ["federation.rounds=10", "model.exclusive_stages=1"]
    settings += ["evaluation.every=0", "evaluation.samples=100", "evaluation.ssim_images=0"]
    config = srfed.load_config(None, settings)
    run_dir = sys.argv[1] if len(sys.argv) > 1 else None
    run = srfed.train(config, network=Mixer, observers=[Print()], run_dir=run_dir)
    print(f"{run.path}: {run.sample('digit-3', 4).shape} uint8")


if __name__ == "__main__":
    main()

"""Train the small feature network that ships with srfed, or check the shipped one.

    python simulations/train_embedded_network.py --data-dir DIR --out FILE
    python simulations/train_embedded_network.py --data-dir DIR --check

FILE is srfed/evaluation/features/embedded.safetensors for the one that ships.
DIR holds MNIST/raw/*.gz and FashionMNIST/raw/*.gz, as torchvision keeps them. Training takes ten
to fifteen minutes on one core. Equal seed, machine type and thread count give an equal file.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save

from srfed.commands.options import Parser
from srfed.config import DataConfig, DatasetName
from srfed.data import Task, load_tasks
from srfed.errors import UserError
from srfed.evaluation.features.embedded import (
    EMBEDDED_FILE,
    INPUT_SIZE,
    EmbeddedNetwork,
    network_input,
    read_embedded_network,
)
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.metrics.frechet import frechet_distance
from srfed.files import write_bytes
from srfed.randomness import derive_generator, derive_seed

SOURCES: tuple[DatasetName, ...] = ("mnist", "fashion_mnist")
BATCH_SIZE = 128
GROUPS = 4
"""Parts of a minibatch that are reduced to one resolution each."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with MNIST/raw and FashionMNIST/raw"
    )
    parser.add_argument(
        "--out", type=Path, default=EMBEDDED_FILE, help="weights file to write (or to check)"
    )
    parser.add_argument("--check", action="store_true", help="only measure the weights file")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--learning-rate", type=float, default=4e-3, help="the largest, a fifth into the training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="the thread count is part of the result's bits"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    try:
        if not arguments.check:
            train(
                arguments.data_dir,
                arguments.out,
                arguments.epochs,
                arguments.learning_rate,
                arguments.seed,
            )
        check(arguments.data_dir, arguments.out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def train(data_dir: Path, out: Path, epochs: int, learning_rate: float, seed: int) -> None:
    """Cross-entropy over the 20 classes, AdamW, one cycle of the learning rate."""
    images, labels = as_tensors([task.train for tasks in load_sources(data_dir) for task in tasks])
    torch.manual_seed(derive_seed(seed, "initialisation"))
    network = EmbeddedNetwork().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.2
    )
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=derive_generator(seed, "batch order", epoch))
        total = 0.0
        for step in range(steps):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            generator = derive_generator(seed, "augmentation", epoch, step)
            batch = augment(network_input(images[chosen]), labels[chosen] < 10, generator)
            logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        elapsed = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}  loss {total / steps:.4f}  {elapsed:.0f} s", flush=True)
    write_bytes(
        out, save({name: value.contiguous() for name, value in network.state_dict().items()})
    )


def augment(
    images: torch.Tensor, is_digit: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Random scale, aspect, rotation, shift and resolution; float N x 1 x 28 x 28 in [-1, 1] to the
    same.

    MNIST's digits leave a margin of four pixels, other data's digits fill the frame: so digits are
    enlarged by up to 1.5, while garments, which fill it already, change by a tenth.
    """
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    zoom = torch.where(is_digit, uniform(0.9, 1.5), uniform(0.9, 1.1))
    aspect = torch.where(is_digit, uniform(0.8, 1.25), uniform(0.95, 1.05)).sqrt()
    angle = torch.where(is_digit, uniform(-0.2, 0.2), uniform(-0.1, 0.1))
    shear = torch.where(is_digit, uniform(-0.2, 0.2), torch.zeros(count))
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    transform = torch.stack(
        [
            torch.stack(
                [angle.cos() / (zoom * aspect), shear - angle.sin() / zoom, shift_x], dim=1
            ),
            torch.stack([angle.sin() / zoom, angle.cos() * aspect / zoom, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    # Outside of the image is black, which is -1: shifted so that the padding's 0 means black.
    moved = (
        F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        - 1
    )
    sizes = torch.randint(8, INPUT_SIZE + 1, (GROUPS - 1,), generator=generator).tolist()
    # The last part keeps its resolution.
    parts = zip(moved.chunk(GROUPS), [*sizes, INPUT_SIZE], strict=True)
    return torch.cat([reduce(part, size) for part, size in parts])


def reduce(images: torch.Tensor, size: int, final_size: int = INPUT_SIZE) -> torch.Tensor:
    """Images at a lower resolution, brought back to the final one as :func:`network_input`
    would.
    """
    for target in (size, final_size):
        images = F.interpolate(images, size=(target, target), mode="bilinear", antialias=True)
    return images


def check(data_dir: Path, path: Path) -> None:
    """Print what ``docs/embedded_network.md`` reports about a weights file."""
    network, digest = read_embedded_network(path)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{path}: {path.stat().st_size:,} bytes, {parameters:,} parameters")
    print(f"SHA-256 {digest}")
    for index, tasks in enumerate(load_sources(data_dir)):
        images, labels = as_tensors([task.test for task in tasks])
        for size in (28, 16, 8):
            small = F.interpolate(
                images.float(), size=(size, size), mode="bilinear", antialias=True
            )
            accuracy = measure(network, small.round().byte(), labels + 10 * index)
            print(
                f"accuracy of 20 classes, {SOURCES[index]} test split at {size} px: {accuracy:.4f}"
            )
    tasks = load_tasks(DataConfig(dataset="digits"), 10)
    images, labels = as_tensors([np.concatenate([task.train, task.test]) for task in tasks])
    accuracy = measure(network, images, labels, classes=10)
    print(f"accuracy of MNIST's 10 classes, digits (8 px, not trained on): {accuracy:.4f}")
    for name, distance in sensitivity(network, images, labels).items():
        print(f"fd_embedded, half of digits against {name}: {distance:.3f}")


def sensitivity(
    network: EmbeddedNetwork, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Fréchet distances of one random half of the images to the other, as it is and spoiled."""
    generator = derive_generator(0, "sensitivity")
    first, second = torch.randperm(len(images), generator=generator).chunk(2)
    others = images[second].float()

    def noisy(deviation: float) -> torch.Tensor:
        return others + deviation * torch.randn(others.shape, generator=generator)

    sets = {
        "the other half": others,
        **{
            f"it with noise of {levels} grey levels": noisy(levels) for levels in (25, 60, 100, 150)
        },
        "it moved by one pixel": others.roll(1, dims=3),
        "it reduced to 4 px and back": reduce(others, 4, 8),
        "it without the digit 3": others[labels[second] != 3],
        "its digits 0 to 4": others[labels[second] < 5],
    }
    reference = statistics(network, images[first])
    return {
        name: frechet_distance(reference, statistics(network, spoiled.round().clamp(0, 255).byte()))
        for name, spoiled in sets.items()
    }


@torch.inference_mode()
def statistics(network: EmbeddedNetwork, images: torch.Tensor) -> FeatureStatistics:
    """Feature statistics of images, uint8 N x 1 x H x W."""
    return FeatureStatistics.of(network.features(network_input(images)).numpy())


@torch.inference_mode()
def measure(
    network: EmbeddedNetwork, images: torch.Tensor, labels: torch.Tensor, classes: int = 20
) -> float:
    """Share of images (uint8 N x 1 x H x W) whose label has the largest of the first ``classes``
    logits.
    """
    guesses = [
        network(network_input(part))[:, :classes].argmax(dim=1) for part in torch.split(images, 500)
    ]
    return (torch.cat(guesses) == labels).double().mean().item()


def load_sources(data_dir: Path) -> list[list[Task]]:
    """MNIST's ten tasks, then Fashion-MNIST's, with all their images."""
    return [load_tasks(DataConfig(dataset=source, dir=str(data_dir)), 10) for source in SOURCES]


def as_tensors(parts: Sequence[npt.NDArray[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of each class, N x H x W x 1, as one tensor (uint8 N x 1 x H x W) and its labels
    (int64 N).
    """
    images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
    labels = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return images, labels


if __name__ == "__main__":
    main()

"""Images a second of a client's local steps, captured and one by one, beside a plain loop over
diffusers' UNet.

``python -m benchmarks.local_steps --device cuda``
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srfed.commands.options import Parser
from srfed.config import RunConfig, UNetConfig, load_config
from srfed.device import arithmetic, autocast, memory_layout, resolve_device
from srfed.flat import copies
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.training.local import LocalResult, LocalTrainer
from srfed.training.part import initial_state
from srfed.training.step import LocalStep

NETWORKS = {"digits": (1, 8), "mnist": (1, 28), "mnist_paper": (3, 32)}
"""Channels and side of the images that each configuration's network is timed on."""
IMAGES, ROUNDS = 500, 3


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--steps", type=int, default=20, help="local steps in a round")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--side", type=int, help="pixels of an image; default: the network's own")
    parser.add_argument(
        "--profile", action="store_true", help="show what takes most of the time, and no speeds"
    )
    options = parser.parse_args()
    cuda = options.device != "cpu" and torch.cuda.is_available()
    print(torch.cuda.get_device_name() if cuda else "CPU", f"torch {torch.__version__}", flush=True)
    for name in options.networks:
        for precision in ("float32", "tf32", "bfloat16") if cuda else ("float32",):
            for channels_last in (False, True):
                settings = [
                    f"resources.precision={precision}",
                    f"resources.channels_last={channels_last}".lower(),
                ]
                config = _config(name, options.device, options.steps, settings)
                channels, own_side = NETWORKS[name]
                side = options.side or own_side
                images = _images(channels, side)
                if options.profile:
                    print(f"{name}, {', '.join(settings)}", flush=True)
                    _show_profile(_trainer(config, images, captures=True))
                    continue
                speeds = [("steps", _time(_trainer(config, images, captures=False), config))]
                if cuda:
                    speeds.append(
                        ("captured", _time(_trainer(config, images, captures=True), config))
                    )
                speeds.append(("diffusers", _diffusers(config, images)))
                shown = ", ".join(f"{label} {speed:,.0f}" for label, speed in speeds)
                layout = "NHWC" if channels_last else "NCHW"
                print(
                    f"{name} {side} px, batches of {config.training.batch_size}, {precision} "
                    f"{layout}: {shown} images/s"
                )


def _config(name: str, device: str, steps: int, settings: list[str]) -> RunConfig:
    fixed = [
        f"resources.device={device}",
        f"training.local_steps={steps}",
        "training.local_epochs=null",
    ]
    return load_config(Path("configs") / f"{name}.yaml", [*fixed, *settings])


def _images(channels: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, channels), dtype=np.uint8)


def _trainer(config: RunConfig, images: np.ndarray, *, captures: bool) -> Callable[[], LocalResult]:
    device = resolve_device(config.resources)
    model = build_model(config, images.shape[-1])
    partition = build_partition(config, model)
    state = initial_state(model, partition)
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    model = model.to(device, memory_format=memory_layout(config.resources))  # type: ignore[call-overload]
    objective = build_objective(config, device)
    step = LocalStep(config, model, partition, objective)
    step.captures = step.captures and captures
    trainer = LocalTrainer(config, model, partition, objective, "benchmark", images, 0, step)
    return lambda: trainer.train(1, shared, state)


def _time(train: Callable[[], LocalResult], config: RunConfig) -> float:
    """Images a second of the steps; a round's beginning and end are left out."""
    train()
    results = [train() for _ in range(ROUNDS)]
    return statistics.median(result.images / result.seconds for result in results)


def _show_profile(train: Callable[[], LocalResult]) -> None:
    """The twelve kernels, or on a CPU operations, that a round of steps spends most of its time
    in.
    """
    train()
    with torch.profiler.profile() as profile:
        train()
    key = f"self_{'cuda' if torch.cuda.is_initialized() else 'cpu'}_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=12), flush=True)


def diffusers_network(model: UNetConfig, channels: int, side: int) -> Any:
    """diffusers' UNet with the same stages, of images of so many channels and pixels a side."""
    from diffusers import UNet2DModel

    stages = range(len(model.channels))
    return UNet2DModel(  # type: ignore[no-untyped-call]
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=model.blocks_per_stage,
        block_out_channels=tuple(model.channels),
        norm_num_groups=model.groups,
        attention_head_dim=model.attention_head_channels,
        down_block_types=tuple(
            "AttnDownBlock2D" if k in model.attention_stages else "DownBlock2D" for k in stages
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if k in model.attention_stages else "UpBlock2D"
            for k in reversed(stages)
        ),
    )


def _diffusers(config: RunConfig, images: np.ndarray) -> float:
    """A plain loop: the same stages in diffusers' UNet, the same loss and batches, fused Adam."""
    device, resources, model = resolve_device(config.resources), config.resources, config.model
    assert isinstance(model, UNetConfig)
    torch.manual_seed(0)
    network = diffusers_network(model, images.shape[-1], images.shape[1])
    network = network.to(device, memory_format=memory_layout(resources))
    optimizer = torch.optim.Adam(network.parameters(), lr=config.training.learning_rate, fused=True)
    objective = build_objective(config, device)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
    # diffusers halves 28 px to 14, 7 and 3, and cannot come back; it is given the next multiple of
    # eight.
    padding = -scaled.shape[-1] % 2 ** (len(model.channels) - 1)
    scaled = F.pad(scaled, (0, padding, 0, padding)).contiguous(
        memory_format=memory_layout(resources)
    )

    def step() -> None:
        batch: Tensor = scaled[
            torch.randint(len(scaled), (config.training.batch_size,), device=device)
        ]
        timesteps = torch.randint(1, objective.process.timesteps + 1, (len(batch),), device=device)
        noise = torch.randn_like(batch)
        optimizer.zero_grad(set_to_none=True)
        with autocast(resources, device):
            predicted = network(
                objective.process.add_noise(batch, timesteps, noise), timesteps
            ).sample
        F.mse_loss(predicted.float(), noise).backward()
        optimizer.step()

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return count * config.training.batch_size / (time.perf_counter() - start)

    with arithmetic(resources, device):
        run(5)
        return statistics.median(run(config.training.local_steps or 1) for _ in range(ROUNDS))


if __name__ == "__main__":
    main()

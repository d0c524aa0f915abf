"""Training images a second of a client's local step, beside plain loops over other libraries' UNets
of the same stages.

``python -m benchmarks.peers``: one thread, on the CPU, in seconds of processor time; one repetition
of each after the other, so that a busy machine is busy for all of them. Every loop has the same
batches, fused Adam, clipping and moving average. lucidrains' UNet (denoising-diffusion-pytorch) has
a row where that can be imported.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.local_steps import diffusers_network
from srfed.commands.options import Parser
from srfed.config import RunConfig, UNetConfig, load_config
from srfed.device import memory_layout
from srfed.flat import copies
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.partition import Shared
from srfed.training.local import Job, LocalTrainer, train_owners
from srfed.training.part import initial_state
from srfed.training.step import LocalStep

CASES = {
    "digits, 8 px": ("digits", 1, 8),
    "few_images, 16 px": ("few_images", 1, 16),
    "digits, 32 px in colour": ("digits", 3, 32),
}
"""Configuration, channels and side of the images; sides that all of them can halve three times."""


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="steps in a repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--stack",
        type=int,
        default=7,
        help="owners that train as one program, in a row of their own (7, a CPU's most)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in options.cases:
        name, channels, side = CASES[case]
        config = load_config(
            Path("configs") / f"{name}.yaml",
            [
                f"training.local_steps={options.steps}",
                "training.minibatches=continued",
                "training.control_variates=false",
                "diffusion.prediction=noise",
                "resources.device=cpu",
            ],
        )
        images = np.random.default_rng(0).integers(
            0, 256, (256, side, side, channels), dtype=np.uint8
        )
        stacked = f"srfed, a stack of {options.stack}"
        loops = {
            "srfed": _own(config, images),
            "srfed, channels last": _own(config, images, channels_last=True),
            stacked: _own(config, images, stack=options.stack),
            **_peers(config, images),
        }
        taken: dict[str, list[float]] = {library: [] for library in loops}
        for repeat in range(options.repeats + 1):
            for library, (_, train) in loops.items():
                start = time.process_time()
                train()
                if repeat:
                    owners = options.stack if library == stacked else 1
                    taken[library].append((time.process_time() - start) / owners)
        count = config.training.batch_size * options.steps
        for library, (network, _) in loops.items():
            speed = count / statistics.median(taken[library])
            flops = _flops(network, channels, side)
            ratios = [
                other / own for own, other in zip(taken["srfed"], taken[library], strict=True)
            ]
            size = sum(parameter.numel() for parameter in network.parameters())
            print(
                f"{case}, batches of {config.training.batch_size}: {library}: {speed:.1f} images/s "
                f"of {size / 1e6:.2f}M weights and {flops / 1e6:.0f} MFLOP forward "
                f"({3e-9 * speed * flops:.1f} GFLOP/s); srfed is {statistics.median(ratios):.2f} "
                f"times as fast ({min(ratios):.2f} to {max(ratios):.2f}), stacked "
                f"{_stacked_over(taken[stacked], taken[library])}",
                flush=True,
            )


def _stacked_over(stacked: list[float], others: list[float]) -> str:
    return f"{statistics.median(o / s for s, o in zip(stacked, others, strict=True)):.2f}"


def _own(
    config: RunConfig, images: np.ndarray, *, channels_last: bool = False, stack: int | None = None
) -> tuple[nn.Module, Callable[[], object]]:
    resources = config.resources.model_copy(update={"channels_last": channels_last})
    config = config.model_copy(update={"resources": resources})
    model = build_model(config, images.shape[-1])
    partition = build_partition(config, model)
    state = initial_state(model, partition)
    shared = Shared(copies(partition.take_shared(model.state_dict())))
    model = model.to(memory_format=memory_layout(resources))
    objective = build_objective(config, torch.device("cpu"))
    step = LocalStep(config, model, partition, objective, stack)
    trainers = [
        LocalTrainer(config, model, partition, objective, f"owner-{k}", images, step=step)
        for k in range(stack or 1)
    ]
    jobs = [Job(trainer, 1, shared, state) for trainer in trainers]
    return model, lambda: train_owners(config, step, jobs)


def _peers(
    config: RunConfig, images: np.ndarray
) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    model, channels, side = config.model, images.shape[-1], images.shape[1]
    assert isinstance(model, UNetConfig)
    torch.manual_seed(0)
    network = diffusers_network(model, channels, side)
    found = {
        "diffusers": (network, _loop(config, network, lambda x, t: network(x, t).sample, images))
    }
    try:
        from denoising_diffusion_pytorch import Unet  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        print(f"no row of denoising-diffusion-pytorch: {error}")
        return found
    # It has two blocks in each stage, and linear attention where it has no other.
    other: Any = Unet(
        dim=model.channels[0],
        dim_mults=tuple(width // model.channels[0] for width in model.channels),
        channels=channels,
        attn_dim_head=model.attention_head_channels,
        attn_heads=max(1, model.channels[-1] // model.attention_head_channels),
        full_attn=tuple(k in model.attention_stages for k in range(len(model.channels))),
    )
    return {**found, "lucidrains": (other, _loop(config, other, other, images))}


def _loop(
    config: RunConfig,
    network: nn.Module,
    forward: Callable[[Tensor, Tensor], Tensor],
    images: np.ndarray,
) -> Callable[[], object]:
    """A plain training loop, with what a client's steps have: clipping, Adam, a moving average."""
    training = config.training
    objective = build_objective(config, torch.device("cpu"))
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
    weights: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=training.learning_rate, fused=True)

    def train() -> None:
        for _ in range(training.local_steps or 1):
            batch = scaled[torch.randint(len(scaled), (training.batch_size,))]
            times = torch.randint(1, objective.process.timesteps + 1, (len(batch),))
            noise = torch.randn_like(batch)
            optimizer.zero_grad(set_to_none=True)
            predicted = forward(objective.process.add_noise(batch, times, noise), times)
            F.mse_loss(predicted, noise).backward()
            nn.utils.clip_grad_norm_(weights, training.gradient_clip or 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - training.ema_decay)

    return train


def _flops(network: nn.Module, channels: int, side: int) -> float:
    """Floating point operations of the forward pass of an image, in matrix products and
    convolutions.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, channels, side, side), torch.ones(1, dtype=torch.long))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()

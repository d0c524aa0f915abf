"""From a configuration to the objects that training and sampling work with."""

from contextlib import AbstractContextManager, nullcontext

import torch

from srfed.config import ResourcesConfig, RunConfig
from srfed.diffusion.process import Diffusion, PredictNoise
from srfed.diffusion.schedule import build_schedule
from srfed.errors import UserError
from srfed.models.partition import Partition, divide
from srfed.models.unet import UNet
from srfed.randomness import derive_seed


def build_model(config: RunConfig, image_channels: int) -> UNet:
    """The UNet with the run's common initialisation: the same bits for every party (CPU, float32)."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initialisation"))
        return UNet(
            image_channels=image_channels,
            channels=model.channels,
            blocks_per_stage=model.blocks_per_stage,
            attention_stages=model.attention_stages,
            attention_head_channels=model.attention_head_channels,
            groups=model.groups,
            dropout=model.dropout,
            task_embedding=model.task_embedding,
            tasks=config.federation.clients,
            zero_head=model.zero_head,
        )


def build_partition(config: RunConfig, model: UNet) -> Partition:
    """The run's partition of the model's tensors; raises UserError for a pattern that matches nothing."""
    try:
        return divide(model, config.model.exclusive_stages)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def noise_of_task(model: UNet, task: int) -> PredictNoise:
    """ε(x_t, t) of one task: the model, told the task's position in every call if it has a table of tasks.

    Raises:
        UserError: the model has a table, and no such task in it.
    """
    if model.task_table is None:
        return model
    if not 0 <= task < model.task_table.num_embeddings:
        raise UserError(
            f"model.task_embedding = shared has tasks 0 to {model.task_table.num_embeddings - 1}, and no {task}; a "
            "deployed site has no number"
        )
    return lambda x, timesteps: model(x, timesteps, torch.full_like(timesteps, task, dtype=torch.long))


def build_diffusion(config: RunConfig, device: torch.device) -> Diffusion:
    """The run's forward process, its tables on ``device``."""
    return Diffusion(build_schedule(**config.diffusion.model_dump()), device)


def resolve_device(resources: ResourcesConfig) -> torch.device:
    """The device of ``resources.device``.

    Raises:
        UserError: CUDA, or a precision that needs it, is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if resources.device == "cuda" and not available:
        raise UserError("resources.device = cuda, but PyTorch finds no CUDA device here; allowed: auto, cpu")
    # With its index, because tensors have one and devices are compared.
    cuda = available and resources.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if resources.precision != "float32" and device.type == "cpu":
        raise UserError(
            f"resources.precision = {resources.precision} needs CUDA, and there is none here; allowed: float32"
        )
    return device


def autocast(resources: ResourcesConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context in which forward passes run: bfloat16 autocast where the run asks for it."""
    if resources.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

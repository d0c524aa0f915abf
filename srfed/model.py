"""From a configuration to the objects that training and sampling work with."""

from collections.abc import Callable

import torch
from torch import Tensor

from srfed.config import RunConfig
from srfed.config.choices import OBJECTIVES, chosen, constants
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import Denoiser
from srfed.diffusion.schedule import build_schedule
from srfed.errors import UserError
from srfed.networks.partition import Partition, divide
from srfed.networks.unet import UNet
from srfed.randomness import derive_seed


def build_model(config: RunConfig, image_channels: int) -> UNet:
    """The UNet with the run's common initialisation: the same bits for every party (CPU,
    float32).
    """
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
    """The run's partition of the model's tensors; raises UserError for a pattern that matches
    nothing.
    """
    try:
        return divide(model, config.model.exclusive_stages)
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def denoiser_of_task(
    objective: Objective, model: UNet, task: int, forward: Callable[..., Tensor] | None = None
) -> Denoiser:
    """E[x_0 | x_t] of one task, with the weights that the model has when it is called.

    Args:
        objective: what the model predicts.
        model: the network, in evaluation mode, told the task's position in every call if it has a
            table of tasks.
        task: the task's position.
        forward: the network's forward pass, if not the model itself.

    Raises:
        UserError: the model has a table, and no such task in it.
    """
    called = forward or model
    position = task_of_table(model, task)
    if position is None:
        return objective.denoiser(called)
    return objective.denoiser(
        lambda x, times: called(x, times, torch.full_like(times, position, dtype=torch.long))
    )


def task_of_table(model: UNet, task: int) -> int | None:
    """A task's row in the model's table of tasks; None where it has no table.

    Raises:
        UserError: the model has a table, and no such task in it.
    """
    if model.task_table is None:
        return None
    if not 0 <= task < model.task_table.num_embeddings:
        raise UserError(
            f"model.task_embedding = shared has tasks 0 to {model.task_table.num_embeddings - 1}, "
            f"and no {task}; a deployed site has no number"
        )
    return task


def build_objective(config: RunConfig, device: torch.device) -> Objective:
    """What the run's network learns to predict, its tables on ``device``."""
    settings = config.diffusion
    schedule = build_schedule(**constants(build_schedule, settings))
    made = chosen(OBJECTIVES, settings.prediction)
    objective: Objective = made(schedule, device, **constants(made, settings))
    return objective

"""An unseen task joins after training: θ_new is fitted on its images, and nobody else takes part.

Three ways, to be compared at equal steps: φ stays as it is (``frozen``), so that what the task adds
to the run is θ_new alone; φ is where the task starts from, and moves here and nowhere else
(``thawed``); nothing is taken over from the run but its initialisation (``scratch``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from srfed.config import RunConfig, parse_config
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.flat import copies
from srfed.model import build_model, build_objective, build_partition
from srfed.networks.network import Network
from srfed.networks.partition import Partition, Shared, divide
from srfed.training.local import LocalTrainer
from srfed.training.part import ClientState, initial_state, load_tensors
from srfed.training.step import LocalStep

Mode = Literal["frozen", "thawed", "scratch"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, eq=False)
class Adapted:
    """The model of the new task after some steps (CPU tensors by name, as the run's partition
    divides them).

    Attributes:
        chunk: number of the chunk of steps that has just ended, from 1.
        steps: local steps so far.
        loss: mean loss, eq. (7), over the images of this chunk.
        shared: φ; under ``frozen`` the bits that were given, otherwise the moving average of this
            task's own.
        exclusive: the moving average of θ_new.
    """

    chunk: int
    steps: int
    loss: float
    shared: dict[str, Tensor]
    exclusive: dict[str, Tensor]


def adaptation_config(
    config: RunConfig, mode: Mode, *, images: int, steps: int, every: int, seed: int | None = None
) -> RunConfig:
    """A run's configuration, changed to what one adaptation is: ``every`` steps a round, a constant
    rate.

    Without a schedule the first steps do not depend on how many follow, so a curve over steps is
    one of budgets.

    Args:
        config: the run's.
        mode: how to adapt.
        images: training images; where a minibatch has more, it runs on into the next pass over
            them.
        steps: local steps in all.
        every: local steps of one chunk.
        seed: of minibatches, noise and timesteps; None takes the run's.

    Raises:
        UserError: a value is impossible.
    """
    if not 1 <= every <= steps:
        raise UserError(
            f"{every} steps between two scores are impossible; allowed: 1 to {steps}, all steps"
        )
    training = config.training
    content = config.model_dump(mode="json")
    if seed is not None:
        content["seed"] = seed
    content["resources"] |= {"channels_last": False}
    content["federation"] |= {"rounds": -(-steps // every), "compare": "none"}
    content["training"] |= {
        # A centralised run's model is adapted by a client as well, as nobody has the other tasks'
        # images.
        "method": "federated",
        "centralised_batch_size": None,
        "local_steps": every,
        "local_epochs": None,
        "update": "exclusive" if mode == "frozen" else "joint",
        "exclusive_steps": None,
        "shared_moments": "reset",
        "proximal": 0.0,
        "control_variates": False,
        "learning_rate_schedule": "constant",
        "decay_rounds": None,
        "warmup_rounds": 0,
        "minibatches": "continued" if training.batch_size > images else training.minibatches,
    }
    if mode != "frozen":
        # All tensors move as one part, at φ's rate, which is θ's too unless the run sets that
        # apart; what the network owns keeps the rate that it had.
        content["training"]["exclusive_learning_rate"] = None
        if config.model.owned:
            content["training"]["owned_learning_rate"] = (
                training.owned_learning_rate or training.exclusive_learning_rate
            )
    return parse_config(content, "the adaptation")


def adapt(
    config: RunConfig,
    shared: Mapping[str, Tensor],
    images: np.ndarray,
    *,
    task: str,
    mode: Mode,
    steps: int,
    every: int,
    seed: int | None = None,
) -> Iterator[Adapted]:
    """Fit a model to an unseen task, starting from the initialisation that all tasks of the run
    had.

    The training is a client's (:class:`~srfed.training.local.LocalTrainer`), in chunks of ``every``
    steps; Adam's moments and the moving averages go on from one chunk to the next.

    Args:
        config: the run's configuration; its settings for training hold where
            :func:`adaptation_config` is silent.
        shared: the run's averaged φ; ``scratch`` takes its shapes alone.
        images: the task's training images, uint8 N x H x W x C, N at least 1.
        task: its name, part of every seed.
        mode: what moves, and from where.
        steps: local steps in all.
        every: local steps between two results; the last chunk may have fewer.
        seed: of the adaptation's draws; None takes the run's. The initialisation is the run's in
            any case.

    Returns:
        The model after every chunk.

    Raises:
        UserError: the run has no exclusive layers or no shared ones, or tells its tasks apart by a
            table in φ; or a value is impossible.
    """
    own = adaptation_config(config, mode, images=len(images), steps=steps, every=every, seed=seed)
    model = build_model(config, images.shape[-1])
    parts = build_partition(config, model)
    _check(config, model, parts)
    if mode != "scratch":
        load_tensors(model, shared)
    # The moving average of a client covers what is exclusive to it. Where φ moves too, all of the
    # model is.
    trained = parts if mode == "frozen" else divide(model, "all")
    start = Shared(copies(trained.take_shared(model.state_dict())))
    return _chunks(
        own, model, parts, trained, start, initial_state(model, trained), task, images, steps
    )


def _chunks(
    config: RunConfig,
    model: Network,
    parts: Partition,
    trained: Partition,
    shared: Shared,
    state: ClientState,
    task: str,
    images: np.ndarray,
    steps: int,
) -> Iterator[Adapted]:
    device = resolve_device(config.resources)
    model.to(device)
    objective = build_objective(config, device)
    every = config.training.local_steps or steps
    # What was captured of it serves every chunk.
    step = LocalStep(config, model, trained, objective)
    for chunk, first in enumerate(range(0, steps, every), start=1):
        count = min(every, steps - first)
        training = config.training.model_copy(update={"local_steps": count})
        trainer = LocalTrainer(
            config.model_copy(update={"training": training}),
            model,
            trained,
            objective,
            task,
            images,
            step=step,
        )
        result = trainer.train(chunk, shared, state)
        state = result.state
        whole = {**result.shared, **state.exclusive.average}
        yield Adapted(
            chunk, first + count, result.loss, parts.take_shared(whole), parts.take_exclusive(whole)
        )


def _check(config: RunConfig, model: Network, parts: Partition) -> None:
    stages = config.model.exclusive_stages
    if not parts.exclusive or not parts.shared:
        lacks = "exclusive layers to fit" if not parts.exclusive else "shared core to build on"
        owns = "" if parts.exclusive else ", and its network owns nothing"
        raise UserError(f"the run has no {lacks}: its model.exclusive_stages is {stages}{owns}")
    if model.tasks:
        raise UserError(
            "the run's core has a table of its tasks (model.task_embedding shared), with no row "
            "for a new one"
        )

"""From a configuration to the objects that training and sampling work with."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from srfed.config import OwnNetworkConfig, ResourcesConfig, RunConfig
from srfed.config.choices import NETWORKS, OBJECTIVES, chosen, constants, make
from srfed.device import batched_attention, captured_forward
from srfed.diffusion.guidance import TaskDenoiser
from srfed.diffusion.objective import Objective
from srfed.diffusion.process import Denoiser
from srfed.diffusion.schedule import build_schedule
from srfed.errors import UserError
from srfed.memory import failure_of_gpu, is_short_of_memory
from srfed.networks.initialise import initialise
from srfed.networks.network import Network
from srfed.networks.partition import Partition, Shared, divide
from srfed.randomness import derive_seed
from srfed.work import count_passes


def build_model(config: RunConfig, image_channels: int) -> Network:
    """The run's network with the common initialisation: the same bits for every party (CPU,
    float32).

    Raises:
        UserError: a network of one's own cannot be loaded or made, or has what is no parameter.
    """
    settings = config.model
    made = chosen(NETWORKS, settings.network)
    if isinstance(settings, OwnNetworkConfig):
        taken = dict(settings.options)
    else:
        taken = constants(made, settings)
    if "tasks" in inspect.signature(made).parameters:
        taken["tasks"] = config.federation.clients
    with torch.random.fork_rng(devices=[]):
        # For what a constructor draws and :func:`initialise` does not draw anew.
        torch.default_generator.manual_seed(derive_seed(config.seed, "construction"))
        try:
            network: Network = made(image_channels=image_channels, **taken)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.network = {settings.network} cannot be made: {error}"
            ) from error
    if odd := sorted({*network.state_dict()} ^ {name for name, _ in network.named_parameters()}):
        raise UserError(
            f"model.network = {settings.network} keeps {odd[0]!r}, which is no parameter of its "
            "own: a state that nobody trains can be neither shared nor private; allowed: buffers "
            "with persistent=False, and no parameter twice"
        )
    initialise(network, config.seed)
    return network


def shared_of(config: RunConfig, channels: Sequence[int]) -> tuple[Partition, Shared]:
    """The run's partition, and φ_0, for images of these numbers of channels.

    Raises:
        UserError: φ is not the same for all of them, and as :func:`build_model` and
            :func:`build_partition`.
    """
    found = []
    for count in channels:
        model = build_model(config, count)
        partition = build_partition(config, model)
        found.append((partition, partition.take_shared(model.state_dict())))
    first, shared = found[0]
    for partition, other in found[1:]:
        if partition.fingerprint(other) != first.fingerprint(shared):
            name = next(
                (n for n in shared if n not in other or other[n].shape != shared[n].shape),
                first.shared[0],
            )
            raise UserError(
                f"images of {channels[0]} and of {channels[1]} channels cannot share {name!r}; "
                "allowed: one number for all (data.channels), or a model.exclusive_stages that "
                "keeps at the clients what meets the images, such as io or 1"
            )
    return first, shared


def build_partition(config: RunConfig, model: Network) -> Partition:
    """The run's partition of the model's tensors.

    Raises:
        UserError: a pattern matches nothing; the run trains θ_i alone and there is none; it has a
            pool of all tasks and there is one; or control variates of a φ that has no tensors; or
            as :func:`check_guidance`.
    """
    try:
        partition = divide(model, config.model.exclusive_stages)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    # What a network of one's own owns, no setting says.
    network = config.model.network
    if config.training.update == "exclusive" and not partition.exclusive:
        raise UserError(
            f"training.update exclusive trains nothing with model.exclusive_stages none, as "
            f"model.network {network} owns nothing"
        )
    if config.training.method == "pooled" and partition.exclusive:
        raise UserError(
            f"training.method pooled has no exclusive layers, and model.network {network} owns "
            f"{partition.exclusive[0]}; allowed: federated, one_task, balanced"
        )
    if config.federation.compare == "alone" and not partition.shared:
        raise UserError(
            "federation.compare alone needs shared tensors, and model.exclusive_stages "
            f"{json.dumps(config.model.exclusive_stages)} leaves none: everybody is alone"
        )
    if config.training.control_variates and not partition.shared:
        raise UserError(
            "training.control_variates true needs shared tensors, and model.exclusive_stages "
            f"{json.dumps(config.model.exclusive_stages)} leaves none"
        )
    check_guidance(config, partition)
    return partition


def check_guidance(config: RunConfig, partition: Partition) -> None:
    """Raise UserError where samples are to be guided and the network owns nothing, which of a
    network of one's own the configuration cannot tell.
    """
    if config.sampling.guidance and not partition.owned:
        raise UserError(
            f"sampling.guidance {config.sampling.guidance} leads away from zeros in place of what "
            f"is a task's own, and model.network {config.model.network} owns nothing; allowed: 0"
        )


class Forwards(NamedTuple):
    """A network's forward passes.

    Attributes:
        task: with the weights that it has.
        nobody: with zeros in place of what it owns; None where it owns nothing.
    """

    task: Callable[..., Tensor]
    nobody: Callable[..., Tensor] | None


def forwards_of(model: Network) -> Forwards:
    """The forward passes of a network that stays on its device."""
    state, owned = model.state_dict(), divide(model, "none").owned
    if not owned:
        return Forwards(model, None)
    # Made once: a captured pass reads them where they are.
    zeros = {name: torch.zeros_like(state[name]) for name in owned}

    def nobody(*arguments: Tensor) -> Tensor:
        predicted: Tensor = functional_call(model, zeros, arguments)
        return predicted

    return Forwards(model, nobody)


def captured_forwards(model: Network, resources: ResourcesConfig, device: torch.device) -> Forwards:
    """The same, each captured where there is CUDA (:func:`~srfed.device.captured_forward`)."""
    return _captured(forwards_of(model), resources, device)


def _captured(forwards: Forwards, resources: ResourcesConfig, device: torch.device) -> Forwards:
    task, nobody = forwards
    return Forwards(
        captured_forward(task, resources, device),
        None if nobody is None else captured_forward(nobody, resources, device),
    )


def stacked_forward(
    config: RunConfig, model: Network, weights: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """The forward passes of several owners' networks as one: of arguments with as many images of
    each, one owner's after the other's.

    Args:
        config: the run's configuration.
        model: one of these networks.
        weights: of all its parameters, with the owner as first dimension.

    Returns:
        A function that raises UserError where the network cannot be stacked.
    """
    first = next(iter(weights.values()))

    def of_one(own: dict[str, Tensor], *arguments: Tensor) -> Tensor:
        predicted: Tensor = functional_call(model, own, arguments)
        return predicted

    def forward(*arguments: Tensor) -> Tensor:
        each = (tensor.unflatten(0, (len(first), -1)) for tensor in arguments)
        try:
            with batched_attention(first.device):
                predicted: Tensor = vmap(of_one)(dict(weights), *each)
        except RuntimeError as error:
            if is_short_of_memory(error) or failure_of_gpu(error):
                raise
            raise UserError(
                f"model.network {config.model.network} cannot be trained with "
                f"resources.stack {config.resources.stack}, as torch.func.vmap says: "
                f"{' '.join(str(error).split())[:200]}; allowed: auto, 1"
            ) from error
        return predicted.flatten(0, 1)

    return forward


class StackedModel:
    """The networks of several owners that are asked together, captured where there is CUDA.

    Args:
        config: the run's configuration.
        model: a network of the run's shape, on the device, in evaluation mode whenever this is
            called.
        owners: how many.

    Attributes:
        owners: for each its weights by name, to be overwritten.
        forwards: as :func:`forwards_of`, of all of them.
    """

    def __init__(self, config: RunConfig, model: Network, owners: int) -> None:
        parameters, owned = dict(model.named_parameters()), divide(model, "none").owned
        device = next(iter(parameters.values())).device
        weights, zeros = (
            {name: torch.zeros(owners, *parameters[name].shape, device=device) for name in names}
            for names in (parameters, owned)
        )
        self.owners = [
            {name: tensor[place] for name, tensor in weights.items()} for place in range(owners)
        ]
        task = stacked_forward(config, model, weights)
        nobody = stacked_forward(config, model, {**weights, **zeros}) if owned else None
        self.forwards = _captured(Forwards(task, nobody), config.resources, device)


def denoiser_of_task(
    objective: Objective, model: Network, task: int | None, forwards: Forwards | None = None
) -> Denoiser:
    """E[x_0 | x_t] of one task, with the weights that the model has when it is called; it knows its
    guide where the model owns something.

    Args:
        objective: what the model predicts.
        model: the network, in evaluation mode, told the task's position in every call if it has a
            table of tasks.
        task: the task's position; None: it has none, as a deployed site and a new owner.
        forwards: the network's forward passes, if not as :func:`forwards_of` gives them.

    Raises:
        UserError: the model has a table, and no such task in it.
    """
    return denoiser_of_tasks(objective, model, [task], forwards or forwards_of(model))


def denoiser_of_tasks(
    objective: Objective, model: Network, tasks: Sequence[int | None], forwards: Forwards
) -> Denoiser:
    """The same of several tasks: of as many images of each, one task's after the other's."""
    places = [task_of_table(model, task) for task in tasks]
    rows = None if places[0] is None else torch.tensor(places, device=objective.process.device)

    def denoiser(forward: Callable[..., Tensor]) -> Denoiser:
        def counted(x: Tensor, times: Tensor) -> Tensor:
            count_passes(len(x))
            if rows is None:
                return forward(x, times)
            return forward(x, times, rows[:, None].expand(-1, len(x) // len(rows)).flatten())

        return objective.denoiser(counted)

    own, nobody = forwards
    return denoiser(own) if nobody is None else TaskDenoiser(denoiser(own), denoiser(nobody))


def task_of_table(model: Network, task: int | None) -> int | None:
    """A task's row in the model's table of tasks; None where it has no table.

    Raises:
        UserError: the model has a table, and no such task in it.
    """
    if not model.tasks:
        return None
    if task is None or not 0 <= task < model.tasks:
        raise UserError(
            f"model.task_embedding = shared has tasks 0 to {model.tasks - 1}, and no {task}; a "
            "deployed site has no number"
        )
    return task


def build_objective(config: RunConfig, device: torch.device) -> Objective:
    """What the run's network learns to predict, its tables on ``device``; raises UserError where
    that is an objective of one's own that cannot be loaded or made.
    """
    settings = config.diffusion
    schedule = build_schedule(**constants(build_schedule, settings))
    objective: Objective = make(OBJECTIVES, settings.prediction, settings, schedule, device)
    return objective

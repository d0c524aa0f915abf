"""The ClientApp: describe yourself, train a round, generate and judge samples."""

import time
from dataclasses import dataclass, replace
from typing import Self

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from srfed import __version__
from srfed.checkpoints.site_model import save_site_model
from srfed.config import parse_config_json
from srfed.data import Task
from srfed.errors import UserError
from srfed.evaluation.frechet import FeatureStatistics
from srfed.evaluation.generation import Generated
from srfed.evaluation.memorisation import draw_nearest_pairs
from srfed.evaluation.task import TaskEvaluation, evaluate_task
from srfed.federation.messages import (
    GENERATED,
    SETS,
    SHARED,
    SHARED_MOMENTS,
    STATISTICS,
    Description,
    ReplyHeader,
    Request,
    audit_metrics,
    read_refusal,
    read_tensors,
    reply_content,
)
from srfed.federation.runtime import Runtime, runtime_for
from srfed.federation.site import Site, own_task, site_of
from srfed.federation.site_log import write_to_log
from srfed.federation.wire_guard import wire_guard
from srfed.reporting.pictures import draw_grid, write_png
from srfed.reporting.words import printable
from srfed.training.local import load_tensors
from srfed.training.setup import noise_of_task

app = ClientApp(mods=[wire_guard])


@dataclass(frozen=True)
class Duty:
    """What a message asks, and what this client has to do it with."""

    request: Request
    site: Site
    task: Task
    runtime: Runtime

    @classmethod
    def of(cls, message: Message, context: Context) -> Self:
        """Raises UserError or ValueError where the message or the site is not what it should be."""
        request = Request.of(message.content)
        config = parse_config_json(request.config)
        site = site_of(context, config)
        if request.client not in ("", site.client):
            raise UserError(f"the server asks {request.client!r}, this is {site.client!r}")
        task = own_task(config.data, site)
        return cls(request, site, task, runtime_for(request, task.train.shape[-1]))

    def shared(self, message: Message) -> dict[str, Tensor]:
        """φ as the message carries it, checked."""
        shared = read_tensors(message.content, SHARED)
        self.runtime.check_shared(shared)
        return shared

    @property
    def header(self) -> ReplyHeader:
        return ReplyHeader(self.site.client, self.request.attempt, self.request.round)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say who this client is, what its images look like, and which partition it would use."""
    duty = Duty.of(message, context)
    if refusal := read_refusal(message.content):
        write_to_log(duty.site, "refused by the server", printable(refusal))
    _, height, width, channels = duty.task.train.shape
    description = Description(
        client=duty.site.client,
        task=duty.task.name,
        index=duty.site.index,
        height=height,
        width=width,
        channels=channels,
        images=len(duty.task.train),
        test_images=len(duty.task.test),
        partition=duty.runtime.partition_fingerprint,
        version=__version__,
    )
    return Message(description.to_content(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round from the parent attempt, store the new attempt durably, return φ_i."""
    duty = Duty.of(message, context)
    request, runtime = duty.request, duty.runtime
    received_moments = SHARED_MOMENTS in message.content.array_records
    result = runtime.trainer(duty.site).train(
        request.round,
        duty.shared(message),
        runtime.state(duty.site, request),
        read_tensors(message.content, SHARED_MOMENTS) if received_moments else None,
    )
    metrics: dict[str, float | list[float]] = {
        "examples": float(len(duty.task.train)),
        "loss": result.loss,
        "loss_by_quarter": list(result.loss_by_quarter),
        "images": float(result.images),
        "seconds": result.seconds,
        "shared_steps": float(result.shared_steps),
    }
    arrays = {SHARED: result.shared}
    if runtime.config.training.shared_moments == "average":
        arrays[SHARED_MOMENTS] = result.shared_moments
    content = reply_content(duty.header, metrics, arrays)
    runtime.store(duty.site, request).save(request.attempt, request.parent, request.round, result.state)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Generate samples through the averaged (φ, θ_i), and measure SSIM-rec on the own test images.

    In ``samples`` mode the samples are the reply; in ``moments`` mode only statistics of their features are,
    and the owner finds the pictures among its own files. Of the memorisation audit numbers leave; the suspicious
    pairs stay beside them.
    """
    start = time.perf_counter()
    duty = Duty.of(message, context)
    request, task, runtime = duty.request, duty.task, duty.runtime
    config, client = runtime.config, duty.site.client
    shared, state = duty.shared(message), runtime.state(duty.site, request)
    if duty.site.data is not None:
        save_site_model(
            duty.site.folder, config, request.lineage, request.round, task.train.shape[1:], shared,
            state.exclusive_average,
        )  # fmt: skip
    load_tensors(runtime.model, shared, state.exclusive_average)
    runtime.model.eval()
    evaluated = evaluate_task(
        noise_of_task(runtime.model, duty.site.index),
        runtime.diffusion,
        config,
        task=client,
        train=task.train,
        test=task.test,
        samples=request.samples,
        final=request.final,
    )
    generated, metrics = evaluated.generated, _ssim_metrics(evaluated)
    if evaluated.audit is not None:
        metrics |= audit_metrics(evaluated.audit)
        pairs = draw_nearest_pairs(evaluated.audit, generated.images, task.train)
        write_png(duty.site.folder / "memorisation" / f"round-{request.round:05d}.png", draw_grid(pairs))
    header = duty.header
    arrays: dict[str, dict[str, torch.Tensor]] = {}
    if config.evaluation.mode == "moments":
        network = runtime.feature_network
        header = replace(header, features=network.fingerprint)
        arrays[STATISTICS] = {}
        for name, images in zip(SETS, (generated.images, task.test, task.train), strict=True):
            statistics = FeatureStatistics.of(network(images))
            metrics[f"{name}_count"] = float(statistics.count)
            arrays[STATISTICS][f"{name}.mean"] = torch.from_numpy(statistics.mean)
            arrays[STATISTICS][f"{name}.scatter"] = torch.from_numpy(statistics.scatter)
        _keep_pictures(duty, generated)
    else:
        arrays[GENERATED] = {
            "images": torch.from_numpy(generated.images),
            "strip": torch.from_numpy(generated.strip),
        }
    metrics["seconds"] = time.perf_counter() - start
    return Message(reply_content(header, metrics, arrays), reply_to=message)


def _ssim_metrics(evaluated: TaskEvaluation) -> dict[str, float | list[float]]:
    if not evaluated.ssim:
        return {}
    return {
        "ssim_timesteps": [float(timestep) for timestep in evaluated.ssim],
        "ssim": list(evaluated.ssim.values()),
        "ssim_images": float(evaluated.ssim_images),
        "ssim_window": float(evaluated.ssim_window),
    }


def _keep_pictures(duty: Duty, generated: Generated) -> None:
    """Samples and reverse process for the owner's eyes, among the client's own files."""
    rows = {
        duty.task.name: generated.images[: duty.runtime.config.evaluation.grid_columns],
        "x_T to x_0": generated.strip,
    }
    write_png(duty.site.folder / "samples" / f"round-{duty.request.round:05d}.png", draw_grid(rows))

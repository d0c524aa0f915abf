"""The ClientApp: describe yourself, train a round, generate and judge samples."""

import time

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from srfed.config import parse_config_json
from srfed.data import to_model_range
from srfed.evaluation.generation import generate
from srfed.evaluation.reconstruction import ssim_of_reconstructions
from srfed.evaluation.ssim import ssim_window
from srfed.federation.messages import (
    GENERATED,
    SHARED,
    SHARED_MOMENTS,
    Description,
    ReplyHeader,
    Request,
    read_tensors,
    reply_content,
)
from srfed.federation.runtime import runtime_for
from srfed.federation.site import own_task, site_of
from srfed.federation.wire_guard import wire_guard
from srfed.training.local import load_tensors

app = ClientApp(mods=[wire_guard])


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say who this client is, what its images look like, and which partition it would use."""
    request = Request.of(message.content)
    config = parse_config_json(request.config)
    site = site_of(context, config)
    task = own_task(config.data, site.index)
    _, height, width, channels = task.train.shape
    description = Description(
        client=site.client,
        task=task.name,
        index=site.index,
        height=height,
        width=width,
        channels=channels,
        images=len(task.train),
        test_images=len(task.test),
        partition=runtime_for(request, channels).partition_fingerprint,
    )
    return Message(description.to_content(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round from the parent attempt, store the new attempt durably, return φ_i."""
    request = Request.of(message.content)
    config = parse_config_json(request.config)
    site = site_of(context, config)
    task = own_task(config.data, site.index)
    runtime = runtime_for(request, task.train.shape[-1])
    shared = read_tensors(message.content, SHARED)
    runtime.check_shared(shared)
    average = config.training.shared_moments == "average"
    received_moments = SHARED_MOMENTS in message.content.array_records
    result = runtime.trainer(site).train(
        request.round,
        shared,
        runtime.state(site, request),
        read_tensors(message.content, SHARED_MOMENTS) if received_moments else None,
    )
    metrics: dict[str, float | list[float]] = {
        "examples": float(len(task.train)),
        "loss": result.loss,
        "loss_by_quarter": list(result.loss_by_quarter),
        "images": float(result.images),
        "seconds": result.seconds,
        "shared_steps": float(result.shared_steps),
    }
    arrays = {SHARED: result.shared}
    if average:
        arrays[SHARED_MOMENTS] = result.shared_moments
    content = reply_content(ReplyHeader(site.client, request.attempt, request.round), metrics, arrays)
    runtime.store(site, request).save(request.attempt, request.parent, request.round, result.state)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Generate samples through the averaged (φ, θ_i), and measure SSIM-rec on the own test images."""
    request = Request.of(message.content)
    config = parse_config_json(request.config)
    site = site_of(context, config)
    task = own_task(config.data, site.index)
    runtime = runtime_for(request, task.train.shape[-1])
    shared = read_tensors(message.content, SHARED)
    runtime.check_shared(shared)
    start = time.perf_counter()
    load_tensors(runtime.model, shared, runtime.state(site, request).exclusive_average)
    runtime.model.eval()
    settings = config.evaluation
    generated = generate(
        runtime.model,
        runtime.diffusion,
        config.sampling,
        count=request.samples,
        shape=task.train.shape[1:],
        seed=config.seed,
        task=site.client,
        strip_steps=settings.strip_steps,
    )
    metrics: dict[str, float | list[float]] = {}
    judged = task.test[: settings.ssim_images]
    if len(judged):
        timesteps = sorted({settings.ssim_timestep, *(settings.ssim_curve if request.final else ())})
        metrics["ssim_timesteps"] = [float(timestep) for timestep in timesteps]
        metrics["ssim"] = [
            ssim_of_reconstructions(
                runtime.model,
                runtime.diffusion,
                to_model_range(judged).to(runtime.device),
                timestep,
                variance=config.sampling.variance,
                seed=config.seed,
                task=site.client,
            )
            for timestep in timesteps
        ]
        metrics["ssim_images"] = float(len(judged))
        metrics["ssim_window"] = float(ssim_window(*task.test.shape[1:3]))
    metrics["seconds"] = time.perf_counter() - start
    arrays = {GENERATED: {"images": torch.from_numpy(generated.images), "strip": torch.from_numpy(generated.strip)}}
    header = ReplyHeader(site.client, request.attempt, request.round)
    return Message(reply_content(header, metrics, arrays), reply_to=message)

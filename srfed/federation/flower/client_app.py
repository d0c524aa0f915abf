"""The ClientApp: describe yourself, train a round, say the loss on validation images, generate and
judge samples.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor

from srfed.errors import DamagedError, UserError
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import Generated
from srfed.evaluation.metrics.denoising_loss import (
    comparable_loss,
    denoising_losses,
    mean_loss,
    trivial_loss,
)
from srfed.evaluation.metrics.memorisation import draw_nearest_pairs
from srfed.evaluation.task import TaskEvaluation, evaluate_task
from srfed.federation.agreement import LostStoreError, RequestRefusedError
from srfed.federation.bounds import LEAST_LOSS, judged_against_trivial
from srfed.federation.comparison import compare, keep_comparison, train_round_alone
from srfed.federation.control import correction, encode_control, kept_control, own_control
from srfed.federation.flower.admission import Admitted, admit
from srfed.federation.flower.guard import wire_guard
from srfed.federation.flower.outgoing import description_of
from srfed.federation.flower.packing import (
    description_content,
    digest_of,
    read_refusal,
    read_tensors,
    reply_content,
)
from srfed.federation.flower.stacking import StackedApp
from srfed.federation.keeping import keep
from srfed.federation.last_look import stays_here
from srfed.federation.layout import Layout
from srfed.federation.messages import (
    AGAINST_TRIVIAL,
    CONTROL,
    EXAMPLES,
    GENERATED,
    RESTARTED,
    SETS,
    SHARED,
    STATISTICS,
    UPDATE,
    ReplyHeader,
    Request,
    Samples,
    audit_metrics,
    comparison_metrics,
)
from srfed.federation.site_log import write_to_log
from srfed.federation.updates import Delta, Memory, difference, encode_update
from srfed.federation.worker import Drawing, Worker, features_for, worker_for
from srfed.networks.partition import Control, Shared
from srfed.reporting.pictures import draw_grid, write_png
from srfed.storage.client_store import NO_PARENT, AskedError, ClientStore
from srfed.storage.site_model import check_room, save_site_model
from srfed.training.local import LocalResult
from srfed.training.part import ClientState, load_tensors
from srfed.units import printable

TRIVIAL_IMAGES = 16
"""On how many a network is compared with a predictor that has learned nothing."""

app = StackedApp(mods=[wire_guard])


def guarded_app(mods: Sequence[Mod]) -> ClientApp:
    """The same app with mods around the guard, the first one outermost: for an app of one's own,
    as the guard sees nothing of what they do.
    """
    own = StackedApp(mods=[*mods, wire_guard])
    own.query("describe")(describe)
    own.train()(train)
    own.evaluate()(evaluate)
    own.evaluate("validate")(validate)
    return own


def _header(admitted: Admitted) -> ReplyHeader:
    return ReplyHeader(admitted.site.client, admitted.request.attempt, admitted.request.round)


def _shared(message: Message, worker: Worker, expected: Mapping[str, Layout]) -> Shared:
    """φ as the message carries it, checked and decoded; raises RequestRefusedError where it carries
    other arrays than those of ``expected``, by record.
    """
    if unasked := [name for name in message.content.array_records if name not in expected]:
        raise RequestRefusedError("the request has other arrays", f"{unasked[0][:100]!a}")
    return Shared(worker.received(_tensors(message, SHARED), expected[SHARED], "φ"))


def _tensors(message: Message, name: str) -> dict[str, Tensor]:
    """The tensors of a record; raises RequestRefusedError where they are none."""
    try:
        return read_tensors(message.content, name)
    except Exception as error:
        # numpy's reader of headers and the one of JSON raise whatever they please.
        raise RequestRefusedError("the request's arrays cannot be read", str(error)) from error


def _correction(
    message: Message, admitted: Admitted, worker: Worker, parent: ClientState
) -> Control | None:
    """c - c_i, of the c that the message carries; None without control variates."""
    if not worker.contract.control:
        return None
    layout = worker.contract.training_request[CONTROL]
    control = Control(worker.received(_tensors(message, CONTROL), layout, "c"))
    own, said = own_control(parent.memory, admitted.request.round)
    if said:
        admitted.site.note(f"round {admitted.request.round}: {said}")
    return correction(control, own)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say who this client is, what its images look like, and which partition it would use."""
    admitted = admit(message, context)
    site = admitted.site
    site.note_open_folders()
    if refusal := read_refusal(message.content):
        write_to_log(site, "refused by the server", printable(refusal))
    return Message(description_content(description_of(admitted)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round from the parent attempt, store the new attempt durably, return φ_i, or what
    the steps make of its change; and with control variates, what travels in place of c_i.
    """
    admitted = admit(message, context)
    request, site, worker = admitted.request, admitted.site, worker_for(admitted)
    shared = _shared(message, worker, worker.contract.training_request)
    store, question = worker.store(site, request), _question(message, admitted)
    request, parent = _start(admitted, request, worker, training=True)
    _refuse_asked(store, request, question)
    corrected = _correction(message, admitted, worker, parent)
    # A model alone is trained in the same memory before the state is stored.
    lend = admitted.config.federation.compare != "alone"
    result = worker.trainer(site).train(request.round, shared, parent, corrected, lend=lend)
    stays_here(result.state)
    state, arrays = _update(admitted, shared, parent, result)
    if admitted.config.federation.compare == "alone":
        alone = train_round_alone(worker, admitted, parent)
        state = replace(state, memory={**state.memory, **alone})
    metrics: dict[str, float | list[float]] = {
        EXAMPLES: float(len(admitted.task.train)),
        "loss": result.loss,
        "loss_by_quarter": _told_quarters(result, admitted),
        "images": float(result.images),
        "seconds": result.seconds,
        "shared_steps": float(result.shared_steps),
    }
    if judged_against_trivial(admitted.config, request.round):
        metrics[AGAINST_TRIVIAL] = _against_trivial(admitted, worker, result)
    if admitted.config.federation.on_lost_store == "restart":
        metrics[RESTARTED] = float(request.parent != admitted.request.parent)
    content = reply_content(_header(admitted), metrics, arrays)
    keep(
        lambda: store.save(
            request.attempt,
            request.parent,
            request.round,
            state,
            best=request.best,
            question=question,
        )
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Generate samples through the averaged (φ, θ_i), and measure SSIM-rec on the own test images.

    In ``samples`` mode the samples are the reply; in ``statistics`` mode only statistics of their
    features are, and the owner finds the pictures among its own files. Of the memorisation audit
    numbers leave; the suspicious pairs stay beside them.
    """
    start = time.perf_counter()
    admitted = admit(message, context)
    request, site, task, worker = (
        admitted.request,
        admitted.site,
        admitted.task,
        worker_for(admitted),
    )
    config, client = admitted.config, site.client
    network = features_for(admitted) if config.evaluation.mode == "statistics" else None
    shared = _shared(message, worker, worker.contract.request)
    _, state = _start(admitted, request, worker)
    judged, exclusive = request, state.exclusive.average
    if request.final and config.federation.result == "best" and request.best != NO_PARENT:
        judged = replace(request, parent=request.best, round=request.best_round)
        exclusive = _start(admitted, judged, worker)[1].exclusive.average
    if site.data is not None:
        try:
            check_room(site.folder, request.lineage)
        except UserError as error:
            raise RequestRefusedError("the site's store is full", str(error)) from error
        line = worker.store(site, request).line(judged.parent)
        keep(
            lambda: save_site_model(
                site.folder,
                config,
                request.lineage,
                judged.round,
                task.train.shape[1:],
                shared,
                exclusive,
                line,
            )
        )
    # What the client has kept of its model alone is that of its last attempt, whatever is judged.
    compared = compare(worker, admitted, (shared, exclusive), state)
    generated = worker.generate(
        Drawing(site, shared, exclusive, request.samples, task.test.shape[1:])
    )
    load_tensors(worker.model, shared, exclusive)
    evaluated = evaluate_task(
        worker.denoiser(site),
        worker.objective.process,
        config,
        task=client,
        train=task.train,
        test=task.test,
        generated=generated,
        final=request.final,
    )
    metrics = _ssim_metrics(evaluated)
    if evaluated.audit is not None:
        metrics |= audit_metrics(evaluated.audit)
        pairs = draw_nearest_pairs(evaluated.audit, generated.images, task.train)
        picture = site.folder / "memorisation" / f"round-{request.round:05d}.png"
        keep(lambda: write_png(picture, draw_grid(pairs)))
    if compared is not None:
        keep(lambda: keep_comparison(site, request.round, compared))
        if config.federation.compare_told:
            metrics |= comparison_metrics(compared)
    if evaluated.no_audit:
        site.note(f"round {request.round}: no memorisation audit: {evaluated.no_audit}")
    header = _header(admitted)
    arrays: dict[str, Samples] = {}
    if network is not None:
        header = replace(header, features=network.fingerprint)
        statistics_of_sets = Samples({})
        for name, images in zip(SETS, (generated.images, task.test, task.train), strict=True):
            statistics = FeatureStatistics.of(network(images))
            metrics[f"{name}_count"] = float(statistics.count)
            statistics_of_sets[f"{name}.mean"] = torch.from_numpy(statistics.mean)
            statistics_of_sets[f"{name}.scatter"] = torch.from_numpy(statistics.scatter)
        arrays[STATISTICS] = statistics_of_sets
        keep(lambda: _keep_pictures(admitted, generated))
    else:
        arrays[GENERATED] = Samples(
            {
                "images": torch.from_numpy(generated.images),
                "strip": torch.from_numpy(generated.strip),
            }
        )
    metrics["seconds"] = time.perf_counter() - start
    return Message(reply_content(header, metrics, arrays), reply_to=message)


@app.evaluate("validate")
def validate(message: Message, context: Context) -> Message:
    """Say the mean loss of the averaged (φ, θ_i) on the own validation images, where enough of them
    stand behind it.
    """
    admitted = admit(message, context)
    site, images, worker = admitted.site, admitted.task.validation, worker_for(admitted)
    shared = _shared(message, worker, worker.contract.request)
    _, state = _start(admitted, admitted.request, worker)
    loss = math.nan
    if len(images) >= _least_behind_a_mean(admitted):
        load_tensors(worker.model, shared, state.exclusive.average)
        losses = denoising_losses(
            worker.denoiser(site),
            worker.objective.process,
            images,
            task=site.client,
            seed=admitted.config.seed,
        )
        loss = comparable_loss(losses)
    numbers: dict[str, float | list[float]] = {"loss": loss, EXAMPLES: float(len(images))}
    return Message(reply_content(_header(admitted), numbers), reply_to=message)


def _update(
    admitted: Admitted, shared: Mapping[str, Tensor], parent: ClientState, result: LocalResult
) -> tuple[ClientState, dict[str, Shared | Delta | Control]]:
    """What the client keeps of a round, and what it sends."""
    config, client, number = admitted.config, admitted.site.client, admitted.request.round
    memory: dict[str, Memory] = {}
    arrays: dict[str, Shared | Delta | Control] = {SHARED: result.shared}
    if config.updates.steps:
        change = difference(result.shared, shared)
        update, memory = encode_update(config, change, parent.memory, client, number)
        arrays = {UPDATE: update}
    if config.training.control_variates:
        arrays[CONTROL], control = encode_control(config, result.gradient, client, number)
        memory |= kept_control(control, number)
    return replace(result.state, memory=memory), arrays


def _start(
    admitted: Admitted, request: Request, worker: Worker, *, training: bool = False
) -> tuple[Request, ClientState]:
    """The state that the client is to start from, and the request as it is served: with no parent
    where the store has lost it, and the run lets such a client begin anew.

    Raises:
        LostStoreError: it has lost it, and must not.
    """
    site = admitted.site
    try:
        return request, worker.state(site, request, training=training)
    except DamagedError as error:
        if not training or admitted.config.federation.on_lost_store == "refuse":
            words = "the attempt to go on from is lost or damaged"
            raise LostStoreError(words, str(error)) from error
        site.note(
            f"round {request.round}: the attempt to go on from is lost ({error}); the exclusive "
            "weights begin anew"
        )
    begun = replace(request, parent=NO_PARENT)
    return begun, worker.state(site, begun, training=True)


def _question(message: Message, admitted: Admitted) -> str:
    """What decides the answer to a request to train, besides its parent and round: the tensors that
    it carries, and the settings.
    """
    carried = digest_of(message.content.array_records)
    return f"{carried[:32]}-{admitted.config.fingerprint()[:16]}"


def _refuse_asked(store: ClientStore, request: Request, question: str) -> None:
    """Raise RequestRefusedError where the answer could not be stored: before any work."""
    try:
        store.check_question(request.attempt, request.parent, request.round, question)
    except AskedError as error:
        raise RequestRefusedError(f"asked otherwise before: {error}") from error
    except UserError as error:
        raise RequestRefusedError("the site's store is full", str(error)) from error


def _against_trivial(admitted: Admitted, worker: Worker, result: LocalResult) -> float:
    """The loss on the first of the client's training images, over that of a predictor that has
    learned nothing of them.
    """
    process, images = worker.objective.process, admitted.task.train[:TRIVIAL_IMAGES]
    load_tensors(worker.model, result.shared, result.state.exclusive.weights)
    losses = denoising_losses(
        worker.denoiser(admitted.site),
        process,
        images,
        task=admitted.site.client,
        seed=admitted.config.seed,
    )
    return mean_loss(losses) / max(trivial_loss(images, process), LEAST_LOSS)


def _ssim_metrics(evaluated: TaskEvaluation) -> dict[str, float | list[float]]:
    if not evaluated.ssim:
        return {}
    return {
        "ssim_timesteps": [float(timestep) for timestep in evaluated.ssim],
        "ssim": list(evaluated.ssim.values()),
        "ssim_images": float(evaluated.ssim_images),
        "ssim_window": float(evaluated.ssim_window),
    }


def _told_quarters(result: LocalResult, admitted: Admitted) -> list[float]:
    """The mean loss of each quarter of the timesteps; NaN where too few images stand behind it to
    be told.
    """
    least = _least_behind_a_mean(admitted)
    pairs = zip(result.loss_by_quarter, result.images_by_quarter, strict=True)
    return [loss if images >= least else math.nan for loss, images in pairs]


def _least_behind_a_mean(admitted: Admitted) -> int:
    """How many images the owner wants behind a mean that is told."""
    return 1 if admitted.agreement is None else admitted.agreement.least_images.mean


def _keep_pictures(admitted: Admitted, generated: Generated) -> None:
    """Samples and reverse process for the owner's eyes, among the client's own files."""
    rows = {
        admitted.task.name: generated.images[: admitted.config.evaluation.grid_columns],
        "x_T to x_0": generated.strip,
    }
    write_png(
        admitted.site.folder / "samples" / f"round-{admitted.request.round:05d}.png",
        draw_grid(rows),
    )

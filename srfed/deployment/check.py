"""What a site's owner wants to know before joining: is the data right, is there room, what will
leave.
"""

import os
import shlex
import shutil
from itertools import chain, repeat
from pathlib import Path
from uuid import uuid4

import numpy as np

from srfed.config import RunConfig
from srfed.data import (
    Task,
    describe_contents,
    describe_own_images,
    load_own_task,
    recorded_images,
)
from srfed.data.images import Images
from srfed.deployment.agree import fits, standing
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.shares import share_of_samples
from srfed.federation.agreement import COMMAND
from srfed.federation.bounds import comparison_in_words, validation_in_words
from srfed.federation.contract import Contract
from srfed.federation.flower.packing import wire_bytes
from srfed.federation.layout import zeros_of
from srfed.federation.updates import Delta, encode_update
from srfed.files import make_folder, open_to_others
from srfed.model import build_model, build_partition
from srfed.reporting.pictures import draw_grid, write_png
from srfed.runs.checks import check_held_out
from srfed.storage.client_store import check_name
from srfed.training.minibatches import MinibatchOrder
from srfed.units import bytes_in_words

TRAINING_ROWS, TEST_ROWS, COLUMNS = 4, 2, 12
"""Of the picture: at most so many rows of either kind, and images in a row."""


def check_site(
    config: RunConfig, data: Path, state_dir: Path, client: str, picture: Path | None = None
) -> str:
    """Try all that a site will need, and write a picture of its images.

    Args:
        config: the run's configuration.
        data: the site's images, a folder or an .npz file.
        state_dir: where it will keep its state; made if it is not there.
        client: the id that it will have.
        picture: where the picture goes; None takes ``check.png`` in the state directory.

    Returns:
        What was found, what will travel, and the command that joins the federation.

    Raises:
        UserError: something would fail later: the id, the images, a change of them, the
            minibatches, the device, the feature network, the state directory, the disk.
    """
    check_name(client)
    data, state_dir = data.absolute(), state_dir.absolute()
    training, evaluation = config.training, config.evaluation
    device = resolve_device(config.resources)
    store = state_dir / client
    task = load_own_task(config.data, data, client, store, keep=False)
    order = MinibatchOrder.of(training, len(task.train), training.batch_size, config.seed, client)
    if evaluation.mode == "statistics":
        check_held_out(config, [task])
        load_feature_network(evaluation.feature_network, evaluation.inception_weights, device)
    _try_to_write(state_dir)

    _, height, width, channels = task.train.shape
    model = build_model(config, channels)
    tensors, partition = model.state_dict(), build_partition(config, model)
    shared, exclusive = (
        sum(tensors[name].nbytes for name in names)
        for names in (partition.shared, partition.exclusive)
    )
    contract = Contract.of(config, partition.take_shared(tensors))
    needed = _bytes_of_store(contract, task, shared, exclusive)
    free = shutil.disk_usage(state_dir).free
    if free < needed:
        raise UserError(
            f"{state_dir} has {bytes_in_words(free)} free, but the state takes up to "
            f"{bytes_in_words(needed)}"
        )
    picture = picture or state_dir / "check.png"
    write_png(
        picture,
        draw_grid(
            {**_rows("training", task.train, TRAINING_ROWS), **_rows("test", task.test, TEST_ROWS)}
        ),
    )

    agreement = standing(state_dir, client)
    fitting = (
        f"none yet; agree with: {COMMAND}"
        if agreement is None
        else fits(agreement, config, partition.fingerprint(tensors))
    )
    down, up = (
        sum(map(wire_bytes, records.values()))
        for records in (contract.training_request, {**contract.update, **contract.control})
    )
    aside = f", {len(task.validation)} to choose a round by" if len(task.validation) else ""
    return "\n".join(
        [
            f"images:     {data}",
            f"            {len(task.train)} for training, {len(task.test)} for tests{aside}; "
            f"{height} x {width} px, {channels} channel{'s' if channels > 1 else ''}",
            *describe_own_images(config.data, data),
            *(f"contents:   {line}" for line in describe_contents(config.data, [task])),
            "record:     "
            + (
                "these images are put on record when the site joins; later changes are refused "
                "until you accept them"
                if recorded_images(config.data, client, store) is None
                else f"these are the images on record in {store}"
            ),
            f"picture:    {picture}  (look at it: this is what the network will see)",
            f"minibatch:  {len(order.indices(0))} of {len(task.train)} images",
            f"state:      {state_dir} can be written",
            *(
                f"            {said}"
                for path in (state_dir, state_dir / client)
                if (said := open_to_others(path))
            ),
            f"            {bytes_in_words(free)} free, up to {bytes_in_words(needed)} needed",
            f"computes:   on {device.type}",
            "",
            *(
                f"{label:<11} {line}"
                for label, line in zip(
                    chain(("each round:",), repeat("")), contract.in_words(), strict=False
                )
            ),
            f"            with names, shapes and headers {down:,} and {up:,} bytes",
            "also go:    the client's id, numbers of images and their size, losses and times, a "
            "fingerprint of the partition",
            *(f"{'validation:':<11} {line}" for line in validation_in_words(config)),
            *_of_evaluation(config, height * width * channels),
            "never go:   your images, θ_i, its moving average, its optimizer's moments, the texts "
            "of errors",
            "",
            f"agreement:  {fitting}",
            "",
            "join with (SUPERLINK:PORT and ca.crt come from who runs the server; the key is your "
            "own):",
            "",
            _command(data, state_dir, client),
        ]
    )


def _of_evaluation(config: RunConfig, pixels: int) -> list[str]:
    """What evaluation rounds send."""
    evaluation, clients = config.evaluation, config.federation.clients
    if evaluation.mode == "statistics":
        first = "mean and scatter of the features of generated images and of your own; no image"
    else:
        last, between = (
            share_of_samples(count, clients)
            for count in (evaluation.samples, evaluation.samples_between)
        )
        first = (
            f"generated images: {last} at the end, {between} at evaluations before, of {pixels} "
            f"bytes each, and {evaluation.strip_steps} of a reverse process"
        )
    numbers = [
        *(["SSIM of reconstructed test images, as numbers"] if evaluation.ssim_images else []),
        *(
            ["distances from generated to your images (20 numbers)"]
            if evaluation.memorisation_quantile
            else []
        ),
        *comparison_in_words(config),
    ]
    return [f"evaluation: {first}", *(f"            {line}" for line in numbers)]


def _bytes_of_store(contract: Contract, task: Task, shared: int, exclusive: int) -> int:
    """What the site's store takes at most: its attempts, and the copy of the decoded images."""
    config = contract.config
    moments = 2 if config.training.optimizer == "adam" else 1
    attempt = exclusive * (2 + moments)  # θ_i, its moving average, its moments
    if config.training.shared_moments == "keep":
        attempt += shared * moments
    _, memory = encode_update(config, Delta(zeros_of(contract.shared)), {}, task.name, 0)
    attempt += sum(tensor.nbytes for kept in memory.values() for tensor in kept.values())
    if contract.control:
        attempt += shared  # c_i
    if config.federation.compare == "alone":
        # The model alone: weights, averages, those of its best round, moments.
        attempt += (shared + exclusive) * (3 + moments)
    # The kept ones, the ancestor of the oldest, the one that is being written before the last is
    # dropped, and that of the best round.
    images = task.train.nbytes + task.test.nbytes + task.validation.nbytes
    attempts = config.federation.keep_attempts + 2
    if config.federation.result == "best":
        attempts += 1
    return attempts * attempt + images


def _try_to_write(folder: Path) -> None:
    """Make a file in the folder and remove it; raises UserError where that does not work."""
    probe = folder / f".check-{uuid4().hex[:8]}"
    try:
        make_folder(folder)
        with probe.open("wb") as file:
            file.write(b"srfed")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the state directory {folder} cannot be written: {error.strerror or error}"
        ) from error


def _rows(label: str, images: Images, rows: int) -> dict[str, Images]:
    """Images evenly drawn from the whole, in labelled rows."""
    chosen = np.unique(np.linspace(0, len(images) - 1, rows * COLUMNS).round().astype(int))
    return {
        f"{label} {chosen[first] + 1}": images[chosen[first : first + COLUMNS]]
        for first in range(0, len(chosen), COLUMNS)
    }


def _command(data: Path, state_dir: Path, client: str) -> str:
    return " \\\n    ".join(
        [
            "python -m srfed.deploy site --superlink SUPERLINK:PORT --root-certificates ca.crt",
            f"--key site-{client}.key --client-id {client}",
            f"--data {shlex.quote(str(data))} --state-dir {shlex.quote(str(state_dir))}",
        ]
    )

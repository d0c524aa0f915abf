"""What joining is worth to an owner: its model of the federation and one of its own images alone,
asked the same questions about its held-out images.

Each client trains both under ``federation.compare: alone``, with the same budget. The figures are
the owner's: it reads them in its own folder, and they go to the server only with
``federation.compare_told``.
"""

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from srfed.data.images import Images
from srfed.evaluation.metrics.denoising_loss import (
    Losses,
    denoising_losses,
    mean_loss,
    paired_ratio,
)
from srfed.federation.flower.admission import Admitted
from srfed.federation.site import Site
from srfed.federation.updates import Memory
from srfed.federation.worker import Worker
from srfed.files import write_json
from srfed.records import Comparison
from srfed.training.alone import begin_alone, from_memory, to_memory, train_alone
from srfed.training.part import ClientState, load_tensors

MEMORY = "alone"
"""Under which name a client keeps its model alone; no step on an update is called so."""
FILE = "comparison.json"
"""In the owner's folder."""


def train_round_alone(worker: Worker, admitted: Admitted, parent: ClientState) -> dict[str, Memory]:
    """Train the owner's model alone for a round, and choose its best round so far: by the images
    set aside for that, or the last where there are none.

    Args:
        worker: whose network is free to be overwritten.
        admitted: the request to train.
        parent: what the client has kept of its last accepted round.

    Returns:
        What it keeps of this one.
    """
    config, number, task = admitted.config, admitted.request.round, admitted.task
    kept = parent.memory.get(MEMORY)
    before = from_memory(kept) if kept else begin_alone(*worker.beginning)
    trainer = worker.trainer(admitted.site)
    alone = train_alone(config.training, trainer, number, before)
    loss = None
    if len(task.validation):
        loss = mean_loss(_losses(worker, admitted, task.validation, alone.averages))
    return {MEMORY: to_memory(alone.judged(number, loss))}


def compare(
    worker: Worker,
    admitted: Admitted,
    together: tuple[Mapping[str, Tensor], ...],
    state: ClientState,
) -> Comparison | None:
    """Both models' losses on the held-out images; None where nothing is compared, before the first
    round, and where there is no held-out image.

    Args:
        worker: whose network is free to be overwritten.
        admitted: the request to evaluate.
        together: the averaged φ and θ_i.
        state: what the client has kept of its last accepted round.
    """
    kept, test = state.memory.get(MEMORY), admitted.task.test
    if not kept or not len(test):
        return None
    alone = from_memory(kept)
    first, second = (_losses(worker, admitted, test, *parts) for parts in ((alone.best,), together))
    ratio = paired_ratio([first], [second], seed=admitted.config.seed)
    return Comparison(
        alone=mean_loss(first),
        together=mean_loss(second),
        low=ratio.low,
        high=ratio.high,
        alone_round=alone.best_round,
    )


def keep_comparison(site: Site, round_number: int, comparison: Comparison) -> None:
    """Write the figures into the owner's folder; raises UserError where that cannot be."""
    figures = {"ratio": comparison.ratio, "verdict": comparison.verdict, **asdict(comparison)}
    write_json(site.folder / FILE, {"round": round_number, **figures})


def _losses(
    worker: Worker, admitted: Admitted, images: Images, *parts: Mapping[str, Tensor]
) -> Losses:
    load_tensors(worker.model, *parts)
    return denoising_losses(
        worker.denoiser(admitted.site),
        worker.objective.process,
        images,
        task=admitted.site.client,
        seed=admitted.config.seed,
    )

"""What a site's owner agrees to: proposed from a run's configuration, shown in words, kept in the
site's own state.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain, repeat
from pathlib import Path

from srfed.config import RunConfig
from srfed.config.model import exclusive_in_words
from srfed.data import accept_images, current_images
from srfed.deployment.certificates import certificate_fingerprint
from srfed.device import resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.federation.agreement import (
    AGREEMENT_FILE,
    MOST_RUNS,
    AgreedFeatures,
    AgreedShared,
    Agreement,
    LeastImages,
    RequestRefusedError,
    SiteResources,
    not_agreed,
    rules_of,
    samples_of,
    weak_numbers,
)
from srfed.federation.asked import MOST_ANSWERED
from srfed.federation.bounds import comparison_in_words, validation_in_words
from srfed.federation.coming import coming_in_words
from srfed.federation.contract import Contract
from srfed.federation.control import control_in_words
from srfed.federation.flower.admission import images_of
from srfed.federation.layout import value_bytes
from srfed.federation.mods import agreed_mod
from srfed.federation.updates import update_in_words
from srfed.files import exists
from srfed.model import build_model, build_partition
from srfed.storage.client_store import check_name
from srfed.training.minibatches import MinibatchOrder
from srfed.units import bytes_in_words


def propose(
    config: RunConfig,
    data: Path,
    state_dir: Path,
    client: str,
    *,
    certificate: Path | None = None,
    least: LeastImages | None = None,
    resources: SiteResources | None = None,
    mods: Sequence[str] = (),
    runs: int = 1,
) -> Agreement:
    """The agreement that allows a configuration, and no more than it needs.

    Args:
        config: the run's configuration.
        data: the site's images, a folder or an .npz file.
        state_dir: where the site keeps its state.
        client: the site's id.
        certificate: what the site is to trust the coordinator by (``ca.crt``); None ties it to
            none.
        least: images behind each number; None takes 20 behind feature statistics and 8 behind a
            mean.
        resources: what this machine gives; None takes one thread on a device that is found.
        mods: the owner's own, each "module:function" of an installed package, the outermost first.
        runs: how many may be begun under it.

    Raises:
        UserError: the configuration, the images or the machine do not fit, or numbers would leave
            that too few images stand behind.
    """
    check_name(client)
    agreed_mods = tuple(agreed_mod(name) for name in mods)
    least, resources = least or LeastImages(), resources or SiteResources()
    task, _ = current_images(config.data, data, client, state_dir / client)
    MinibatchOrder.of(
        config.training, len(task.train), config.training.batch_size, config.seed, client
    )
    counts, samples = (len(task.train), len(task.test)), samples_of(config)
    weak = [f"{setting}: {what}" for setting, what in weak_numbers(config, least, counts, samples)]
    if weak:
        raise UserError(
            f"too few images would stand behind what leaves {client}: {'; '.join(weak)}; allowed: "
            "another configuration, more images, or less protection with --least-statistics and "
            "--least-mean"
        )
    model = build_model(config, task.train.shape[-1])
    tensors, partition = model.state_dict(), build_partition(config, model)
    contract = Contract.of(config, partition.take_shared(tensors))
    rules = rules_of(config)
    agreement = Agreement(
        client=client,
        agreed=datetime.now(UTC).isoformat(timespec="seconds"),
        coordinator=None if certificate is None else certificate_fingerprint(certificate),
        shared=AgreedShared(
            tensors=len(partition.shared),
            bytes=sum(tensors[name].nbytes for name in partition.shared),
            bytes_down=sum(map(value_bytes, contract.training_request.values())),
            bytes_up=sum(map(value_bytes, contract.update.values())),
            bytes_control=sum(map(value_bytes, contract.control.values())) or None,
            fingerprint=partition.fingerprint(tensors),
        ),
        images=images_of(task),
        samples=samples,
        features=_features(config, resources),
        least_images=least,
        resources=resources,
        exactly=rules["exactly"],
        at_most=rules["at_most"],
        at_least=rules["at_least"],
        free=tuple(rules["free"]),
        mods=agreed_mods,
        runs=runs,
    )
    try:
        resolve_device(agreement.with_own_resources(config).resources)
    except RequestRefusedError as refusal:
        raise UserError(refusal.detail) from refusal
    return agreement


def _features(config: RunConfig, resources: SiteResources) -> AgreedFeatures | None:
    evaluation = config.evaluation
    if evaluation.mode == "samples":
        return None
    network = load_feature_network(evaluation.feature_network, resources.inception_weights)
    return AgreedFeatures(network=network.name, fingerprint=network.fingerprint)


def agree_as_rehearsed(
    config: RunConfig, data: Path, state_dir: Path, client: str, certificate: Path | None = None
) -> None:
    """Agree for a site that nobody owns: to this configuration, however few images stand behind a
    number.
    """
    resources = SiteResources(device=config.resources.device, threads=config.resources.client_cpus)
    least = LeastImages(statistics=2, mean=1)
    agreement = propose(
        config,
        data,
        state_dir,
        client,
        certificate=certificate,
        least=least,
        resources=resources,
        runs=MOST_RUNS,
    )
    agree(agreement, config, data, state_dir)


def agree(agreement: Agreement, config: RunConfig, data: Path, state_dir: Path) -> None:
    """Write an agreement into the site's state, and the images that it is about on record beside
    it.

    Raises:
        UserError: one of the two cannot be written. Without the other, the site refuses to serve.
    """
    accept_images(config.data, data, agreement.client, state_dir / agreement.client)
    agreement.save(state_dir / agreement.client)


def standing(state_dir: Path, client: str) -> Agreement | None:
    """The agreement that a site has; None where it has none. Raises UserError where it is
    damaged.
    """
    check_name(client)
    folder = state_dir / client
    return Agreement.load(folder) if exists(folder / AGREEMENT_FILE) else None


def fits(agreement: Agreement, config: RunConfig, shared: str | None = None) -> str:
    """Whether a configuration, and the φ of this fingerprint if it is known, is within an
    agreement, in one line.
    """
    try:
        agreement.admit(config)
        if shared not in (None, agreement.shared.fingerprint):
            raise not_agreed("the tensors of φ", "this srfed makes others of the same settings")
        asked, final = samples_of(config), config.federation.rounds
        agreement.admit_evaluation(config, final, asked.final, final=True)
        between = [number for number in range(1, final) if config.evaluation_due(number)][:1]
        for number in between:
            agreement.admit_evaluation(config, number, asked.between, final=False)
    except RequestRefusedError as refusal:
        return f"does NOT fit: {refusal} ({refusal.detail})"
    return "fits"


def in_words(agreement: Agreement, config: RunConfig) -> str:
    """What an agreement means, for its owner to read; ``config`` is one that fits it."""
    evaluation, training, shared = config.evaluation, config.training, agreement.shared
    exactly = agreement.exactly
    exclusive = exclusive_in_words(exactly["model.exclusive_stages"], exactly.get("model.owned"))
    images, least = agreement.images, agreement.least_images
    often = (
        f"every {evaluation.every} rounds or less often, and at the end"
        if evaluation.every
        else "at the end"
    )
    steps = (
        f"{training.local_steps} steps"
        if training.local_steps
        else f"{training.local_epochs} passes"
    )
    samples = f"{agreement.samples.final} at the end" + (
        f", {agreement.samples.between} before" if evaluation.every else ""
    )
    if agreement.features is None:
        what = f"GENERATED IMAGES ({samples}), and {evaluation.strip_steps} of a reverse process"
    else:
        what = (
            f"mean and scatter of features ({agreement.features.network} "
            f"{agreement.features.fingerprint[:12]}) of generated images ({samples}), of your "
            f"{images.training} training and {images.test} test images; no image"
        )
    numbers = [
        *(
            [
                f"SSIM of {min(evaluation.ssim_images, images.test)} reconstructed test images, a "
                "number for each timestep"
            ]
            if evaluation.ssim_images
            else []
        ),
        *(
            ["how near generated images come to yours (memorisation, 20 numbers, at the end)"]
            if evaluation.memorisation_quantile
            else []
        ),
        *comparison_in_words(config),
    ]
    own = agreement.resources
    phi = (
        f"φ, {shared.tensors} tensors, {shared.bytes:,} bytes ({bytes_in_words(shared.bytes)}), "
        f"fingerprint {shared.fingerprint[:12]}; {exclusive}"
    )
    change = []
    if config.updates.steps and (up := shared.bytes_up) is not None:
        how = update_in_words(config.updates)
        change = [f"{up:,} bytes ({bytes_in_words(up)}): the change, {how}, of"]
    come = []
    if config.updates.shared_bits is not None and (down := shared.bytes_down) is not None:
        tensors = "φ, and c of control variates" if config.training.control_variates else "φ"
        come = [
            f"  comes:       in each round {down:,} bytes ({bytes_in_words(down)}): {tensors}, "
            f"{coming_in_words(config.updates)}; to be evaluated φ comes in float32"
        ]
    control = []
    if config.training.control_variates and (up := shared.bytes_control) is not None:
        how = control_in_words(config.training)
        control = [f"{up:,} bytes ({bytes_in_words(up)}): {how}"]
    return "\n".join(
        [
            "would leave",
            *(
                f"{label:<14} {line}"
                for label, line in zip(
                    chain(("  each round:",), repeat("")), [*change, phi, *control], strict=False
                )
            ),
            "               its mean loss, and that of each quarter of the timesteps; the seconds "
            "it took",
            "               once, after a tenth of the rounds: its loss over that of a predictor "
            "that has learned nothing",
            *(
                f"  validation:  {line}"
                + (
                    f"; withheld unless {least.mean} stand behind it"
                    if config.data.validation_images < least.mean
                    else ""
                )
                for line in validation_in_words(config)
            ),
            f"  evaluation:  {often}: {what}",
            *(f"               {line}" for line in numbers),
            "  once:        your id, the numbers and the size of your images, a fingerprint of φ, "
            "srfed's version",
            "never leaves:  your images, θ_i, its moving average, its optimizer's moments, the "
            "texts of errors",
            "",
            "may be asked",
            f"  runs:        {agreement.runs}"
            + (" (more of them with --runs)" if agreement.runs == 1 else "")
            + f"; about one round at most {MOST_ANSWERED} different φ's",
            f"  training:    up to {config.federation.rounds} rounds, each of up to {steps} in "
            f"minibatches of {training.batch_size} images",
            *come,
            f"  least:       {least.statistics} images behind feature statistics, {least.mean} "
            "behind a mean",
            f"  settings:    {len(agreement.exactly)} exactly as in this configuration, "
            f"{len(agreement.at_most)} at most, {len(agreement.at_least)} at least; the file lists "
            "each",
            "  coordinator: "
            + (
                f"whose certificate has the SHA-256 {agreement.coordinator}"
                if agreement.coordinator
                else "anyone (name its certificate with --root-certificates)"
            ),
            f"  machine:     device {own.device}, {own.threads} "
            f"thread{'s' if own.threads > 1 else ''}"
            + (f", Inception weights {own.inception_weights}" if own.inception_weights else ""),
            *(
                f"{label:<14} {mod.name}, of a package with the SHA-256 {mod.fingerprint[:12]}: "
                "sees every message, and may change replies as far as the guard allows"
                for label, mod in zip(
                    chain(("  own mods:",), repeat("")), agreement.mods, strict=False
                )
            ),
        ]
    )

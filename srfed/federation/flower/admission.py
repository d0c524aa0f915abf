"""Admission: what a request may ask of this client, decided before anything is done for it.

The handler and the wire guard both begin here, so that one cannot allow what the other does not.
"""

from dataclasses import dataclass

from flwr.app import Context, Message

from srfed.config import RunConfig, parse_config_json
from srfed.data import ImageRecord, Task
from srfed.errors import UserError
from srfed.federation.agreement import (
    AGREEMENT_FILE,
    COMMAND,
    AgreedImages,
    Agreement,
    RequestRefusedError,
    not_agreed,
)
from srfed.federation.asked import Question, check_asked
from srfed.federation.flower.packing import digest_of, read_request
from srfed.federation.messages import (
    DESCRIBE,
    EVALUATE,
    IMPOSSIBLE_CONFIG,
    TRAIN,
    VALIDATE,
    Request,
)
from srfed.federation.site import Site, deployed_site, is_simulated, own_task, site_of
from srfed.files import exists
from srfed.storage.client_store import NO_PARENT


@dataclass(frozen=True)
class Admitted:
    """A request that this client serves, and what it has to do so.

    Attributes:
        request: what is asked.
        site: whose machine this is.
        config: what the client does: the request's configuration as far as it was agreed, with the
            site's own resources.
        agreement: the owner's; None in a simulation, where the run's own configuration is the
            agreement.
        task: the owner's images.
        question: what is asked, as far as it must not be asked too often; None in a simulation.
    """

    request: Request
    site: Site
    config: RunConfig
    agreement: Agreement | None
    task: Task
    question: Question | None = None


def admit(message: Message, context: Context) -> Admitted:
    """Read a request and hold it against the owner's agreement.

    Raises:
        RequestRefusedError: it asks for what is not agreed, or there is no agreement.
        UserError: the site itself is not as it should be.
    """
    request = read_request(message.content)
    kind = message.metadata.message_type
    if kind not in (DESCRIBE, TRAIN, EVALUATE, VALIDATE):
        raise RequestRefusedError("the request is of an unknown kind", f"{kind[:100]!a}")
    agreement = None
    if is_simulated(context):
        config = parse_config_json(request.config)
        site = site_of(context, config)
    else:
        site = deployed_site(context.node_config)
        agreement = agreement_of(site)
        config = agreement.admit(_asked(request))
    if request.client != site.client and not (kind == DESCRIBE and not request.client):
        raise RequestRefusedError("the request is for another client", f"for {request.client!a}")
    if kind != DESCRIBE and (request.round < 1 or request.attempt == NO_PARENT):
        raise RequestRefusedError("the request's round is impossible", f"round {request.round}")
    if agreement is not None and kind == TRAIN and request.round > config.federation.rounds:
        raise RequestRefusedError("not agreed: federation.rounds", f"round {request.round}")
    if agreement is not None and kind == EVALUATE:
        agreement.admit_evaluation(config, request.round, request.samples, request.final)
    if kind == VALIDATE and not config.validation_due(request.round):
        raise not_agreed("federation.validate_every", f"a loss after round {request.round}")
    question = None
    if agreement is not None:
        carried = digest_of(message.content.array_records)
        question = Question.of(kind, request, config.fingerprint(), carried)
        check_asked(site.folder, agreement, kind, question)
    task = own_task(config.data, site)
    if agreement is not None:
        agreement.admit_images(images_of(task))
    return Admitted(request, site, config, agreement, task, question)


def images_of(task: Task) -> AgreedImages:
    """An owner's images as an agreement has them."""
    return AgreedImages(
        training=len(task.train), test=len(task.test), fingerprint=ImageRecord.of(task).fingerprint
    )


def agreement_of(site: Site) -> Agreement:
    """The agreement of a deployed site's owner.

    Raises:
        RequestRefusedError: there is none, or it is another site's.
        UserError: the file cannot be read, or is damaged.
    """
    if not exists(site.folder / AGREEMENT_FILE):
        raise RequestRefusedError(f"no agreement: the site's owner makes one with {COMMAND}")
    agreement = Agreement.load(site.folder)
    if agreement.client != site.client:
        raise UserError(
            f"{site.folder / AGREEMENT_FILE} is the agreement of {agreement.client!r}, not of this "
            "site"
        )
    return agreement


def _asked(request: Request) -> RunConfig:
    try:
        return parse_config_json(request.config)
    except UserError as error:
        raise RequestRefusedError(IMPOSSIBLE_CONFIG, str(error)[:1000]) from error

"""What a client process builds once and uses for every message: model, partition, forward
process.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from srfed.config import RunConfig
from srfed.data.images import Images
from srfed.device import memory_layout, resolve_device
from srfed.diffusion.process import Denoiser
from srfed.errors import UserError
from srfed.evaluation.features.load import FeatureNetwork, load_feature_network
from srfed.evaluation.generation import Generated, generate_together, owners_at_once
from srfed.evaluation.task import generate_share
from srfed.federation.agreement import not_agreed
from srfed.federation.coming import decode_coming
from srfed.federation.contract import Contract
from srfed.federation.exits import exits_are_failures
from srfed.federation.flower.admission import Admitted
from srfed.federation.last_look import stays_here
from srfed.federation.layout import Layout, layout_of
from srfed.federation.messages import Request
from srfed.federation.site import Site, own_task
from srfed.federation.together import done_in_turn, waits_in_turn
from srfed.flat import copies
from srfed.model import (
    StackedModel,
    build_model,
    build_objective,
    build_partition,
    captured_forwards,
    denoiser_of_task,
    denoiser_of_tasks,
)
from srfed.networks.partition import Exclusive, Shared
from srfed.storage.checkpoint import check_tensors
from srfed.storage.client_store import NO_PARENT, ClientStore
from srfed.training.local import Job, LocalResult, LocalTrainer, train_owners
from srfed.training.part import ClientState, initial_state, load_tensors
from srfed.training.step import LocalStep


class Drawing(NamedTuple):
    """An owner's samples that are to be generated.

    Attributes:
        site: whose.
        shared, exclusive: the weights to generate with.
        samples: how many images.
        shape: H, W, C of one image.
    """

    site: Site
    shared: Shared
    exclusive: Exclusive
    samples: int
    shape: tuple[int, ...]

    @property
    def form(self) -> tuple[int, tuple[int, ...]]:
        """Equal for owners whose samples can be generated together."""
        return self.samples, self.shape


Done = LocalResult | Generated | Exception
"""What comes of a job: of a :class:`~srfed.training.local.Job`, of a :class:`Drawing`, of either
one that fails."""


class Worker:
    """One run's model on this process's device; clients that share the process take turns in it.

    Nothing in it decides a result: weights are overwritten before each use, and what a client keeps
    between rounds comes from its store.
    """

    def __init__(self, config: RunConfig, image_channels: int) -> None:
        self.config = config
        self.device = resolve_device(config.resources)
        model = build_model(config, image_channels)
        self.partition = build_partition(config, model)
        self._initial_state = initial_state(model, self.partition)
        self._initial_shared = Shared(copies(self.partition.take_shared(model.state_dict())))
        self.partition_fingerprint = self.partition.fingerprint(model.state_dict())
        self.contract = Contract.of(config, self._initial_shared)
        layout = memory_layout(config.resources)
        self.model = model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.objective = build_objective(config, self.device)
        self._step = self._new_step(None)
        # Stacks of two sizes: a whole one, and what is left over of the owners.
        self._step_of_stack = lru_cache(maxsize=2)(self._new_step)
        self._stacked_models = lru_cache(maxsize=2)(partial(StackedModel, config, self.model))
        self._forwards = captured_forwards(self.model, config.resources, self.device)
        self._trainers: dict[Site, LocalTrainer] = {}

    def trainer(self, site: Site) -> LocalTrainer:
        """The site's trainer, its images already on the device."""
        if site not in self._trainers:
            task = own_task(self.config.data, site)
            self._trainers[site] = self.new_trainer(site.client, task.train, site.index)
        return self._trainers[site]

    def new_trainer(self, client: str, images: Images, index: int) -> LocalTrainer:
        """A trainer of a client with these images, which this call puts on the device."""
        return LocalTrainer(
            self.config,
            self.model,
            self.partition,
            self.objective,
            client,
            images,
            index,
            self._step,
            self._run,
        )

    def _run(self, job: Job) -> LocalResult:
        """Carry out a client's round: by itself, or with those that are answered together with
        it.
        """
        if not waits_in_turn():
            return job.trainer.run_alone(job)
        result = done_in_turn((self, job))
        assert isinstance(result, LocalResult)
        return result

    def generate(self, drawing: Drawing) -> Generated:
        """A client's samples: by themselves, or with those of whoever is answered together with it;
        they spoil the model's weights.
        """
        if not waits_in_turn():
            return self._generate_alone(drawing)
        result = done_in_turn((self, drawing))
        assert isinstance(result, Generated)
        return result

    def _generate_alone(self, drawing: Drawing) -> Generated:
        load_tensors(self.model, drawing.shared, drawing.exclusive)
        return generate_share(
            self.denoiser(drawing.site),
            self.objective.process,
            self.config,
            task=drawing.site.client,
            shape=drawing.shape,
            samples=drawing.samples,
            give_back=self._release_training,
        )

    def _release_training(self) -> None:
        """Give back what training has taken of the device's memory beside the model."""
        self._step.release()
        self._step_of_stack.cache_clear()

    def generate_together(self, drawings: Sequence[Drawing]) -> Sequence[Done]:
        """The samples of drawings of one :meth:`form_of`, as one program. A single one is put
        beside itself, as in :meth:`run_together`.
        """
        first = drawings[0]
        if not self._stacks(first):
            return [self._generate_alone(one) for one in drawings]
        stacked = [*drawings, *drawings][: max(2, len(drawings))]
        models = self._stacked_models(len(stacked))
        for weights, one in zip(models.owners, stacked, strict=True):
            load_tensors(weights, one.shared, one.exclusive)
        self.model.eval()
        places = [one.site.index for one in stacked]
        return generate_together(
            denoiser_of_tasks(self.objective, self.model, places, models.forwards),
            self.objective.process,
            self.config.sampling,
            count=first.samples,
            shape=first.shape,
            seed=self.config.seed,
            tasks=[one.site.client for one in stacked],
            strip_steps=self.config.evaluation.strip_steps,
            give_back=self._release_training,
        )[: len(drawings)]

    def run_together(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Carry out rounds of one :attr:`~srfed.training.local.Job.form` as one program.

        A single one is put beside itself: it has the bits that it has in any stack, and which
        clients are in a stack decides nothing.
        """
        # What is lent would change with the next stack, which comes before the first is written.
        kept = [job._replace(lend=False) for job in jobs]
        stacked = [*kept, *kept][: max(2, len(kept))]
        try:
            step = self._step_of_stack(len(stacked))
            return train_owners(self.config, step, stacked)[: len(jobs)]
        except UserError:
            self._step_of_stack.cache_clear()
            raise

    def _new_step(self, stack: int | None) -> LocalStep:
        return LocalStep(self.config, self.model, self.partition, self.objective, stack)

    def form_of(self, job: Job | Drawing) -> object:
        """Equal for jobs that are done as one program."""
        if isinstance(job, Drawing) and not self._stacks(job):
            return job.site
        return type(job), job.form

    def _stacks(self, drawing: Drawing) -> bool:
        """Whether such samples are generated as one program with others' where there are any."""
        sampling, (count, shape) = self.config.sampling, drawing.form
        return owners_at_once(sampling, self.device.type, count=count, shape=shape) > 1

    @property
    def beginning(self) -> tuple[Shared, ClientState]:
        """φ_0, and the state with θ_0."""
        return self._initial_shared, self._initial_state

    def denoiser(self, site: Site) -> Denoiser:
        """E[x_0 | x_t] of the weights that the model has, in evaluation mode, told the site's place
        where that is needed.
        """
        self.model.eval()
        return denoiser_of_task(self.objective, self.model, site.index, self._forwards)

    @cached_property
    def feature_network(self) -> FeatureNetwork:
        """The run's feature network, which a client needs in ``statistics`` mode only."""
        evaluation = self.config.evaluation
        return load_feature_network(
            evaluation.feature_network, evaluation.inception_weights, self.device
        )

    def store(self, site: Site, request: Request) -> ClientStore:
        """The site's store for the request's lineage."""
        return ClientStore(
            site.state_dir, site.client, request.lineage, self.config.federation.keep_attempts
        )

    def state(self, site: Site, request: Request, *, training: bool) -> ClientState:
        """The state that the request tells the client to start from.

        Raises:
            UserError: the store has no such attempt, or one of another partition; or the round does
                not follow it.
        """
        store = self.store(site, request)
        store.check_descent(request.parent, request.round, training=training)
        if request.parent == NO_PARENT:
            return self._initial_state
        state = store.load(request.parent)
        _check_names("θ_i", state.exclusive.weights, self.partition.exclusive)
        check_tensors(
            str(store.folder), state.exclusive.weights, self._initial_state.exclusive.weights
        )
        return stays_here(state)

    def received(self, came: Mapping[str, Tensor], layout: Layout, what: str) -> dict[str, Tensor]:
        """What a request brought in place of φ, or of another ``what`` like it: decoded, where the
        layout is that of codes.

        Args:
            came: the tensors of the message.
            layout: what they must be, by name, shape and type.
            what: which they are, in words.

        Raises:
            UserError: what came is of another layout, or no server can have encoded it.
        """
        _check_names(what, came, tuple(name for name, _, _ in layout))
        agreed = set(layout)
        for name, dtype, shape in layout_of(came):
            if (name, dtype, shape) not in agreed:
                raise UserError(f"the {what} received has {name} as {dtype} {shape}")
        if layout == self.contract.shared:
            return dict(came)
        try:
            return decode_coming(self.config.updates, came, self.contract.shared)
        except ValueError as error:
            raise UserError(f"the {what} received cannot be decoded: {error}") from error


def worker_for(admitted: Admitted) -> Worker:
    """The process's worker for what was admitted; sets the threads that it runs with.

    Raises:
        RequestRefusedError: this srfed makes another φ of the agreed settings.
    """
    channels = admitted.task.train.shape[-1]
    workers = _workers(admitted.config)
    if channels not in workers:
        workers[channels] = Worker(admitted.config, channels)
    worker = workers[channels]
    torch.set_num_threads(admitted.config.resources.client_cpus)
    agreement = admitted.agreement
    if agreement is not None and worker.partition_fingerprint != agreement.shared.fingerprint:
        raise not_agreed("the tensors of φ")
    return worker


def features_for(admitted: Admitted) -> FeatureNetwork:
    """The feature network of what was admitted: loaded for an evaluation in ``statistics`` mode,
    and for nothing else.

    Raises:
        RequestRefusedError: it is not the one whose features the owner has agreed to send.
    """
    network, agreement = worker_for(admitted).feature_network, admitted.agreement
    if agreement is not None and (
        agreement.features is None or network.fingerprint != agreement.features.fingerprint
    ):
        raise not_agreed("the feature network")
    return network


def do_together(jobs: Sequence[tuple[Worker, Job | Drawing]]) -> list[Done]:
    """Do the jobs of clients that are answered together, those of one form as one program.

    Returns:
        What comes of each; the exception with which its program has failed, if it has.
    """
    forms: dict[object, list[int]] = {}
    for place, (worker, job) in enumerate(jobs):
        forms.setdefault((worker, worker.form_of(job)), []).append(place)
    results: dict[int, Done] = {}
    for places in forms.values():
        worker, members = jobs[places[0]][0], [jobs[place][1] for place in places]
        rounds = [job for job in members if isinstance(job, Job)]
        drawings = [job for job in members if isinstance(job, Drawing)]
        torch.set_num_threads(worker.config.resources.client_cpus)
        try:
            with exits_are_failures():
                found: Sequence[Done] = (
                    worker.run_together(rounds) if rounds else worker.generate_together(drawings)
                )
        except Exception as error:
            # It is each owner's answer that was in the stack; the others go on.
            found = [error] * len(places)
        results.update(zip(places, found, strict=True))
    return [results[place] for place in range(len(jobs))]


@lru_cache(maxsize=1)
def _workers(config: RunConfig) -> dict[int, Worker]:
    """One run's workers by the number of image channels; those of another run are let go."""
    return {}


def _check_names(what: str, tensors: Mapping[str, Tensor], expected: tuple[str, ...]) -> None:
    if set(tensors) != set(expected):
        raise UserError(
            f"{what} has {len(tensors)} tensors that are not the partition's {len(expected)}"
        )

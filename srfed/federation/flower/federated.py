"""A federation's rounds over any Flower grid: choose clients, send φ and each client's parent
attempt, wait a bounded time, screen the replies, aggregate, judge.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.serverapp import Grid

from srfed.cores import usable_cores
from srfed.data import Task, load_recorded_tasks, record_tasks
from srfed.data.images import CHANNELS
from srfed.data.tasks import ALLOW
from srfed.device import most_in_a_program, place_of, resolve_device
from srfed.errors import UserError
from srfed.evaluation.features.load import load_feature_network
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.evaluation.generation import owners_at_once
from srfed.evaluation.metrics.colour import colours
from srfed.evaluation.metrics.nearest_neighbour import Recogniser
from srfed.evaluation.metrics.own import OwnMetrics
from srfed.evaluation.metrics.ssim import ssim_window
from srfed.evaluation.references import RealFloor, References, Scores, score_statistics
from srfed.evaluation.report import Exchanged, Recognised, TaskReport, evaluation_record
from srfed.evaluation.shares import share_of_samples
from srfed.federation.aggregation import Aggregator, UpdateSum, aggregate, believed_counts
from srfed.federation.bounds import EvaluatePlan, TrainPlan, believed_steps
from srfed.federation.coming import encode_shared
from srfed.federation.contract import Contract
from srfed.federation.control import encode_sent
from srfed.federation.flower.clients import FlowerClients, Screened
from srfed.federation.flower.exchange import Simulated
from srfed.federation.flower.identity import kept_roster
from srfed.federation.flower.roster import Expected, Member, Roster
from srfed.federation.flower.stacking import shared_out
from srfed.federation.messages import (
    CONTROL,
    EVALUATE,
    SETS,
    SHARED,
    TRAIN,
    VALIDATE,
    Reply,
    ReplyHeader,
    Request,
)
from srfed.federation.screening import (
    EvaluateReply,
    TrainReply,
    ValidateReply,
    screen_samples,
    screen_statistics,
    screen_train,
    screen_validation,
)
from srfed.federation.updates import update_in_words
from srfed.flat import copies
from srfed.model import shared_of
from srfed.networks.partition import Control, Shared
from srfed.observer import Observer
from srfed.randomness import derive_generator
from srfed.records import EvaluationRecord, Place, RoundRecord, TaskInfo
from srfed.runs.best_round import hold_to_owners, judge_round, result_of
from srfed.runs.start import started
from srfed.storage.client_store import NO_PARENT
from srfed.storage.metrics_log import MetricsLog
from srfed.storage.run_folder import RunFolder
from srfed.storage.server_checkpoints import KnownClient, RunState, ServerCheckpoints
from srfed.training.divergence import DIVERGED, Divergence, remedy
from srfed.training.ema import round_decay, update_average
from srfed.training.optimizer import Reach, learning_rate_factor, reach_of_round
from srfed.training.part import Part
from srfed.units import printable

LEAST_WINDOW = 32
"""Simulated clients that are asked at once, at least: as many updates wait for their turn to be
added, at most.
"""


class Federated:
    """A federation as the loop's trainer (:class:`srfed.runs.trainer.Trainer`): φ is aggregated,
    and nothing else.

    Args:
        grid: where the clients are.
        run: the run's folder.
        fixed: the clients are those of a simulation; one that does not fit is not waited for.
        aggregator: makes the mean update of a round's accepted ones.
        metrics: of one's own, called at every evaluation.
        place: where simulated clients train that have processes of their own.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunFolder,
        *,
        fixed: bool = False,
        aggregator: Aggregator = UpdateSum,
        metrics: OwnMetrics | None = None,
        place: Place | None = None,
    ) -> None:
        self._grid, self._run, self._fixed, self._aggregator = grid, run, fixed, aggregator
        self._metrics, self.place = metrics, place
        self.config = run.config
        self._away: list[str] = []
        self._started = 0.0

    @property
    def tasks(self) -> list[TaskInfo]:
        """The clients that are there, in the order of their tasks."""
        members = self._roster.members.values()
        return [_info(m) for m in sorted(members, key=lambda m: m.description.index)]

    def begin(self, found: RunState | None, tell: Observer) -> RunState:
        """Meet the clients that the run begins, or goes on, with.

        Raises:
            UserError: images or clients do not fit, or too few clients came in time.
            StoppedError: the user asked to stop.
        """
        config, run = self.config, self._run
        torch.set_num_threads(config.resources.client_cpus)
        self._references = self._own_images()
        self._partition, shared = shared_of(config, self._channels())
        self._contract = Contract.of(config, shared)
        if found is None:
            shared = started(run, self._partition, shared)
            self.state = RunState(
                lineage=run.lineage,
                round=0,
                shared=Part(Shared(copies(shared)), Shared(copies(shared))),
            )
        else:
            checkpoints = ServerCheckpoints(run.server, config.federation.keep_attempts)
            checkpoints.check(found, shared)
            # A checkpoint sorts tensors by name; a message has them in the partition's order.
            ordered = self._partition.take_shared(found.shared.weights)
            self.state = replace(found, shared=replace(found.shared, weights=ordered))
            if config.training.control_variates and found.round and not found.control:
                tell.on_notice("the checkpoint has no control variate; c begins at 0")
        begun = False

        def joined(member: Member) -> None:
            if begun:
                tell.on_join(_info(member))

        self._tell = tell
        self._roster = Roster(
            self._grid,
            config,
            run.lineage,
            Expected(
                partition=self._partition.fingerprint(shared),
                clients=self._known_references(),
                known=self._known_clients(),
                shapes=self.state.shapes,
                own_shapes={task.name: task.shape for task in self._references},
                keys=kept_roster(run.path),
            ),
            joined=joined,
            notice=tell.on_notice,
        )
        self._gather()
        begun = True
        self.state = replace(self.state, known=self._roster.known, shapes=self._roster.shapes)
        training = config.training
        if (
            training.optimizer == "sgd"
            and training.gradient_clip is None
            and self._contract.reach(None) is None
        ):
            tell.on_notice(
                "training.gradient_clip is null: plain SGD can move φ as far as it likes, so "
                "updates have no bound"
            )
        # Under Ray the GPUs are the clients', and a context of the driver's would take of their
        # memory.
        driver = self._fixed and config.resources.backend == "ray"
        device = torch.device("cpu") if driver else resolve_device(config.resources)
        if self._fixed and not driver:
            self.place = place_of(config.resources, device)
        network = load_feature_network(
            config.evaluation.feature_network, config.evaluation.inception_weights, device
        )
        self._evaluation = References(network, {task.name: task.test for task in self._references})
        self._floor = RealFloor(self._evaluation, self._references)
        self._recogniser = Recogniser(self._references)
        return self.state

    def train_round(self, state: RunState, tell: Observer) -> tuple[RunState, RoundRecord]:
        """Send φ, train at the clients, aggregate what comes back; in some rounds ask all clients
        for their validation loss of what that makes.

        Raises:
            UserError: fewer accepted updates than ``federation.min_clients``; φ has values that are
                not finite, and is to come in codes.
            StoppedError: the user asked to stop.
        """
        self._tell, number = tell, state.round + 1
        self._started = time.perf_counter()
        chosen = self._choose(number)
        stacks = self._trained_together(chosen, number)
        ordered = [client for stack in stacks for client in stack] or chosen
        requests = [self._request(client, number) for client in ordered]
        sent = self._sent(number)
        self._sum = self._aggregator(self.config.federation, self._came)
        self._reaches: dict[int, Reach | None] = {}
        self._believed = self._believed_of(number, lambda plan: plan.shared_steps)
        self._believed_minibatches = self._believed_of(number, lambda plan: plan.minibatches)
        screened = self._clients(tell).ask(
            TRAIN,
            requests,
            sent,
            f"round {number}",
            self._screen_update,
            away=self._away,
            stacks=stacks,
        )
        self.state, record = self._aggregate(number, screened)
        self.state = hold_to_owners(self.state, tell)
        if self.config.validation_due(number):
            record = self._validate(record, tell)
        return self.state, record

    def evaluate(self, state: RunState, tell: Observer, *, final: bool) -> EvaluationRecord | None:
        """Judge the averaged φ with every θ_i, at the clients; at the end those of the best round,
        if that is the result. None where no client sent samples.

        Raises:
            DamagedError: the checkpoint of the best round is damaged.
            StoppedError: the user asked to stop.
        """
        self._tell, number = tell, state.round
        self._started, settings = time.perf_counter(), self.config.evaluation
        present = self._available()
        clients = self._drawn(present, settings.clients, "clients of an evaluation", number)
        self._away = self._missing_of(present)
        share = share_of_samples(
            settings.samples if final else settings.samples_between, self.config.evaluated_clients
        )

        def together(client: str) -> int:
            shape = self._roster.shapes[client]
            return owners_at_once(self.config.sampling, self._device, count=share, shape=shape)

        stacks = self._stacks(clients, self._roster.shapes.__getitem__, together)
        ordered = [client for stack in stacks for client in stack] or clients
        screened = self._clients(tell).ask(
            EVALUATE,
            [self._request(client, number, share, final) for client in ordered],
            {SHARED: self._average_judged(final)},
            f"evaluation {number}",
            self._screen_evaluation,
            away=self._away,
            stacks=stacks,
        )
        return self._judge(number, screened, final)

    def _trained_together(self, clients: Sequence[str], number: int) -> list[list[str]]:
        """The simulated clients that train together: of a round like each other's."""

        def form(client: str) -> object:
            plan = self._plan(client, number)
            return self._roster.shapes[client], plan.images, plan.minibatches

        def most(client: str) -> int:
            return most_in_a_program(self._device, self._roster.shapes[client][-1])

        return self._stacks(clients, form, most)

    def _stacks(
        self, clients: Sequence[str], form: Callable[[str], object], most: Callable[[str], int]
    ) -> list[list[str]]:
        """The simulated clients that are asked together: of one form, in the order of their ids, so
        many at most as the configuration and the form allow. Empty where each is asked by itself.
        """
        asked, members = self.config.resources.owners_stacked, self._roster.members
        if asked == 1 or any(members[client].description.index < 0 for client in clients):
            return []
        alike: dict[object, list[str]] = {}
        for client in clients:
            alike.setdefault(form(client), []).append(client)
        at_once = {key: min(asked, most(group[0])) for key, group in alike.items()}
        if set(at_once.values()) == {1}:
            return []
        return [stack for key, group in alike.items() for stack in shared_out(group, at_once[key])]

    @property
    def _device(self) -> str:
        """Where simulated clients train, "cpu" or "cuda" with the card's name."""
        return "cpu" if self.place is None else self.place.device

    def _plan(self, client: str, number: int) -> TrainPlan:
        """What a client is to do in a round."""
        return TrainPlan.of(
            self.config,
            self._partition,
            client,
            self._roster.known[client].images,
            self._minibatches(client),
            number,
        )

    def _believed_of(self, number: int, steps: Callable[[TrainPlan], int]) -> dict[str, int]:
        """What of its ``steps`` of a round is believed of each client; empty where the
        configuration says them, and with them what a client can claim.
        """
        if self.config.training.local_epochs is None or self.config.data.images_per_task:
            return {}
        known = self._roster.known
        own = {task.name: len(task.train) for task in self._references}
        return believed_steps(
            {client: steps(self._plan(client, number)) for client in known},
            [client for client, one in known.items() if one.images <= own.get(client, 0)],
        )

    def _believed_images(self, client: str, plan: TrainPlan) -> int:
        """Images seen in so many of a client's minibatches as are believed."""
        believed = self._believed_minibatches.get(client, plan.minibatches)
        if believed == plan.minibatches:
            return plan.images
        return round(plan.images * believed / plan.minibatches)

    def _sent(self, number: int) -> dict[str, Shared | Control]:
        """What goes to the clients of a round: φ, and c of control variates; notes what of φ comes
        to them.
        """
        shared, control = self.state.shared.weights, self.state.control
        sent, came = encode_shared(self.config, shared, number)
        self._came = Shared(copies(came))
        if not self.config.training.control_variates:
            return {SHARED: sent}
        return {SHARED: sent, CONTROL: encode_sent(self.config, control, shared, number)}

    def _average_judged(self, final: bool) -> Shared:
        """The averaged φ of the round at hand; at the end that of the best round, if there is
        one.
        """
        if not final:
            return self.state.shared.average
        checkpoints = ServerCheckpoints(self._run.server, self.config.federation.keep_attempts)
        best = checkpoints.load_best(self.state)
        checkpoints.check(best, self.state.shared.weights)
        return self._partition.take_shared(best.shared.average)

    def _validate(self, record: RoundRecord, tell: Observer) -> RoundRecord:
        """Ask every client that is there for its validation loss of the round at hand, and compare
        it with the best.
        """
        number, clients = record.round, self._available()
        screened = self._clients(tell).ask(
            VALIDATE,
            [self._request(client, number) for client in clients],
            {SHARED: self.state.shared.average},
            f"validation {number}",
            self._screen_validation,
            away=self._missing_of(clients),
        )
        told = {c: reply.loss for c, reply in screened.accepted.items() if reply.loss is not None}
        silent = dict.fromkeys(
            screened.accepted.keys() - told, "its owner tells no mean of so few images"
        )
        self.state, validation = judge_round(
            self.state,
            told,
            tell,
            refused=screened.refused,
            missing=dict(sorted({**screened.missing, **silent}.items())),
        )
        return replace(
            record,
            validation=validation,
            bytes_up=record.bytes_up + screened.bytes_up,
            bytes_down=record.bytes_down + screened.bytes_down,
            seconds=time.perf_counter() - self._started,
        )

    def _screen_validation(
        self, reply: Reply, header: ReplyHeader, request: Request
    ) -> ValidateReply:
        return screen_validation(reply, header, self._contract)

    def _clients(self, tell: Observer) -> FlowerClients:
        # Deployed sites work side by side, each on its own machine, so all are asked at once.
        grid = self._grid
        at_once = grid.at_once if isinstance(grid, Simulated) else usable_cores()
        lowered = self.config.fingerprint() if self._run.was_lowered else ""
        at_once *= self.config.resources.owners_stacked
        window = max(LEAST_WINDOW, 2 * at_once) if self._fixed else None
        return FlowerClients(self._grid, self.config, self._roster, tell, window, lowered)

    def _own_images(self) -> list[Task]:
        """The images that the server itself has, to judge samples by: all of them in a
        simulation.
        """
        config, run = self.config, self._run
        if config.data.dataset == "sites":
            return []
        remedy = ALLOW if self._fixed else "begin another run"
        tasks = load_recorded_tasks(
            config.data, config.federation.clients, run.images, remedy=remedy
        )
        record_tasks(run.images, tasks)
        return tasks

    def _aggregate(
        self, server_round: int, screened: Screened[TrainReply]
    ) -> tuple[RunState, RoundRecord]:
        """Form φ^{r+1} of the accepted updates."""
        training, federation = self.config.training, self.config.federation
        accepted = screened.accepted
        if len(accepted) < federation.min_clients:
            raise UserError(self._too_few(server_round, len(accepted), screened))
        mean = self._sum.mean()
        weights = mean.weights
        outcome = aggregate(federation, self.state.shared.weights, mean, self.state.optimizer)
        before = self.state.shared
        taken = {c: self._believed.get(c, accepted[c].plan.shared_steps) for c in weights}
        steps = round(sum(weights[c] * taken[c] for c in weights))
        decay = round_decay(training.ema_decay, training.ema_warmup, before.steps, steps)
        average = {name: before.average[name].clone() for name in before.weights}
        update_average(average, outcome.shared, decay)
        self.state = replace(
            self.state,
            round=server_round,
            shared=Part(Shared(outcome.shared), Shared(average), steps=before.steps + steps),
            optimizer=outcome.optimizer,
            control=mean.control,
            attempts={
                **self.state.attempts,
                **{client: screened.attempts[client] for client in accepted},
            },
            known=self._roster.known,
            shapes=self._roster.shapes,
            minibatches={
                **self.state.minibatches,
                **{
                    c: reply.plan.minibatches + (0 if reply.restarted else self._minibatches(c))
                    for c, reply in accepted.items()
                },
            },
        )
        shortened = {
            client: reply.shortened for client, reply in accepted.items() if reply.shortened < 1
        }
        steps_on_it = update_in_words(self.config.updates)
        maker = training.optimizer + (f" ({steps_on_it})" if steps_on_it else "")
        for client, factor in shortened.items():
            claimed = accepted[client].plan.shared_steps
            these = (
                "these steps"
                if taken[client] == claimed
                else f"{taken[client]} steps, which are believed of the {claimed} that its claim "
                f"of {accepted[client].plan.examples} images makes (data.images_per_task bounds it)"
            )
            self._tell.on_notice(
                f"round {server_round}: {client}: its update is {1 / factor:.3g} times as long as "
                f"{maker} usually makes one in {these}; shortened to that"
            )
        self._tell_untrained(server_round, accepted)
        restarted = [client for client, reply in accepted.items() if reply.restarted]
        for client in restarted:
            self._tell.on_notice(
                f"round {server_round}: {client} has lost its store, and begins with fresh "
                "exclusive weights"
            )
        seconds = time.perf_counter() - self._started
        images = sum(
            self._believed_images(client, reply.plan) for client, reply in accepted.items()
        )
        record = RoundRecord(
            round=server_round,
            loss=sum(weights[c] * accepted[c].loss for c in weights),
            loss_by_client={client: reply.loss for client, reply in accepted.items()},
            loss_by_quarter=_mean_by_quarter(accepted.values()),
            accepted=list(accepted),
            refused=screened.refused,
            missing=screened.missing,
            shortened=shortened,
            images=images,
            images_per_second=images / seconds,
            bytes_up=screened.bytes_up,
            bytes_down=screened.bytes_down,
            learning_rate=training.learning_rate * learning_rate_factor(self.config, server_round),
            update_norm=outcome.update_norm,
            disagreement=outcome.disagreement,
            seconds=seconds,
            restarted=restarted,
        )
        return self.state, record

    def _tell_untrained(self, server_round: int, accepted: Mapping[str, TrainReply]) -> None:
        """Say who has learned nothing by now."""
        worst = {
            client: reply.against_trivial
            for client, reply in accepted.items()
            if reply.against_trivial > 1
        }
        if worst:
            self._tell.on_notice(
                f"round {server_round}: nothing is learned yet at {', '.join(worst)}: the loss is "
                f"up to {max(worst.values()):.2g} times that of a predictor that knows one mean "
                "and "
                "one variance; if it stays so: a lower training.learning_rate, "
                "training.warmup_rounds, or a smaller training.gradient_clip"
            )

    def _minibatches(self, client: str) -> int:
        """Minibatches behind a client's accepted attempt."""
        return self.state.minibatches.get(client, 0)

    def _screen_update(self, reply: Reply, header: ReplyHeader, request: Request) -> TrainReply:
        client = request.client
        plan = self._plan(client, request.round)
        reach = self._reach(request.round, plan.shared_steps)
        usual = self._reach(request.round, self._believed.get(client, plan.shared_steps))
        if reach is not None and usual is not None:
            # What another claims of itself may have this one shortened, and never refused.
            reach = replace(reach, usual=usual.usual, usual_value=usual.usual_value)
        update = screen_train(reply, header, self._contract, plan, reach, self._came)
        self._sum.add(client, update.shared, plan.examples, update.control)
        return replace(update, shared={}, control=Control({}))

    def _reach(self, number: int, steps: int) -> Reach | None:
        """How far φ can be moved by so many steps of a round."""
        if steps not in self._reaches:
            self._reaches[steps] = reach_of_round(self.config, number, steps, self._came)
        return self._reaches[steps]

    def _judge(
        self, server_round: int, screened: Screened[EvaluateReply], final: bool
    ) -> EvaluationRecord | None:
        """Score the accepted samples; None where no client sent any."""
        if not screened.accepted:
            self._tell_unjudged(server_round, screened, final)
            return None
        judged = [self._roster.known[client] for client in screened.accepted]
        if min(sum(one.images for one in judged), sum(one.test_images for one in judged)) < 2:
            self._tell.on_notice(
                f"evaluation {server_round}: the clients that took part have together one held-out "
                "image, or one training image, and a score needs 2"
            )
            return None
        scores, floor = self._score(screened.accepted)
        reports = {
            client: TaskReport(
                None if reply.images is None else reply.images.numpy(),
                None if reply.strip is None else reply.strip.numpy(),
                reply.ssim,
                ssim_window(*self._roster.shapes[client][:2]),
                reply.audit,
                reply.comparison,
            )
            for client, reply in screened.accepted.items()
        }
        images = {c: report.images for c, report in reports.items() if report.images is not None}
        real = {task.name: task.test for task in self._references}
        return evaluation_record(
            self.config.evaluation,
            server_round,
            reports,
            scores,
            floor,
            final=final,
            seconds=time.perf_counter() - self._started,
            recognised=Recognised.of(self._recogniser, images),
            exchanged=Exchanged(
                screened.refused, screened.missing, screened.bytes_up, screened.bytes_down
            ),
            result=result_of(self.state) if final else None,
            own=None if self._metrics is None else self._metrics(real, images),
            colours=colours(real, images),
        )

    def _tell_unjudged(
        self, server_round: int, screened: Screened[EvaluateReply], final: bool
    ) -> None:
        """Say why nobody's samples came; raises UserError at the end of the run, which then has not
        ended.
        """
        reasons = {**screened.refused, **screened.missing}
        told = [f"{client}: {reason}{self._from_log(client)}" for client, reason in reasons.items()]
        text = (
            f"evaluation {server_round} has no score, as no client gave samples "
            f"({'; '.join(told) or 'none is there'})"
        )
        if final:
            raise UserError(f"{text}; it is the last, so the run has not ended")
        self._tell.on_notice(text)

    def _from_log(self, client: str) -> str:
        """Where a client that failed says why: of a simulated one, its log and the last line of
        it.
        """
        log = self._run.clients / client / "client.log"
        if not self._fixed:
            return f" (<state-dir>/{client}/client.log at its site)"
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f" ({log}: {printable(last)})" if last else ""

    def _screen_evaluation(
        self, reply: Reply, header: ReplyHeader, request: Request
    ) -> EvaluateReply:
        known, network = self._roster.known[request.client], self._evaluation.network
        plan = EvaluatePlan.of(
            self.config,
            self._roster.shapes[request.client],
            known.images,
            known.test_images,
            request.samples,
            request.final,
            compared=self.state.parent(request.client) != NO_PARENT,
        )
        if not plan.statistics:
            return screen_samples(reply, header, self._contract, plan)
        return screen_statistics(
            reply,
            header,
            self._contract,
            plan,
            network.dimension_of(plan.shape[-1]),
            network.fingerprint,
            network.highest,
        )

    def _score(self, accepted: Mapping[str, EvaluateReply]) -> tuple[Scores, float | None]:
        """The scores of the replies, and what the clients' real training images would score."""
        statistics = {
            client: reply.statistics
            for client, reply in accepted.items()
            if reply.statistics is not None
        }
        if statistics:
            generated, test, train = (
                {client: getattr(own, name) for client, own in statistics.items()} for name in SETS
            )
            test, train = self._believed_statistics(test, train)
            name = self._evaluation.network.score_name
            return score_statistics(name, generated, test), score_statistics(
                name, train, test
            ).overall
        images = {
            client: reply.images.numpy()
            for client, reply in accepted.items()
            if reply.images is not None
        }
        return self._evaluation.score(images), self._floor(images)

    def _believed_statistics(
        self, test: Mapping[str, FeatureStatistics], train: Mapping[str, FeatureStatistics]
    ) -> tuple[dict[str, FeatureStatistics], dict[str, FeatureStatistics]]:
        """Statistics of held-out and of training images, each counted as so many as are believed;
        says whose are not.
        """
        found = []
        for words, part, own in (
            ("held-out", test, {task.name: len(task.test) for task in self._references}),
            ("training", train, {task.name: len(task.train) for task in self._references}),
        ):
            claimed = {client: one.count for client, one in part.items()}
            counts = believed_counts(
                claimed,
                [client for client, count in claimed.items() if count <= own.get(client, 0)],
                self.config.federation.largest_weight,
            )
            for client, count in counts.items():
                if count < claimed[client]:
                    self._tell.on_notice(
                        f"evaluation {self.state.round}: {client}: its {claimed[client]} {words} "
                        f"images count as {count} among the others', by federation.largest_weight"
                    )
            found.append({client: one.counted_as(counts[client]) for client, one in part.items()})
        return found[0], found[1]

    def _gather(self) -> None:
        """Wait for the clients that the run begins, or goes on, with."""
        federation, roster, known = self.config.federation, self._roster, set(self.state.clients)

        def enough() -> bool:
            if len(roster) < (len(known) or federation.clients):
                return False
            present = set(roster.present)
            return present >= known if known else len(present) >= federation.clients

        def acceptable() -> bool:
            return federation.on_missing == "skip" and len(roster.present) >= federation.min_clients

        roster.gather(enough, acceptable, fixed=self._fixed, known=known)

    def _channels(self) -> Sequence[int]:
        """Of the clients' images: the numbers that there can be."""
        if self._references:
            return sorted({task.shape[-1] for task in self._references})
        channels = self.config.data.channels
        return CHANNELS if channels is None else [channels]

    def _known_clients(self) -> dict[str, KnownClient]:
        """What clients are held to; in a simulation their images are those on record, whatever they
        were before.
        """
        known = dict(self.state.known)
        for task in self._references if self._fixed else ():
            if task.name in known:
                known[task.name] = replace(
                    known[task.name], images=len(task.train), test_images=len(task.test)
                )
        return known

    def _known_references(self) -> frozenset[str] | None:
        """The clients whose samples this server can judge; None where they judge them
        themselves.
        """
        if self.config.evaluation.mode == "statistics":
            return None
        return frozenset(task.name for task in self._references)

    def _available(self) -> list[str]:
        """Whom to ask: under ``wait`` every client of the run, as all are waited for; else those
        that are there.
        """
        self._roster.look()
        self.state = replace(
            self.state, clients=tuple(sorted({*self.state.clients, *self._roster.members}))
        )
        return list(self.state.clients) if self._waits else self._roster.present

    def _choose(self, server_round: int) -> list[str]:
        """The clients of a round: all, or a seeded draw without replacement.

        Raises:
            UserError: fewer than ``federation.min_clients`` came in time.
        """
        federation = self.config.federation

        def enough() -> bool:
            return self._waits or len(self._roster.present) >= federation.min_clients

        self._roster.gather(enough, lambda: False, fixed=False)
        clients = self._available()
        drawn = self._drawn(
            clients, federation.clients_per_round, "clients of a round", server_round
        )
        # Where clients are drawn, one that is away is merely not drawn.
        self._away = self._missing_of(clients) if len(drawn) == len(clients) else []
        return drawn

    def _missing_of(self, present: Iterable[str]) -> list[str]:
        """The run's clients that are not among these."""
        there = set(present)
        return [client for client in self.state.clients if client not in there]

    def _drawn(self, clients: list[str], count: int | None, purpose: str, number: int) -> list[str]:
        """So many of the clients, in their order: a seeded draw without replacement; all of them
        for None.
        """
        generator = derive_generator(self.config.seed, purpose, number)
        drawn = torch.randperm(len(clients), generator=generator)[:count]
        return [clients[index] for index in sorted(drawn.tolist())]

    @property
    def _waits(self) -> bool:
        return self.config.federation.on_missing == "wait"

    def _request(
        self, client: str, server_round: int, samples: int = 0, final: bool = False
    ) -> Request:
        """What a client is asked, but for the name of its attempt, which it gets when it is
        asked.
        """
        best = self.state.best
        return Request(
            config=self.config.to_json(),
            lineage=self.state.lineage,
            client=client,
            round=server_round,
            attempt="",
            parent=self.state.parent(client),
            best=NO_PARENT if best is None else best.attempts.get(client, NO_PARENT),
            best_round=0 if best is None else best.round,
            samples=samples,
            final=final,
        )

    def _too_few(self, server_round: int, accepted: int, screened: Screened[TrainReply]) -> str:
        reasons = [
            f"{client}: {reason}"
            for client, reason in {**screened.refused, **screened.missing}.items()
        ]
        diverged = [c for c, why in screened.refused.items() if why.startswith(DIVERGED)]
        watched = Divergence(self.config.training, MetricsLog(self._run.metrics).rounds())
        words = (
            f"; training has diverged at {watched.in_words(diverged)}: "
            f"{remedy(self.config.training)}"
            if diverged
            else ""
        )
        return (
            f"round {server_round} has {accepted} accepted updates, federation.min_clients = "
            f"{self.config.federation.min_clients} are needed ({'; '.join(reasons[:3])}){words}"
        )


def _mean_by_quarter(replies: Iterable[TrainReply]) -> list[float]:
    """Mean loss of each quarter of the timestep range over the clients that drew one from it."""
    curves = torch.tensor([reply.loss_by_quarter for reply in replies], dtype=torch.float64)
    return curves.nanmean(dim=0).tolist()


def _info(member: Member) -> TaskInfo:
    description = member.description
    return TaskInfo(
        description.client, description.task, description.images, description.test_images
    )

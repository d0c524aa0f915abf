"""The server's strategy: FedRep's exchange of φ, on Flower's strategy interface.

One round: choose clients, send φ and each client's parent attempt, wait a bounded time, screen the
replies, aggregate, checkpoint. The next round is announced only when the last one is on disk.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol, TypeVar
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from srfed.config import RunConfig
from srfed.errors import UserError
from srfed.evaluation.central import CentralEvaluation
from srfed.federation.aggregation import aggregate, client_weights, weighted_mean
from srfed.federation.exchange import Exchange, exchange
from srfed.federation.messages import (
    EVALUATE,
    SHARED,
    SHARED_MOMENTS,
    TRAIN,
    Description,
    ReplyHeader,
    Request,
    array_record,
    message_bytes,
)
from srfed.federation.screening import (
    EvaluateReply,
    RefusedError,
    TrainReply,
    screen_evaluate,
    screen_train,
)
from srfed.federation.server_state import ServerCheckpoints, ServerState
from srfed.models.partition import Partition
from srfed.randomness import derive_generator
from srfed.reporting.records import EvaluationRecord, RoundRecord
from srfed.training.ema import round_decay, update_average
from srfed.training.optimizers import learning_rate_factor

TTL_MARGIN = 60.0
"""Seconds that a message outlives the wait for its reply, for the way back through a SuperLink."""

ReplyT = TypeVar("ReplyT", TrainReply, EvaluateReply)


class Observer(Protocol):
    """Who is told what happens: the reporting room, or a test."""

    def on_reply(self, what: str, done: int, total: int) -> None: ...

    def on_round(self, record: RoundRecord) -> None: ...

    def on_evaluation(self, record: EvaluationRecord) -> None: ...

    def on_notice(self, text: str) -> None: ...


@dataclass(frozen=True)
class Member:
    """A client of this run, and the node that it answers from."""

    node: int
    description: Description


@dataclass(frozen=True)
class _Heard(Generic[ReplyT]):
    """The replies of one exchange, screened: accepted and refused by client, and who is missing."""

    accepted: dict[str, ReplyT]
    attempts: dict[str, str]
    refused: dict[str, str]
    missing: list[str]
    bytes_up: int
    bytes_down: int


class SharedRepresentationStrategy(Strategy):
    """Aggregates φ and nothing else.

    Args:
        config: the run's configuration.
        partition: of the run's model.
        state: where the run stands.
        members: its clients, by id.
        checkpoints: where the state is kept.
        evaluation: scores the collected samples.
        floor: the score of the real training images of given clients; None where nobody has them.
        observer: told of every round and evaluation.
    """

    def __init__(
        self,
        config: RunConfig,
        partition: Partition,
        state: ServerState,
        members: Mapping[str, Member],
        checkpoints: ServerCheckpoints,
        evaluation: CentralEvaluation,
        floor: Callable[[Iterable[str]], float | None],
        observer: Observer,
    ) -> None:
        self.config = config
        # A checkpoint sorts tensors by name; a message has them in the partition's order.
        self.state = replace(state, shared={name: state.shared[name] for name in partition.shared})
        self._members = dict(sorted(members.items()))
        self._clients = {member.node: client for client, member in self._members.items()}
        self._checkpoints = checkpoints
        self._evaluation = evaluation
        self._floor = floor
        self._observer = observer
        self._exchange = Exchange({}, [])
        self._started = 0.0

    def summary(self) -> None:
        """Say nothing: the command prints the run's settings, and the run directory holds them."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left, with their evaluations.

        Args:
            grid: where the clients are.
            initial_arrays: φ of the state.
            num_rounds: the last round.
            timeout: seconds to wait for the replies of one exchange.
            train_config, evaluate_config: not sent; the run's configuration says everything.
            evaluate_fn: an evaluation of φ alone; may be None.

        Raises:
            UserError: a round had too few accepted updates, or a checkpoint cannot be written.
            StoppedError: the user asked to stop.
        """
        result = Result()
        result.arrays = initial_arrays
        for number in range(self.state.round + 1, num_rounds + 1):
            requests = self.configure_train(number, result.arrays, train_config or ConfigRecord(), grid)
            replies = self._ask(grid, requests, timeout, f"round {number}")
            arrays, metrics = self.aggregate_train(number, replies)
            if arrays is not None and metrics is not None:
                result.arrays, result.train_metrics_clientapp[number] = arrays, metrics
            if self.evaluation_due(number, num_rounds):
                metrics = self.evaluate(grid, number, timeout)
                if metrics is not None:
                    result.evaluate_metrics_clientapp[number] = metrics
            if evaluate_fn is not None and (metrics := evaluate_fn(number, result.arrays)) is not None:
                result.evaluate_metrics_serverapp[number] = metrics
        return result

    def evaluation_due(self, number: int, last: int) -> bool:
        """Whether an evaluation follows this round: every so many, and at the end."""
        every = self.config.evaluation.every
        return number > 0 and (number == last or (every > 0 and number % every == 0))

    def evaluate(self, grid: Grid, number: int, timeout: float) -> MetricRecord | None:
        """Evaluate the averaged φ of the state; None where no client sent samples."""
        arrays = array_record(self.state.shared_average)
        requests = self.configure_evaluate(number, arrays, ConfigRecord(), grid)
        return self.aggregate_evaluate(number, self._ask(grid, requests, timeout, f"evaluation {number}"))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One request for each client of the round: φ, and the attempt to start from."""
        self._started = time.perf_counter()
        records = {SHARED: arrays}
        if self.config.training.shared_moments == "average" and self.state.shared_moments:
            records[SHARED_MOMENTS] = array_record(self.state.shared_moments)
        return [self._request(TRAIN, client, server_round, records) for client in self._choose(server_round)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, form φ^{r+1}, write the checkpoint.

        Raises:
            UserError: fewer accepted updates than ``federation.min_clients``.
        """
        training, federation = self.config.training, self.config.federation
        average = training.shared_moments == "average"
        heard = self._hear(replies, partial(screen_train, shared=self.state.shared, moments=average))
        accepted = heard.accepted
        if len(accepted) < federation.min_clients:
            raise UserError(self._too_few(server_round, heard))
        weights = client_weights(federation.weights, {c: reply.examples for c, reply in accepted.items()})
        outcome = aggregate(
            federation,
            self.state.shared,
            {client: reply.shared for client, reply in accepted.items()},
            weights,
            self.state.optimizer,
        )
        steps = round(sum(weights[c] * _number(accepted[c], "shared_steps") for c in weights))
        decay = round_decay(training.ema_decay, training.ema_warmup, self.state.shared_steps, steps)
        shared_average = {name: self.state.shared_average[name].clone() for name in self.state.shared}
        update_average(shared_average, outcome.shared, decay)
        moments = {client: reply.shared_moments for client, reply in accepted.items()}
        self.state = replace(
            self.state,
            round=server_round,
            shared=outcome.shared,
            shared_average=shared_average,
            optimizer=outcome.optimizer,
            shared_moments={n: t.float() for n, t in weighted_mean(moments, weights).items()},
            shared_steps=self.state.shared_steps + steps,
            attempts={**self.state.attempts, **heard.attempts},
        )
        seconds = time.perf_counter() - self._started
        images = sum(_number(reply, "images") for reply in accepted.values())
        record = RoundRecord(
            round=server_round,
            loss=sum(weights[c] * _number(accepted[c], "loss") for c in weights),
            loss_by_client={client: _number(reply, "loss") for client, reply in accepted.items()},
            loss_by_quarter=_mean_by_quarter(accepted.values()),
            accepted=list(accepted),
            refused=heard.refused,
            missing=heard.missing,
            images=int(images),
            images_per_second=images / seconds,
            bytes_up=heard.bytes_up,
            bytes_down=heard.bytes_down,
            learning_rate=training.learning_rate * learning_rate_factor(self.config, server_round),
            update_norm=outcome.update_norm,
            disagreement=outcome.disagreement,
            seconds=seconds,
        )
        # Recorded first: a resumed run drops records of rounds that have no checkpoint, but could not
        # make up for one that is missing.
        self._observer.on_round(record)
        self._checkpoints.save(self.state)
        return array_record(self.state.shared), MetricRecord({"loss": record.loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One request for each client of the run: the averaged φ, and its share of the samples."""
        self._started = time.perf_counter()
        settings = self.config.evaluation
        final = server_round == self.config.federation.rounds
        total = settings.samples if final else settings.samples_between
        each, rest = divmod(total, len(self._members))
        return [
            self._request(EVALUATE, client, server_round, {SHARED: arrays}, each + (place < rest), final)
            for place, client in enumerate(self._members)
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Screen the samples and score them; None where no client sent any."""
        settings = self.config.evaluation
        heard = self._hear(replies, partial(screen_evaluate, shape=self.state.shape, timestep=settings.ssim_timestep))
        if not heard.accepted:
            self._observer.on_notice(f"evaluation {server_round}: no client sent samples")
            return None
        images = {client: reply.images.numpy() for client, reply in heard.accepted.items()}
        scores = self._evaluation.score(images)
        curves = {client: reply.ssim for client, reply in heard.accepted.items() if reply.ssim}
        timesteps = sorted({timestep for curve in curves.values() for timestep in curve})
        windows = [_number(reply, "ssim_window") for reply in heard.accepted.values() if reply.ssim]
        record = EvaluationRecord(
            round=server_round,
            final=server_round == self.config.federation.rounds,
            score_name=scores.name,
            score=scores.overall,
            score_by_client=scores.per_task,
            floor=self._floor(heard.accepted),
            samples=scores.samples,
            references=scores.references,
            ssim_timestep=settings.ssim_timestep,
            ssim={t: _mean([curve[t] for curve in curves.values() if t in curve]) for t in timesteps},
            ssim_by_client={client: curve[settings.ssim_timestep] for client, curve in curves.items()},
            ssim_window=int(max(windows, default=0)),
            grids={client: array[: settings.grid_columns] for client, array in images.items()},
            strips={client: reply.strip.numpy() for client, reply in heard.accepted.items()},
            refused=heard.refused,
            missing=heard.missing,
            bytes_up=heard.bytes_up,
            bytes_down=heard.bytes_down,
            seconds=time.perf_counter() - self._started,
        )
        self._observer.on_evaluation(record)
        return MetricRecord({record.score_name: record.score, **{f"ssim@{t}": v for t, v in record.ssim.items()}})

    def _choose(self, server_round: int) -> list[str]:
        """The clients of a round: all, or a seeded draw without replacement."""
        clients = list(self._members)
        count = min(self.config.federation.clients_per_round or len(clients), len(clients))
        generator = derive_generator(self.config.seed, "clients of a round", server_round)
        drawn = torch.randperm(len(clients), generator=generator)[:count]
        return [clients[index] for index in sorted(drawn.tolist())]

    def _request(
        self,
        kind: str,
        client: str,
        server_round: int,
        records: Mapping[str, ArrayRecord],
        samples: int = 0,
        final: bool = False,
    ) -> Message:
        request = Request(
            config=self.config.to_json(),
            lineage=self.state.lineage,
            round=server_round,
            attempt=f"round-{server_round:05d}-{uuid4().hex[:8]}",
            parent=self.state.parent(client),
            samples=samples,
            final=final,
        )
        content = request.to_content()
        for name, record in records.items():
            content[name] = record
        return Message(
            content,
            self._members[client].node,
            kind,
            ttl=self.config.federation.round_timeout + TTL_MARGIN,
            group_id=str(server_round),
        )

    def _ask(self, grid: Grid, messages: Iterable[Message], timeout: float, what: str) -> list[Message]:
        self._exchange = exchange(grid, messages, timeout, partial(self._observer.on_reply, what))
        return self._exchange.replies

    def _hear(self, replies: Iterable[Message], screen: Callable[..., ReplyT]) -> _Heard[ReplyT]:
        """Screen the replies of the last exchange, by client in sorted order."""
        accepted: dict[str, ReplyT] = {}
        attempts: dict[str, str] = {}
        refused: dict[str, str] = {}
        up = 0
        for reply in replies:
            asked = self._exchange.requests[reply.metadata.reply_to_message_id]
            client = self._clients[asked.metadata.dst_node_id]
            request = Request.of(asked.content)
            up += message_bytes(reply)
            header = ReplyHeader(client, request.attempt, request.round)
            extra = {"samples": request.samples} if asked.metadata.message_type == EVALUATE else {}
            try:
                accepted[client] = screen(reply, header, **extra)
                attempts[client] = request.attempt
            except RefusedError as error:
                refused[client] = str(error)
        asked_clients = {self._clients[m.metadata.dst_node_id] for m in self._exchange.requests.values()}
        return _Heard(
            accepted=dict(sorted(accepted.items())),
            attempts=attempts,
            refused=dict(sorted(refused.items())),
            missing=sorted(asked_clients - set(accepted) - set(refused)),
            bytes_up=up,
            bytes_down=sum(message_bytes(message) for message in self._exchange.requests.values()),
        )

    def _too_few(self, server_round: int, heard: _Heard[TrainReply]) -> str:
        reasons = [f"{client}: {reason}" for client, reason in heard.refused.items()]
        reasons += [f"{client}: no reply in time" for client in heard.missing]
        return (
            f"round {server_round} has {len(heard.accepted)} accepted updates, "
            f"federation.min_clients = {self.config.federation.min_clients} are needed ({'; '.join(reasons[:3])})"
        )


def _number(reply: TrainReply | EvaluateReply, name: str) -> float:
    value = reply.metrics[name]
    assert not isinstance(value, list), f"screening lets no list through as {name}"
    return float(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_by_quarter(replies: Iterable[TrainReply]) -> list[float]:
    """Mean loss of each quarter of the timestep range over the clients that drew one from it."""
    curves = torch.tensor([reply.metrics["loss_by_quarter"] for reply in replies], dtype=torch.float64)
    return curves.nanmean(dim=0).tolist()

"""What the server does in a round."""

from typing import Literal, Self

from pydantic import model_validator

from srfed.config.settings import Section, setting


class FederationConfig(Section):
    clients: int = setting(
        10, ge=1, le=10_000, description="clients of the simulation: the first n tasks"
    )
    rounds: int = setting(30, ge=1, decides="nothing", description="rounds of the whole run")
    clients_per_round: int | None = setting(
        None, ge=1, description="clients drawn in each round; null takes all of them"
    )
    min_clients: int = setting(
        1, ge=1, decides="nothing", description="fewer accepted updates than this stop the run"
    )
    on_missing: Literal["wait", "skip"] = setting(
        "skip",
        decides="nothing",
        description="a client that is away or fails: skip goes on without it, wait asks it again "
        "until round_timeout, and then stops the run",
    )
    on_lost_store: Literal["refuse", "restart"] = setting(
        "refuse",
        decides="nothing",
        description="a client whose store no longer has the attempt to go on from: refuse leaves "
        "it out until its store is back, restart lets it begin with fresh exclusive weights",
    )
    weights: Literal["uniform", "examples"] = setting(
        "uniform",
        description="weights of the clients' updates: equal, or by number of training images",
    )
    largest_weight: float = setting(
        0.8,
        gt=0,
        le=1,
        description="weights `examples`, and scores of `statistics`: the largest share that one "
        "client may have, since the number of its images is its own word; the rest goes to the "
        "others. Of n clients each can always have 1/n",
    )
    server_optimizer: Literal["average", "momentum", "adam", "extrapolate"] = setting(
        "extrapolate",
        description="what the server does with the mean update: FedAvg, FedAvgM, FedAdam, or "
        "FedExP, whose step is longer the less the clients agree",
    )
    server_learning_rate: float = setting(1.0, gt=0, description="factor on the mean update")
    server_momentum: float = setting(0.9, ge=0, lt=1, description="of FedAvgM; β1 of FedAdam")
    server_second_moment: float = setting(0.99, ge=0, lt=1, description="β2 of FedAdam")
    server_epsilon: float = setting(1e-3, gt=0, description="τ of FedAdam")
    join_timeout: float = setting(
        600.0,
        gt=0,
        decides="nothing",
        description="seconds the server waits for all clients at its start, and for min_clients "
        "before a round",
    )
    round_timeout: float = setting(
        3600.0,
        gt=0,
        decides="nothing",
        description="seconds the server waits for the replies of one round",
    )
    keep_attempts: int = setting(
        3,
        ge=2,
        decides="nothing",
        description="attempts each client, and checkpoints the server, keeps on disk",
    )

    result: Literal["last", "best"] = setting(
        "last",
        description="which round's weights are the run's result: the last one's, or those of the "
        "round with the least loss on the owners' validation images (data.validation_images)",
    )
    validate_every: int = setting(
        4,
        ge=1,
        description="result `best`: rounds between two looks at the validation images; the last "
        "round always has one",
    )

    compare: Literal["none", "alone"] = setting(
        "none",
        description="alone: in the same rounds each client also trains a model of its own images "
        "alone, with the same steps, and compares the two on its held-out images; twice the work, "
        "and two to three times what a client keeps on disk",
    )
    compare_told: bool = setting(
        True,
        description="whether the figures of `compare` go to the server; with false each owner "
        "reads "
        "its own in its folder, comparison.json",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        per_round = self.clients_per_round or self.clients
        if per_round > self.clients:
            raise ValueError(f"clients_per_round {per_round} is above clients {self.clients}")
        if self.min_clients > per_round:
            raise ValueError(
                f"min_clients {self.min_clients} is above the {per_round} clients of a round"
            )
        return self

"""What a client does in a round."""

from typing import Literal, Self

from pydantic import model_validator

from srfed.config.settings import Section, setting


class TrainingConfig(Section):
    method: Literal["federated", "pooled", "one_task", "balanced"] = setting(
        "federated",
        description="federated: srfed.simulate and deployed sites; the others are for "
        "srfed centralise, where one party has all images: pooled draws minibatches from all of "
        "them (DDPM, C-DDPM), one_task from one task at a time (SR-DDPM's Algorithm 1), balanced "
        "from every task alike",
    )
    batch_size: int = setting(32, ge=1, description="images in one local step")
    centralised_batch_size: int | None = setting(
        None,
        ge=1,
        description="images in one centralised step, over all tasks; null takes batch_size. A "
        "round has as many images as a federated one: clients times local_steps times batch_size",
    )
    minibatches: Literal["whole", "ragged", "continued"] = setting(
        "whole",
        description="what becomes of the images left over at the end of a pass: whole leaves them "
        "out, ragged makes a smaller batch of them, continued goes on into the next pass, so that "
        "each batch has batch_size images, even at a client with fewer",
    )
    local_steps: int | None = setting(
        12, ge=1, description="optimizer steps a round; null when local_epochs is set"
    )
    local_epochs: int | None = setting(
        None, ge=1, description="passes over the client's images a round, instead"
    )
    update: Literal["joint", "alternating", "exclusive"] = setting(
        "joint",
        description="joint: φ and θ_i in every step; alternating: first θ_i alone, then φ alone; "
        "exclusive: θ_i alone, φ stays as it is",
    )
    exclusive_steps: int | None = setting(
        None,
        ge=1,
        description="alternating: steps on θ_i a round; null takes local_steps or local_epochs",
    )
    optimizer: Literal["adam", "sgd"] = setting("adam", description="the clients' optimizer")
    learning_rate: float = setting(
        2e-3, gt=0, le=10, description="of φ, and of θ_i unless set apart"
    )
    exclusive_learning_rate: float | None = setting(
        None, gt=0, le=10, description="of θ_i; null takes learning_rate"
    )
    owned_learning_rate: float | None = setting(
        None,
        gt=0,
        le=10,
        description="of what model.owned adds to θ_i; null takes exclusive_learning_rate, then "
        "learning_rate",
    )
    learning_rate_schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant",
        description="over the rounds of the run; cosine falls from the full rate to almost 0; "
        "linear from the full rate in round 1 to learning_rate_floor in round decay_rounds, and "
        "stays there",
    )
    learning_rate_floor: float = setting(
        0.02, ge=0, lt=1, description="linear: where the fall ends, as a fraction of the full rate"
    )
    decay_rounds: int | None = setting(
        None,
        ge=1,
        description="linear: rounds of the fall, so that a run can be prolonged at the last rate; "
        "null takes federation.rounds. Round 1 has the full rate even where it is the only one",
    )
    warmup_rounds: int = setting(
        0,
        ge=0,
        description="first rounds in which the rates rise in equal steps to what the schedule says",
    )
    proximal: float = setting(
        0.0,
        ge=0,
        description="FedProx's μ: each step pulls φ back to the round's first φ, by μ times the "
        "distance",
    )
    control_variates: bool = setting(
        False,
        description="SCAFFOLD, for φ alone: to each clipped gradient the mean over the clients of "
        "the last round's mean gradients is added, and the client's own one taken away; needs "
        "update joint",
    )
    gradient_clip: float | None = setting(
        1.0, gt=0, description="largest gradient norm of one step; null: no clipping"
    )
    shared_moments: Literal["reset", "keep"] = setting(
        "keep",
        description="Adam's moments of φ between rounds: start afresh, or stay at the client",
    )
    ema_decay: float = setting(
        0.995, ge=0, lt=1, description="decay per local step of the averaged weights"
    )
    ema_warmup: bool = setting(
        True, description="cap the decay at (1 + step) / (10 + step), so that early weights fade"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                f"set exactly one of local_steps (now {self.local_steps}) and local_epochs (now "
                f"{self.local_epochs}); the other is null"
            )
        if self.exclusive_steps is not None and self.update != "alternating":
            raise ValueError(f"exclusive_steps {self.exclusive_steps} needs update: alternating")
        if self.decay_rounds is not None and self.learning_rate_schedule != "linear":
            raise ValueError(
                f"decay_rounds {self.decay_rounds} needs learning_rate_schedule: linear, not "
                f"{self.learning_rate_schedule}; allowed: null"
            )
        if self.control_variates:
            self._check_control()
        if self.method != "federated":
            self._check_centralised()
        elif self.centralised_batch_size is not None:
            raise ValueError(
                f"centralised_batch_size {self.centralised_batch_size} needs a centralised method"
            )
        return self

    def _check_control(self) -> None:
        for key, value, only in (
            ("update", self.update, "joint"),
            ("proximal", self.proximal, 0.0),
        ):
            if value != only:
                raise ValueError(f"control_variates true needs {key} {only}, not {value}")

    def _check_centralised(self) -> None:
        if self.local_steps is None:
            raise ValueError(
                f"local_epochs {self.local_epochs} needs method federated; allowed: local_steps"
            )
        for key, value, only in (
            ("update", self.update, "joint"),
            ("shared_moments", self.shared_moments, "keep"),
            ("proximal", self.proximal, 0.0),
            ("control_variates", self.control_variates, False),
        ):
            if value != only:
                raise ValueError(
                    f"{key} {value} means nothing under method {self.method}; allowed: {only}"
                )

"""What becomes of φ before it comes to a client, and of the client's update Δ_i before it goes."""

import json
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from srfed.config.choices import UPDATE_STEPS
from srfed.config.settings import Section, setting

if TYPE_CHECKING:
    StepName = str
else:
    StepName = UPDATE_STEPS.names


class UpdatesConfig(Section):
    steps: tuple[StepName, ...] = setting(
        (),
        description="what a client does to its update Δ_i before it travels, in this order; empty "
        "sends φ_i itself",
    )
    clip_norm: float = setting(
        1.0, gt=0, description="step clip: the largest norm of an update; longer ones are shortened"
    )
    quantise_bits: Literal[8, 4] = setting(
        8,
        description="step quantise: bits of each value that travels; what rounding takes away is "
        "kept at the client, and added to its next update",
    )
    shared_bits: Literal[8, 4] | None = setting(
        None,
        description="bits of each value of φ, and of c of control variates, that come to a client "
        "to be trained; null: float32. The client trains from what the codes stand for, and sends "
        "the change from there; the server keeps φ as it is",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = [name for name in self.steps if name in UPDATE_STEPS]
        allowed = [name for name in UPDATE_STEPS if name in self.steps]
        if known != allowed or len({*self.steps}) < len(self.steps):
            raise ValueError(
                f"steps {json.dumps(self.steps)} is not allowed; allowed: each step once, in the "
                f"order {json.dumps(allowed)}"
            )
        return self

"""Where and how a run computes."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from srfed.config.settings import Section, setting
from srfed.units import printable


class ResourcesConfig(Section):
    backend: Literal["ray", "inline"] = setting(
        "ray",
        decides="nothing",
        description="ray: clients in parallel processes; inline: one after the other in this "
        "process",
    )
    ray_address: str | None = setting(
        None,
        decides="nothing",
        description="Ray cluster to join, host:port or auto (the one that this machine is a node "
        "of), with its token in RAY_AUTH_TOKEN; null starts a Ray of the run's own",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        description="auto takes CUDA where there is one (under Ray: unless client_gpus is 0)",
    )
    cpus: int | None = setting(
        None,
        ge=1,
        decides="nothing",
        description="cores for all clients together; null takes every core (with ray_address: of "
        "the cluster)",
    )
    client_cpus: int = setting(1, ge=1, description="cores, and so threads, of one client")
    client_gpus: float | None = setting(
        None,
        ge=0,
        le=1,
        decides="nothing",
        description="share of a GPU for one client under Ray, e.g. 0.25; null: equal shares, "
        "larger where a step takes more memory",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = setting(
        "float32",
        description="arithmetic of forward and backward passes; tf32 and bfloat16 need CUDA",
    )
    deterministic: bool = setting(
        True,
        description="let a GPU use only algorithms that repeat themselves bit by bit; a CPU's "
        "always do",
    )
    stack: Literal["auto"] | Annotated[int, Field(ge=1)] = setting(
        "auto",
        description="simulated clients that train together as one program, at most: faster for "
        "small networks and batches, with other last bits than 1, the same for every number above "
        "1 on a CPU; auto is 1",
    )
    channels_last: bool = setting(
        False, description="NHWC memory layout, faster on recent GPUs; not of a stack's weights"
    )

    @property
    def owners_stacked(self) -> int:
        """How many clients train as one program, at most."""
        return 1 if self.stack == "auto" else self.stack

    @field_validator("device", mode="before")
    @classmethod
    def _refuse_mps(cls, value: object) -> object:
        if value == "mps":
            raise ValueError(
                '"mps" is not allowed, as coefficients of the process are float64 on the device, '
                "and Apple's GPUs have none; allowed: auto | cpu | cuda"
            )
        return value

    @field_validator("ray_address")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value in (None, "auto"):
            return value
        found = re.fullmatch(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", value)
        if found is None or not 1 <= int(found[1]) <= 65_535:
            raise ValueError(
                f'"{printable(value)}" is no address of a Ray cluster; allowed: null | auto | '
                "host:port, as `ray start --head` prints it"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ray_address is not None and self.backend != "ray":
            raise ValueError("ray_address needs backend ray; allowed: null, or backend = ray")
        if self.cpus is not None and self.client_cpus > self.cpus:
            raise ValueError(f"client_cpus {self.client_cpus} is above cpus {self.cpus}")
        if self.precision != "float32" and self.device == "cpu":
            raise ValueError(
                f"precision {self.precision} needs device cuda; a CPU has none, or a slow one"
            )
        return self

"""The network and its partition: a section for each network that srfed has, and one for anybody's
own.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from srfed.config.choices import NETWORKS, OWN
from srfed.config.settings import Section, setting

STAGES = 4
"""Resolution stages of the UNet (the paper's "four layers")."""


Option = bool | int | float | str | tuple[bool | int | float | str, ...] | None


def _pairs(options: Any) -> Any:
    """A mapping as a sorted tuple of pairs, which can be a key; anything else is pydantic's to
    refuse.
    """
    if not isinstance(options, Mapping):
        return options
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(options.items())
    )


Options = Annotated[
    tuple[tuple[str, Option], ...],
    BeforeValidator(_pairs),
    PlainSerializer(dict),
    WithJsonSchema({"type": "object"}),
]


def _check_patterns(stages: object) -> None:
    if isinstance(stages, tuple) and not (stages and all(stages)):
        raise ValueError("exclusive_stages has an empty pattern; write `none` to share everything")


class UNetConfig(Section):
    network: Literal["unet"] = setting(
        "unet",
        description='the network: "unet", or "module:Class" of your own '
        "(srfed.networks.network.Network), which takes exclusive_stages and options alone",
    )
    channels: Annotated[
        tuple[Annotated[int, Field(ge=4, le=4096)], ...],
        Field(min_length=STAGES, max_length=STAGES),
    ] = setting((32, 64, 64, 64), description="channels of the four stages, outermost first")
    blocks_per_stage: int = setting(
        1, ge=1, le=8, description="residual blocks in each down and each up stage"
    )
    attention_stages: tuple[Annotated[int, Field(ge=0, lt=STAGES)], ...] = setting(
        (3,),
        description="stages (0 is the outermost) with self-attention; the bottleneck always has it",
    )
    attention_head_channels: int = setting(32, ge=4, description="channels of one attention head")
    groups: int = setting(
        8, ge=1, description="groups of each GroupNorm; must divide every entry of channels"
    )
    dropout: float = setting(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
    exclusive_stages: (
        Literal["none", "io", "all"]
        | Annotated[int, Field(strict=True, ge=1, le=STAGES)]
        | tuple[str, ...]
    ) = setting(
        2,
        description="the partition: none shares all (FedAvg), io keeps stem and head at the "
        "client, k in 1..4 the k outermost stages too, all shares nothing; or a list of "
        "module-name patterns such as 'up.0.*'",
    )

    owned: tuple[Literal["vector", "film"], ...] = setting(
        (),
        description="small parts that are in each θ_i beside exclusive_stages, whatever that says, "
        "and start at zero: vector, added to the timestep's embedding; film, a scale and a shift "
        "of each channel, added in each residual block",
    )
    task_embedding: Literal["none", "shared"] = setting(
        "none",
        description="tell the network its task beside the timestep: shared, a table over all tasks "
        "in φ (C-DDPM, conditional FedAvg)",
    )
    zero_head: bool = setting(
        False, description="start the output convolution at zero, as many networks of the field do"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for count in self.channels:
            if count % self.groups:
                raise ValueError(f"groups {self.groups} does not divide channels entry {count}")
            if count == self.groups:
                # At 1 x 1 pixel a group of one channel is a single value, which normalisation makes
                # 0.
                raise ValueError(
                    f"groups {self.groups} leaves one channel to a group at channels entry {count}"
                )
        for stage in {*self.attention_stages, STAGES - 1}:
            count = self.channels[stage]
            if count % min(count, self.attention_head_channels):
                raise ValueError(
                    f"attention_head_channels {self.attention_head_channels} does not divide the "
                    f"{count} channels of stage {stage}"
                )
        _check_patterns(self.exclusive_stages)
        if len({*self.owned}) < len(self.owned):
            raise ValueError(f"owned {json.dumps(self.owned)} names a part twice; allowed: once")
        return self

    @field_validator("task_embedding", mode="before")
    @classmethod
    def _moved(cls, embedding: object) -> object:
        if embedding == "exclusive":
            raise ValueError("exclusive is no value any more; write model.owned: [vector]")
        return embedding

    @field_validator("network", mode="before")
    @classmethod
    def _known(cls, network: object) -> object:
        if network not in NETWORKS:
            raise ValueError(
                f"network {network!r} is unknown; allowed: {', '.join(NETWORKS)}, or module:Class"
            )
        return network

    @property
    def draws(self) -> bool:
        """Whether a forward pass in training draws at random."""
        return self.dropout > 0


class OwnNetworkConfig(Section):
    """Settings of a network that srfed has not."""

    network: str = setting(pattern=OWN, description="module:Class")
    exclusive_stages: (
        Literal["none", "io", "all"] | Annotated[int, Field(strict=True, ge=1)] | tuple[str, ...]
    ) = setting(1, description="the partition, of the network's own shells")
    options: Options = setting(
        (), description="names and values for the constructor of a network of your own"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_patterns(self.exclusive_stages)
        return self

    @property
    def draws(self) -> bool:
        """Whether a forward pass in training draws at random: it may."""
        return True

    @property
    def owned(self) -> None:
        """What it owns, its class alone knows."""
        return None

    @property
    def task_embedding(self) -> Literal["none"]:
        """srfed tells a network of one's own no task by a setting."""
        return "none"


def exclusive_in_words(stages: object, owned: Sequence[str] | None) -> str:
    """What ``exclusive_stages`` and ``owned`` make exclusive."""
    return f"exclusive stages {stages}" + (f", own {' and '.join(owned)}" if owned else "")


def _kind(section: Any) -> str:
    """Which of the sections a value is."""
    named = (
        section.get("network") if isinstance(section, Mapping) else getattr(section, "network", "")
    )
    return "own" if isinstance(named, str) and ":" in named else "unet"


SECTIONS: Mapping[str, type[Section]] = {"unet": UNetConfig, "own": OwnNetworkConfig}
"""By the name that an error's path has for them."""
ModelConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[OwnNetworkConfig, Tag("own")],
    Discriminator(_kind),
]

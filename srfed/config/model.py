"""The UNet and its partition."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from srfed.config.settings import Section, setting

STAGES = 4
"""Resolution stages of the UNet (the paper's "four layers")."""


class ModelConfig(Section):
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

    task_embedding: Literal["none", "shared", "exclusive"] = setting(
        "none",
        description="tell the network its task beside the timestep: shared, a table over all tasks "
        "in φ (C-DDPM, conditional FedAvg); exclusive, one vector in each θ_i, which scales and "
        "shifts the core's features",
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
        stages = self.exclusive_stages
        if isinstance(stages, tuple) and not (stages and all(stages)):
            raise ValueError(
                "exclusive_stages has an empty pattern; write `none` to share everything"
            )
        return self

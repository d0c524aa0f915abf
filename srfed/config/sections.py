"""Every setting, declared once: type, range, default and meaning.

The defaults are the embedded digits' experiment, ``configs/digits.yaml``.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from srfed.config.yaml import Dumper

DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "npz", "folder", "sites"
]
STAGES = 4
"""Resolution stages of the UNet (the paper's "four layers")."""


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    dataset: DatasetName = Field(
        "digits",
        description="where a simulation's tasks, and the server's reference images, come from; "
        "`sites`: nobody but the deployed sites has images",
    )
    dir: str = Field(
        "",
        description="root of the torchvision sets (or of cifar10_500.npz / cifar100_500.npz); the "
        ".npz file of `npz`; the folder of task folders of `folder`",
    )
    images_per_task: int | None = Field(
        None,
        ge=1,
        description="training images of each task, the first in file order; null takes all",
    )
    image_size: int | None = Field(
        None,
        ge=5,
        le=512,
        description="resize the short side to this (antialiased) and crop the centre; null keeps "
        "the images' size",
    )
    channels: Literal[1, 3] | None = Field(
        None, description="convert images to grey (1) or RGB (3); null keeps what the data has"
    )
    intensity: Literal["per_image"] | tuple[float, float] = Field(
        "per_image",
        description="what becomes black and white in grey pictures of 16 bits, 32 bits or floats: "
        "per_image, each picture's own least and greatest value; or one range for all, [low, "
        "high], which keeps what a value means",
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share held out as test images where there is no test split: of published sets "
        "the end, of `npz`, `folder` and sites those images whose content says so, about so many",
    )
    horizontal_flip: bool = Field(False, description="mirror half of the training images at random")

    @field_validator("channels", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: object) -> object:
        if isinstance(value, bool):  # Python's True equals 1, so the Literal would take it
            raise ValueError(f"{json.dumps(value)} is not allowed; allowed: 1 | 3 | null")
        return value

    @field_validator("intensity")
    @classmethod
    def _check_range(cls, value: str | tuple[float, float]) -> str | tuple[float, float]:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(
                f"{json.dumps(value)} is not allowed; allowed: [low, high] with low below high, "
                "per_image"
            )
        return value


class DiffusionConfig(Section):
    timesteps: int = Field(500, ge=2, le=10_000, description="T, the length of the diffusion")
    schedule: Literal["linear", "cosine"] = Field("linear", description="how β_t grows")
    beta_start: float = Field(
        1e-4, ge=1e-9, lt=1, description="β_1 of the linear schedule, before scaling"
    )
    beta_end: float = Field(
        0.02, gt=0, lt=1, description="β_T of the linear schedule, before scaling"
    )
    beta_scale: Literal["none", "match_1000"] = Field(
        "match_1000",
        description="match_1000 multiplies the linear β by 1000/T, so that x_T is noise for every "
        "T",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        scale = 1000 / self.timesteps if self.beta_scale == "match_1000" else 1.0
        if self.schedule == "linear" and self.beta_end * scale >= 1:
            raise ValueError(
                f"beta_end {self.beta_end} times 1000/T = {self.beta_end * scale:.3g} reaches 1; "
                "allowed: a larger timesteps, a smaller beta_end, or beta_scale none"
            )
        if self.schedule == "linear":
            shares = [i / (self.timesteps - 1) for i in range(self.timesteps)]
            betas = [
                scale * (self.beta_start * (1 - share) + self.beta_end * share) for share in shares
            ]
            if sum(math.log1p(-beta) for beta in betas) < math.log(1e-30):
                raise ValueError(
                    f"beta_end {self.beta_end} over {self.timesteps} timesteps leaves ᾱ_T below "
                    "1e-30, too little to predict x_0 from; allowed: a smaller beta_end"
                )
        return self


class ModelConfig(Section):
    channels: Annotated[
        tuple[Annotated[int, Field(ge=4, le=4096)], ...],
        Field(min_length=STAGES, max_length=STAGES),
    ] = Field((32, 64, 64, 64), description="channels of the four stages, outermost first")
    blocks_per_stage: int = Field(
        1, ge=1, le=8, description="residual blocks in each down and each up stage"
    )
    attention_stages: tuple[Annotated[int, Field(ge=0, lt=STAGES)], ...] = Field(
        (3,),
        description="stages (0 is the outermost) with self-attention; the bottleneck always has it",
    )
    attention_head_channels: int = Field(32, ge=4, description="channels of one attention head")
    groups: int = Field(
        8, ge=1, description="groups of each GroupNorm; must divide every entry of channels"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
    exclusive_stages: (
        Literal["none", "io", "all"]
        | Annotated[int, Field(strict=True, ge=1, le=STAGES)]
        | tuple[str, ...]
    ) = Field(
        2,
        description="the partition: none shares all (FedAvg), io keeps stem and head at the "
        "client, k in 1..4 the k outermost stages too, all shares nothing; or a list of "
        "module-name patterns such as 'up.0.*'",
    )

    task_embedding: Literal["none", "shared", "exclusive"] = Field(
        "none",
        description="tell the network its task beside the timestep: shared, a table over all tasks "
        "in φ (C-DDPM, conditional FedAvg); exclusive, one vector in each θ_i, which scales and "
        "shifts the core's features",
    )
    zero_head: bool = Field(
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


class TrainingConfig(Section):
    method: Literal["federated", "pooled", "one_task", "balanced"] = Field(
        "federated",
        description="federated: srfed.simulate and deployed sites; the others are for "
        "srfed centralise, where one party has all images: pooled draws minibatches from all of "
        "them (DDPM, C-DDPM), one_task from one task at a time (SR-DDPM's Algorithm 1), balanced "
        "from every task alike",
    )
    batch_size: int = Field(32, ge=1, description="images in one local step")
    central_batch_size: int | None = Field(
        None,
        ge=1,
        description="images in one centralised step, over all tasks; null takes batch_size. A "
        "round has as many images as a federated one: clients times local_steps times batch_size",
    )
    drop_last: bool = Field(
        True, description="leave out the last, smaller batch of each pass over the images"
    )
    across_passes: bool = Field(
        False,
        description="let a batch run on into the next pass over the images, so that each has "
        "batch_size of them, even at a client with fewer; drop_last then has no meaning",
    )
    local_steps: int | None = Field(
        12, ge=1, description="optimizer steps a round; null when local_epochs is set"
    )
    local_epochs: int | None = Field(
        None, ge=1, description="passes over the client's images a round, instead"
    )
    update: Literal["joint", "alternating", "exclusive"] = Field(
        "joint",
        description="joint: φ and θ_i in every step; alternating: first θ_i alone, then φ alone; "
        "exclusive: θ_i alone, φ stays as it is",
    )
    exclusive_steps: int | None = Field(
        None,
        ge=1,
        description="alternating: steps on θ_i a round; null takes local_steps or local_epochs",
    )
    optimizer: Literal["adam", "sgd"] = Field("adam", description="the clients' optimizer")
    learning_rate: float = Field(2e-3, gt=0, le=10, description="of φ, and of θ_i unless set apart")
    exclusive_learning_rate: float | None = Field(
        None, gt=0, le=10, description="of θ_i; null takes learning_rate"
    )
    learning_rate_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="over the rounds of the run; cosine falls from the full rate to almost 0",
    )
    proximal: float = Field(
        0.0,
        ge=0,
        description="FedProx's μ: each step pulls φ back to the round's first φ, by μ times the "
        "distance",
    )
    gradient_clip: float | None = Field(
        1.0, gt=0, description="largest gradient norm of one step; null: no clipping"
    )
    shared_moments: Literal["reset", "keep", "average"] = Field(
        "keep",
        description="Adam's moments of φ between rounds: start afresh, stay at the client, or "
        "averaged by the server",
    )
    ema_decay: float = Field(
        0.995, ge=0, lt=1, description="decay per local step of the averaged weights"
    )
    ema_warmup: bool = Field(
        True, description="cap the decay at (1 + step) / (10 + step), so that early weights fade"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError(
                f"set exactly one of local_steps (now {self.local_steps}) and local_epochs (now "
                f"{self.local_epochs}); the other is null"
            )
        if self.shared_moments == "average" and self.optimizer != "adam":
            raise ValueError(
                f"shared_moments average needs optimizer adam; {self.optimizer} has no moments"
            )
        if self.exclusive_steps is not None and self.update != "alternating":
            raise ValueError(f"exclusive_steps {self.exclusive_steps} needs update: alternating")
        if self.method != "federated":
            self._check_centralised()
        elif self.central_batch_size is not None:
            raise ValueError(
                f"central_batch_size {self.central_batch_size} needs a centralised method"
            )
        return self

    def _check_centralised(self) -> None:
        if self.local_steps is None:
            raise ValueError(
                f"local_epochs {self.local_epochs} needs method federated; allowed: local_steps"
            )
        for key, value, only in (
            ("update", self.update, "joint"),
            ("shared_moments", self.shared_moments, "keep"),
            ("proximal", self.proximal, 0.0),
        ):
            if value != only:
                raise ValueError(
                    f"{key} {value} means nothing under method {self.method}; allowed: {only}"
                )


class FederationConfig(Section):
    clients: int = Field(
        10, ge=1, le=10_000, description="clients of the simulation: the first n tasks"
    )
    rounds: int = Field(30, ge=1, description="rounds of the whole run")
    clients_per_round: int | None = Field(
        None, ge=1, description="clients drawn in each round; null takes all of them"
    )
    min_clients: int = Field(1, ge=1, description="fewer accepted updates than this stop the run")
    on_missing: Literal["wait", "skip"] = Field(
        "skip",
        description="a client that is away or fails: skip goes on without it, wait asks it again "
        "until round_timeout, and then stops the run",
    )
    weights: Literal["uniform", "examples"] = Field(
        "uniform",
        description="weights of the clients' updates: equal, or by number of training images",
    )
    largest_weight: float = Field(
        0.8,
        gt=0,
        le=1,
        description="weights `examples`: the largest share that one client may have, since the "
        "number of its images is its own word; the rest goes to the others. Of n clients each can "
        "always have 1/n",
    )
    server_optimizer: Literal["average", "momentum", "adam", "extrapolate"] = Field(
        "extrapolate",
        description="what the server does with the mean update: FedAvg, FedAvgM, FedAdam, or "
        "FedExP, whose step is longer the less the clients agree",
    )
    server_learning_rate: float = Field(1.0, gt=0, description="factor on the mean update")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="of FedAvgM; β1 of FedAdam")
    server_second_moment: float = Field(0.99, ge=0, lt=1, description="β2 of FedAdam")
    server_epsilon: float = Field(1e-3, gt=0, description="τ of FedAdam")
    join_timeout: float = Field(
        600.0,
        gt=0,
        description="seconds the server waits for all clients at its start, and for min_clients "
        "before a round",
    )
    round_timeout: float = Field(
        3600.0, gt=0, description="seconds the server waits for the replies of one round"
    )
    keep_attempts: int = Field(
        3, ge=2, description="attempts each client, and checkpoints the server, keeps on disk"
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


class SamplingConfig(Section):
    sampler: Literal["ddim", "ancestral"] = Field(
        "ddim", description="DDIM, or Algorithm 2 over all T timesteps"
    )
    steps: int = Field(25, ge=1, description="DDIM's steps; ancestral sampling always takes T")
    eta: float = Field(
        1.0, ge=0, le=1, description="DDIM's noise: 0 is deterministic, 1 is like ancestral"
    )
    variance: Literal["beta", "posterior"] = Field(
        "beta", description="σ_t² of ancestral sampling: β_t or β̃_t"
    )
    clip: bool = Field(True, description="clamp each predicted x_0 to [-1, 1]")
    batch_size: int = Field(256, ge=1, description="images sampled at once")


class EvaluationConfig(Section):
    mode: Literal["samples", "moments"] = Field(
        "samples",
        description="samples: generated images go to the server, which scores them; moments: each "
        "client sends mean and scatter of their features and of its own images' features, and no "
        "image leaves it",
    )
    every: int = Field(
        10, ge=0, description="rounds between evaluations; 0 evaluates at the end only"
    )
    samples: int = Field(
        1000,
        ge=2,
        description="generated images scored at the end, in equal shares of all tasks, rounded up",
    )
    samples_between: int = Field(
        200, ge=2, description="generated images scored at evaluations before the end"
    )
    feature_network: Literal["embedded", "inception"] = Field(
        "embedded",
        description="network whose features are compared; `inception` gives the standard FID",
    )
    inception_weights: str = Field(
        "",
        description="file with the 2015-12-05 Inception weights; empty downloads and verifies them "
        "on first use",
    )
    ssim_images: int = Field(
        16, ge=0, description="test images a client reconstructs for SSIM; 0 switches it off"
    )
    ssim_timestep: int = Field(50, ge=1, description="t*, the timestep of the headline SSIM-rec@t*")
    ssim_curve: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 25, 50, 100), description="timesteps of the SSIM-rec curve, measured at the end"
    )
    memorisation_quantile: float = Field(
        0.05,
        ge=0,
        lt=0.5,
        description="q of the memorisation audit at the last evaluation: how many held-out images "
        "may be closer to a training image; 0 switches it off",
    )
    grid_columns: int = Field(12, ge=1, le=100, description="samples a task in the pictures")
    strip_steps: int = Field(
        11, ge=2, le=101, description="pictures in a reverse-process strip, x_T to x_0"
    )


class ResourcesConfig(Section):
    backend: Literal["ray", "inline"] = Field(
        "ray",
        description="ray: clients in parallel processes; inline: one after the other in this "
        "process",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto takes CUDA where there is one (under Ray: unless client_gpus is 0)",
    )
    cpus: int | None = Field(
        None, ge=1, description="cores for all clients together; null takes every core"
    )
    client_cpus: int = Field(1, ge=1, description="cores, and so threads, of one client")
    client_gpus: float | None = Field(
        None,
        ge=0,
        le=8,
        description="share of a GPU for one client under Ray, e.g. 0.25; null: equal shares",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="arithmetic of forward and backward passes; tf32 and bfloat16 need CUDA",
    )
    deterministic: bool = Field(
        True,
        description="let a GPU use only algorithms that repeat themselves bit by bit; a CPU's "
        "always do",
    )
    channels_last: bool = Field(False, description="NHWC memory layout, faster on recent GPUs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cpus is not None and self.client_cpus > self.cpus:
            raise ValueError(f"client_cpus {self.client_cpus} is above cpus {self.cpus}")
        if self.precision != "float32" and self.device == "cpu":
            raise ValueError(
                f"precision {self.precision} needs device cuda; a CPU has none, or a slow one"
            )
        return self


class RunConfig(Section):
    """Everything that decides a run's result, and nothing else."""

    name: str = Field(
        "digits",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="first part of the run's folder",
    )
    seed: int = Field(0, ge=0, description="all randomness derives from it")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="the tasks' images")
    diffusion: DiffusionConfig = Field(
        default_factory=lambda: DiffusionConfig(), description="the forward process"
    )
    model: ModelConfig = Field(
        default_factory=lambda: ModelConfig(), description="the UNet and its partition"
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(), description="what a client does"
    )
    federation: FederationConfig = Field(
        default_factory=lambda: FederationConfig(), description="what the server does"
    )
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig(), description="the reverse process"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=lambda: EvaluationConfig(), description="what is measured"
    )
    resources: ResourcesConfig = Field(
        default_factory=lambda: ResourcesConfig(), description="where it runs"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        timesteps = self.diffusion.timesteps
        for name, values in (
            ("sampling.steps", (self.sampling.steps,)),
            ("evaluation.ssim_timestep", (self.evaluation.ssim_timestep,)),
            ("evaluation.ssim_curve", self.evaluation.ssim_curve),
        ):
            for value in values:
                if value > timesteps:
                    raise ValueError(f"{name} {value} is above diffusion.timesteps {timesteps}")
        clients = self.federation.clients
        for name in ("samples", "samples_between"):
            value = getattr(self.evaluation, name)
            if value < 2 * clients:
                raise ValueError(
                    f"evaluation.{name} {value} is below {2 * clients}, two for each of the "
                    f"{clients} clients"
                )
        self._check_method()
        if self.training.update == "exclusive" and (
            self.model.exclusive_stages == "none" and self.model.task_embedding != "exclusive"
        ):
            raise ValueError(
                "training.update exclusive trains nothing with model.exclusive_stages none"
            )
        if self.data.dataset == "sites":
            if self.model.task_embedding == "shared":
                raise ValueError(
                    "model.task_embedding shared needs numbered tasks; data.dataset sites has none"
                )
            if self.data.image_size is None or self.data.channels is None:
                raise ValueError(
                    "data.dataset sites needs data.image_size (now "
                    f"{json.dumps(self.data.image_size)}) and data.channels (now "
                    f"{json.dumps(self.data.channels)}), so that all sites' images are of one shape"
                )
            if self.evaluation.mode != "moments":
                raise ValueError(
                    f"evaluation.mode {self.evaluation.mode} needs reference images at the server, "
                    "and data.dataset sites has none; allowed: moments"
                )
        return self

    def _check_method(self) -> None:
        training, clients = self.training, self.federation.clients
        if training.method == "federated":
            return
        if training.method == "pooled" and self.model.exclusive_stages != "none":
            raise ValueError(
                f"training.method pooled has no exclusive layers, and model.exclusive_stages is "
                f"{json.dumps(self.model.exclusive_stages)}; allowed: none"
            )
        if training.method == "pooled" and self.model.task_embedding == "exclusive":
            raise ValueError(
                "training.method pooled has no exclusive layers; model.task_embedding: none or "
                "shared"
            )
        if self.federation.clients_per_round is not None:
            raise ValueError(
                "federation.clients_per_round needs training.method federated, not "
                f"{training.method}"
            )
        size = training.central_batch_size or training.batch_size
        if training.method == "balanced" and size % clients:
            raise ValueError(
                f"training.central_batch_size {size} cannot be shared out evenly among {clients} "
                f"tasks; allowed: multiples of {clients}"
            )
        if (clients * (training.local_steps or 0) * training.batch_size) % size:
            raise ValueError(
                f"training.central_batch_size {size} does not divide a round's "
                f"{clients * (training.local_steps or 0) * training.batch_size} images (clients "
                "times local_steps times batch_size)"
            )

    def evaluation_due(self, round_number: int) -> bool:
        """Whether an evaluation follows this round: every so many, and at the end."""
        every, last = self.evaluation.every, self.federation.rounds
        return round_number > 0 and (
            round_number == last or (every > 0 and round_number % every == 0)
        )

    def to_json(self) -> str:
        """The whole configuration as one line of JSON, keys in declared order."""
        return self.model_dump_json()

    def to_yaml(self) -> str:
        """The whole configuration as YAML that :func:`load_config` reads back to an equal
        object.
        """
        return yaml.dump(
            json.loads(self.to_json()), Dumper=Dumper, sort_keys=False, allow_unicode=True
        )

    def decisive_settings(self) -> dict[str, Any]:
        """The settings that decide the result, by name, as JSON has them."""
        return self._decisive()

    def fingerprint(self) -> str:
        """SHA-256 over the settings that decide the result (not backend, paths, or time limits)."""
        return fingerprint_of(self._decisive())

    def decisive_differences(self, other: "RunConfig") -> list[str]:
        """The settings that decide the result and differ, each as "section.key: own -> other"."""
        own, others = self._decisive(), other._decisive()
        return [
            f"{name}: {json.dumps(value)} -> {json.dumps(others[name])}"
            for name, value in own.items()
            if value != others[name]
        ]

    def settings(self) -> dict[str, Any]:
        """Every setting by its name, "section.key" or "seed", as JSON has it."""
        content = json.loads(self.to_json())
        flat = {name: content.pop(name) for name in ("name", "seed")}
        return flat | {
            f"{section}.{key}": value
            for section, keys in content.items()
            for key, value in keys.items()
        }

    def _decisive(self) -> dict[str, Any]:
        free = NOT_DECISIVE
        if self.training.learning_rate_schedule != "constant":
            free = free - {"federation.rounds"}
        return {name: value for name, value in self.settings().items() if name not in free}


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 over settings by name."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


REMOVED = {
    "federation.largest_update": "an update's bound is what the clients' optimizer can do",
}
"""Settings of earlier versions, and why there is none any more."""
NOT_DECISIVE = frozenset(
    {
        "name",
        "data.dir",
        "evaluation.inception_weights",
        "federation.rounds",
        "federation.min_clients",
        "federation.on_missing",
        "federation.join_timeout",
        "federation.round_timeout",
        "federation.keep_attempts",
        "resources.backend",
        "resources.cpus",
        "resources.client_gpus",
    }
)
"""Settings that may differ between a run and its resumption: where and how long it runs, not its
bits.
"""

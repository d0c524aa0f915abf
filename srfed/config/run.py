"""A run's whole configuration.

The defaults are the embedded digits' experiment, ``configs/digits.yaml``.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Self

import yaml
from pydantic import model_validator

from srfed.config.data import DataConfig
from srfed.config.diffusion import DiffusionConfig
from srfed.config.evaluation import EvaluationConfig
from srfed.config.federation import FederationConfig
from srfed.config.model import SECTIONS, ModelConfig, UNetConfig
from srfed.config.resources import ResourcesConfig
from srfed.config.sampling import SamplingConfig
from srfed.config.settings import Decides, Section, decides, setting
from srfed.config.training import TrainingConfig
from srfed.config.updates import UpdatesConfig
from srfed.config.yaml import Dumper
from srfed.paths import absolute_path

REMOVED = {
    "federation.largest_update": "an update's bound is what the clients' optimizer can do",
    "training.drop_last": "training.minibatches is whole or ragged now",
    "training.across_passes": "training.minibatches is continued now",
    "training.central_batch_size": "it is training.centralised_batch_size now",
}
"""Settings of earlier versions, and why there is none any more."""


PATHS = (("data", "dir"), ("evaluation", "inception_weights"))
"""The settings that are paths, as section and key."""


class RunConfig(Section):
    """Everything that decides a run's result, and nothing else."""

    name: str = setting(
        "digits",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        decides="nothing",
        description="first part of the run's folder",
    )
    seed: int = setting(0, ge=0, description="all randomness derives from it")
    data: DataConfig = setting(
        default_factory=lambda: DataConfig(), description="the tasks' images"
    )
    diffusion: DiffusionConfig = setting(
        default_factory=lambda: DiffusionConfig(), description="the forward process"
    )
    model: ModelConfig = setting(
        default_factory=lambda: UNetConfig(), description="the network and its partition"
    )
    training: TrainingConfig = setting(
        default_factory=lambda: TrainingConfig(), description="what a client does"
    )
    updates: UpdatesConfig = setting(
        default_factory=lambda: UpdatesConfig(), description="how φ and a client's update travel"
    )
    federation: FederationConfig = setting(
        default_factory=lambda: FederationConfig(), description="what the server does"
    )
    sampling: SamplingConfig = setting(
        default_factory=lambda: SamplingConfig(), description="the reverse process"
    )
    evaluation: EvaluationConfig = setting(
        default_factory=lambda: EvaluationConfig(), description="what is measured"
    )
    resources: ResourcesConfig = setting(
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
        if (drawn := self.evaluation.clients) and drawn > self.federation.clients:
            raise ValueError(
                f"evaluation.clients {drawn} is above federation.clients {self.federation.clients}"
            )
        clients = self.evaluated_clients
        for name in ("samples", "samples_between"):
            value = getattr(self.evaluation, name)
            if value < 2 * clients:
                raise ValueError(
                    f"evaluation.{name} {value} is below {2 * clients}, two for each of the "
                    f"{clients} clients"
                )
        if self.federation.result == "best" and not self.data.validation_images:
            raise ValueError(
                f"federation.result best needs data.validation_images, and it is "
                f"{self.data.validation_images}; allowed: 2 and more"
            )
        self._check_method()
        self._check_stack()
        if self.training.update == "exclusive" and (
            self.model.exclusive_stages == "none" and self.model.owned == ()
        ):
            raise ValueError(
                "training.update exclusive trains nothing with model.exclusive_stages none and "
                "model.owned []"
            )
        if self.training.owned_learning_rate is not None and self.model.owned == ():
            raise ValueError(
                f"training.owned_learning_rate {self.training.owned_learning_rate} is of nothing, "
                "as model.owned is []; allowed: null"
            )
        if self.sampling.guidance and self.model.exclusive_stages != "none":
            raise ValueError(
                f"sampling.guidance {self.sampling.guidance} needs model.exclusive_stages none, "
                f"and it is {json.dumps(self.model.exclusive_stages)}; allowed: 0"
            )
        if self.sampling.guidance and self.model.owned == ():
            raise ValueError(
                f"sampling.guidance {self.sampling.guidance} leads away from zeros in place of "
                "what is a task's own, and model.owned is []; allowed: 0"
            )
        if self.data.dataset == "sites":
            if self.model.task_embedding == "shared":
                raise ValueError(
                    "model.task_embedding shared needs numbered tasks; data.dataset sites has none"
                )
            if self.evaluation.mode != "statistics":
                raise ValueError(
                    f"evaluation.mode {self.evaluation.mode} needs reference images at the server, "
                    "and data.dataset sites has none; allowed: statistics"
                )
            if self.evaluation.clients is not None:
                raise ValueError(
                    f"evaluation.clients {self.evaluation.clients} is for simulations: under "
                    "data.dataset sites an evaluation also brings each site its model; allowed: "
                    "null"
                )
            if self.training.control_variates and self.training.gradient_clip is None:
                raise ValueError(
                    "training.control_variates true needs training.gradient_clip under "
                    "data.dataset sites, and it is null: nothing else bounds what a site sends"
                )
        return self

    def _check_stack(self) -> None:
        stack, clients = self.resources.owners_stacked, self.federation.clients
        if stack == 1:
            return
        if stack > clients:
            raise ValueError(f"resources.stack {stack} is above federation.clients {clients}")
        if self.training.method != "federated":
            raise ValueError(
                f"resources.stack {stack} needs training.method federated, not "
                f"{self.training.method}; allowed: auto, 1"
            )
        if self.data.dataset == "sites":
            raise ValueError(
                f"resources.stack {stack} is for simulations: each site of data.dataset sites "
                "trains on its own machine; allowed: auto, 1"
            )
        dropout = getattr(self.model, "dropout", 0.0)
        if dropout:
            raise ValueError(
                f"resources.stack {stack} needs model.dropout 0, and it is {dropout}: a stack "
                "cannot draw for each client apart"
            )

    def _check_method(self) -> None:
        training, clients = self.training, self.federation.clients
        if training.method == "federated":
            return
        if self.updates.steps:
            raise ValueError(
                f"updates.steps {json.dumps(self.updates.steps)} means nothing under "
                f"training.method {training.method}; allowed: []"
            )
        if self.updates.shared_bits is not None:
            raise ValueError(
                f"updates.shared_bits {self.updates.shared_bits} means nothing under "
                f"training.method {training.method}; allowed: null"
            )
        if training.method == "pooled" and self.model.exclusive_stages != "none":
            raise ValueError(
                f"training.method pooled has no exclusive layers, and model.exclusive_stages is "
                f"{json.dumps(self.model.exclusive_stages)}; allowed: none"
            )
        if training.method == "pooled" and self.model.owned:
            raise ValueError(
                "training.method pooled has no exclusive layers, and model.owned is "
                f"{json.dumps(self.model.owned)}; allowed: []"
            )
        if self.federation.compare != "none":
            raise ValueError(
                f"federation.compare {self.federation.compare} needs training.method federated, "
                f"not {training.method}"
            )
        for name, value in (
            ("federation.clients_per_round", self.federation.clients_per_round),
            ("evaluation.clients", self.evaluation.clients),
        ):
            if value is not None:
                raise ValueError(f"{name} needs training.method federated, not {training.method}")
        size = training.centralised_batch_size or training.batch_size
        if training.method == "balanced" and size % clients:
            raise ValueError(
                f"training.centralised_batch_size {size} cannot be shared out evenly among "
                f"{clients} "
                f"tasks; allowed: multiples of {clients}"
            )
        if (clients * (training.local_steps or 0) * training.batch_size) % size:
            raise ValueError(
                f"training.centralised_batch_size {size} does not divide a round's "
                f"{clients * (training.local_steps or 0) * training.batch_size} images (clients "
                "times local_steps times batch_size)"
            )

    @property
    def evaluated_clients(self) -> int:
        """How many clients an evaluation asks."""
        return self.evaluation.clients or self.federation.clients

    def evaluation_due(self, round_number: int) -> bool:
        """Whether an evaluation follows this round: every so many, and at the end."""
        every, last = self.evaluation.every, self.federation.rounds
        return round_number > 0 and (
            round_number == last or (every > 0 and round_number % every == 0)
        )

    def validation_due(self, round_number: int) -> bool:
        """Whether the owners look at their validation images after this round: every so many, and
        at the end.
        """
        federation = self.federation
        return federation.result == "best" and (
            round_number == federation.rounds
            or (round_number > 0 and round_number % federation.validate_every == 0)
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

    def with_absolute_paths(self) -> Self:
        """The same configuration with its paths as every process finds them, wherever it stands;
        raises UserError for an unknown ``~name``.
        """
        config = self
        for section, key in PATHS:
            settings = getattr(config, section)
            if value := getattr(settings, key):
                update = {section: settings.model_copy(update={key: str(absolute_path(value))})}
                config = config.model_copy(update=update)
        return config

    def decisive_settings(self) -> dict[str, Any]:
        """The settings that decide the result, by name, as JSON has them."""
        return self._decisive()

    def fingerprint(self) -> str:
        """SHA-256 over the settings that decide the result (not backend, paths, or time limits)."""
        return _fingerprint(self.to_json())

    def decisive_differences(self, other: "RunConfig") -> list[str]:
        """The settings that decide the result and differ, each as "section.key: own -> other"."""
        own, others = self._decisive(), other._decisive()
        return [
            f"{name}: {json.dumps(own.get(name))} -> {json.dumps(others.get(name))}"
            for name in {**own, **others}
            if own.get(name) != others.get(name)
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
        # While the rate follows the rounds, their number decides the result too.
        training = self.training
        followed = training.learning_rate_schedule != "constant" and training.decay_rounds is None
        return {
            name: value
            for name, value in self.settings().items()
            if what_decides(name) != "nothing" or (followed and name == "federation.rounds")
        }


@lru_cache(maxsize=64)
def _fingerprint(config: str) -> str:
    """Asked for with every message; the text that it is made of takes a fortieth of the time."""
    return fingerprint_of(RunConfig.model_validate_json(config).decisive_settings())


def what_decides(name: str) -> Decides:
    """What the setting of this name, "section.key" or "seed", decides."""
    section, _, key = name.rpartition(".")
    (model,) = [each for each in sections_of(section) if key in each.model_fields][:1]
    return decides(model, key)


def sections_of(name: str) -> list[type[Section]]:
    """The classes that a section of this name can be; of the empty name, the whole
    configuration's.
    """
    if name == "model":
        return list(SECTIONS.values())
    section = RunConfig.model_fields[name].annotation if name else RunConfig
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return [section]


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 over settings by name."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()

"""The agreement: what a site's owner has allowed, in a file of the owner's own.

    <state-dir>/<client>/agreement.json

A request brings the server's configuration; handler and guard do what the agreement allows of it,
and nothing else. Each setting has one of four rules. *Exactly*, unless it is listed below: above
all whatever decides which images stand behind a number, because two answers about n and n + 1
images differ by one image. *At most* and *at least*: how much and how often. *Free*: the server's
own affair, or a matter of this machine, where the site's own value holds.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from srfed.config import ResourcesConfig, RunConfig
from srfed.errors import DamagedError
from srfed.evaluation.shares import share_of_samples
from srfed.files import FORMAT, read_json, write_json
from srfed.units import escaped

AGREEMENT_FILE = "agreement.json"
VERSION = 1
COMMAND = "python -m srfed.deploy agree"

AT_MOST = frozenset(
    {
        "training.local_steps",
        "training.local_epochs",
        "training.exclusive_steps",
        "federation.rounds",
        "federation.keep_attempts",
    }
)
AT_LEAST = frozenset({"evaluation.every"})
FREE = frozenset(
    {
        "name",
        "data.dataset",
        "data.dir",
        "evaluation.samples",
        "evaluation.samples_between",
        "evaluation.inception_weights",
        "evaluation.grid_columns",
        "resources.backend",
        "resources.device",
        "resources.cpus",
        "resources.ray_address",
        "resources.client_cpus",
        "resources.client_gpus",
    }
)
"""Free, and so is what the server does with the replies (all of ``federation`` that is neither
in AT_MOST nor OF_THE_OWNER). The numbers of samples are agreed as what this site generates,
whatever the others do."""

OF_THE_OWNER = frozenset(
    {
        "federation.compare",
        "federation.compare_told",
        "federation.result",
        "federation.validate_every",
    }
)
"""Of ``federation``, and no affair of the server's: what an owner computes for itself, and whether
it tells; and whether it tells a loss of its validation images, and how often.
"""

LEAST_STATISTICS, LEAST_MEAN = 20, 8
"""Images behind feature statistics, and behind a mean such as SSIM or a loss, unless the owner says
otherwise.
"""

MOST_RUNS = 1000
LONGEST_WORDS, LONGEST_DETAIL = 200, 1000
"""Characters of a refusal, which travels, and of what it quotes, which stays."""

Rule = Literal["exactly", "at_most", "at_least", "free"]
_Count = Annotated[int, Field(ge=0)]


class RequestRefusedError(Exception):
    """A request that this client does not serve.

    The text is in the client's own words and may travel; what the request said instead stays in
    ``detail``.
    """

    lost = False
    """Whether the client has nothing to go on from."""

    def __init__(self, words: str, detail: str = "") -> None:
        super().__init__(escaped(words, LONGEST_WORDS))
        self.detail = escaped(detail, LONGEST_DETAIL)


class LostStoreError(RequestRefusedError):
    """The client's store no longer has the attempt that it is to go on from."""

    lost = True


def not_agreed(what: str, detail: str = "") -> RequestRefusedError:
    """The refusal of what an agreement does not allow; ``what`` is a setting's name."""
    return RequestRefusedError(f"not agreed: {what}", detail)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AgreedShared(_Part):
    """φ, the tensors that travel in each round: to the client as they are or in
    ``updates.shared_bits``, and back as they are or as what ``updates.steps`` make of their change.
    """

    tensors: _Count
    bytes: _Count
    bytes_down: _Count | None = None
    """What comes to be trained, c of control variates besides; None in agreements from before there
    were ``updates.shared_bits``: everything in float32."""
    bytes_up: _Count | None = None
    """What goes back; None in agreements from before there were steps: as much as comes."""
    bytes_control: _Count | None = None
    """What goes back besides, in place of c_i; None without ``training.control_variates``."""
    fingerprint: str
    """Of their names, shapes and dtypes; see
    :meth:`srfed.networks.partition.Partition.fingerprint`.
    """


class AgreedImages(_Part):
    """The owner's images. They are fixed, so that no two answers differ by a few of them."""

    training: _Count
    test: _Count
    fingerprint: str
    """See :attr:`srfed.data.ImageRecord.fingerprint`."""


class AgreedSamples(_Part):
    """What this site generates for one evaluation, exactly."""

    final: _Count
    between: _Count


class AgreedFeatures(_Part):
    """The network whose feature statistics leave."""

    network: str
    fingerprint: str


class LeastImages(_Part):
    """How many images must stand behind a number that leaves."""

    statistics: Annotated[int, Field(ge=2)] = LEAST_STATISTICS
    mean: Annotated[int, Field(ge=1)] = LEAST_MEAN


class SiteResources(_Part):
    """What this machine gives, whatever the server says."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    inception_weights: str = ""


class AgreedMod(_Part):
    """A function of an installed package that stands between the guard and what answers."""

    name: str
    """module:function"""
    fingerprint: str
    """See :func:`srfed.federation.mods.package_fingerprint`."""


class Agreement(_Part):
    """What one site's owner has agreed to.

    Attributes:
        client: the site's id.
        agreed: when, ISO 8601, UTC.
        coordinator: SHA-256 of the certificate that the site trusts (DER, hexadecimal); None ties
            it to none. A handler never sees the certificate: the command that starts the site
            compares it.
        shared, images, samples, features, least_images, resources: see there; features are None
            where no statistics leave.
        exactly, at_most, at_least, free: the rule of each setting, by its name.
        mods: the owner's own, the outermost first; none in agreements from before there were any.
        runs: how many may be begun under it; see :mod:`srfed.federation.asked`.
    """

    client: str
    agreed: str
    coordinator: str | None
    shared: AgreedShared
    images: AgreedImages
    samples: AgreedSamples
    features: AgreedFeatures | None
    least_images: LeastImages
    resources: SiteResources
    exactly: dict[str, Any]
    at_most: dict[str, int]
    at_least: dict[str, int]
    free: tuple[str, ...]
    mods: tuple[AgreedMod, ...] = ()
    runs: Annotated[int, Field(ge=1, le=MOST_RUNS)] = 1

    def admit(self, asked: RunConfig) -> RunConfig:
        """What the site does of a configuration: all that was agreed, with this machine's own
        resources.

        Raises:
            RequestRefusedError: a setting is not as agreed; the text names the first one.
        """
        for name, value in asked.settings().items():
            if (rule := self._broken(name, value)) is not None:
                raise not_agreed(name, f"asked for {_shown(value)}, agreed {rule}")
        return self.with_own_resources(asked)

    def with_own_resources(self, config: RunConfig) -> RunConfig:
        """The configuration with what is this machine's own affair."""
        own = {"device": self.resources.device, "cpus": None, "client_cpus": self.resources.threads}
        if config.resources.precision != "float32" and self.resources.device == "cpu":
            raise not_agreed("resources.precision", "this site computes on the CPU, in float32")
        evaluation = config.evaluation.model_copy(
            update={"inception_weights": self.resources.inception_weights}
        )
        resources = ResourcesConfig(**{**config.resources.model_dump(), **own})
        return config.model_copy(update={"resources": resources, "evaluation": evaluation})

    def admit_evaluation(
        self, config: RunConfig, round_number: int, samples: int, final: bool
    ) -> None:
        """Raise RequestRefusedError unless an evaluation is due, and asks for the agreed number of
        samples.
        """
        if not config.evaluation_due(round_number):
            raise not_agreed("evaluation.every", f"an evaluation after round {round_number}")
        if final != (round_number == config.federation.rounds):
            raise not_agreed(
                "evaluation.every", f"final = {_shown(final)} after round {round_number}"
            )
        agreed = self.samples.final if final else self.samples.between
        if samples != agreed:
            name = "evaluation.samples" if final else "evaluation.samples_between"
            raise not_agreed(
                name, f"asked for {samples} samples of this site, agreed exactly {agreed}"
            )

    def admit_images(self, images: AgreedImages) -> None:
        """Raise RequestRefusedError where the site's images are not the agreed ones."""
        if images != self.images:
            raise not_agreed(
                "the site's images",
                f"{images.training} for training and {images.test} for tests, agreed were "
                f"{self.images.training} and {self.images.test}; agree again with: {COMMAND}",
            )

    def rules(self) -> dict[str, str]:
        """The rule of each setting in words, by its name."""
        words = {name: f"exactly {_shown(value)}" for name, value in self.exactly.items()}
        words |= {name: f"at most {_shown(value)}" for name, value in self.at_most.items()}
        words |= {name: f"at least {_shown(value)}" for name, value in self.at_least.items()}
        return words | dict.fromkeys(self.free, "free")

    def differences(self, other: Self) -> list[str]:
        """What another agreement says otherwise, each as "what: this -> other"."""
        own, others = self._flat(), other._flat()
        return [
            f"{name}: {own.get(name, 'not mentioned')} -> {others.get(name, 'not mentioned')}"
            for name in {**own, **others}
            if own.get(name) != others.get(name)
        ]

    def save(self, folder: Path) -> None:
        """Write the file into the client's own folder; raises UserError where it cannot be
        written.
        """
        write_json(folder / AGREEMENT_FILE, json.loads(self.model_dump_json()), version=VERSION)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the file of a client's own folder.

        Raises:
            UserError: there is none, it cannot be read, is damaged, or of another version.
        """
        path = folder / AGREEMENT_FILE
        content = read_json(path, version=VERSION)
        content.pop(FORMAT, None)
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise DamagedError(
                f"{path} is damaged: {where}: {problem['msg']}; agree again with: {COMMAND}"
            ) from error

    def _broken(self, name: str, value: Any) -> str | None:
        """The rule that a value breaks, in words; None where it is as agreed."""
        if name in self.free:
            return None
        if name in self.exactly:
            kept = _plain(value) == _plain(self.exactly[name])
        elif type(value) is not int:
            kept = False
        elif name in self.at_most:
            kept = value <= self.at_most[name]
        elif name in self.at_least:
            # 0 is no evaluation between, rarer than any.
            kept = (value or math.inf) >= (self.at_least[name] or math.inf)
        else:
            kept = False
        return None if kept else self.rules().get(name, "nothing: it is not mentioned")

    def _flat(self) -> dict[str, str]:
        content = self.model_dump(
            mode="json", exclude={"agreed", "exactly", "at_most", "at_least", "free", "mods"}
        )
        content["mods"] = {mod.name: mod.fingerprint for mod in self.mods}
        return {name: _shown(value) for name, value in _leaves(content)} | self.rules()


def rules_of(config: RunConfig) -> dict[Rule, dict[str, Any]]:
    """The rule of each setting that allows a configuration, and what its rule allows besides."""
    rules: dict[Rule, dict[str, Any]] = {"exactly": {}, "at_most": {}, "at_least": {}, "free": {}}
    for name, value in config.settings().items():
        rules[_rule(name, value)][name] = value
    return rules


def weak_numbers(
    config: RunConfig, least: LeastImages, images: tuple[int, int], samples: AgreedSamples
) -> Iterator[tuple[str, str]]:
    """The numbers that would leave with too few images behind them.

    Args:
        config: what would be agreed to.
        least: what the owner wants at least.
        images: how many training and test images there are.
        samples: how many images the site would generate.

    Yields:
        A setting, and what is wrong with it.
    """
    training, test = images
    evaluation = config.evaluation
    if (smallest := smallest_minibatch(config, training)) < least.mean:
        yield "training.batch_size", f"a minibatch of {smallest} images, {least.mean} is the least"
    if evaluation.ssim_images and (judged := min(evaluation.ssim_images, test)) < least.mean:
        yield "evaluation.ssim_images", f"SSIM over {judged} test images, {least.mean} is the least"
    told = config.federation.compare != "none" and config.federation.compare_told
    if told and test < least.mean:
        yield (
            "federation.compare_told",
            f"what joining is worth on {test} test images, {least.mean} is the least",
        )
    if (
        evaluation.memorisation_quantile
        and (fewest := min(training, test, samples.final)) < least.mean
    ):
        yield (
            "evaluation.memorisation_quantile",
            f"an audit of {fewest} images, {least.mean} is the least",
        )
    if evaluation.mode == "samples":
        return
    counts = [("evaluation.samples", samples.final, "generated")]
    if evaluation.every and evaluation.every < config.federation.rounds:
        counts.append(("evaluation.samples_between", samples.between, "generated"))
        apart = abs(samples.final - samples.between)
        if 0 < apart < least.statistics:
            yield "evaluation.samples_between", f"two answers would differ by {apart} images"
    counts += [("data.images_per_task", training, "training"), ("data.test_fraction", test, "test")]
    for name, count, what in counts:
        if count < least.statistics:
            yield (
                name,
                f"feature statistics of {count} {what} images, {least.statistics} is the least",
            )


def smallest_minibatch(config: RunConfig, images: int) -> int:
    """Different images in the smallest minibatch that a client with so many images trains on."""
    training = config.training
    rest = images % training.batch_size
    return rest if training.minibatches == "ragged" and rest else min(images, training.batch_size)


def samples_of(config: RunConfig) -> AgreedSamples:
    """What each client generates for an evaluation."""
    evaluation, clients = config.evaluation, config.federation.clients
    return AgreedSamples(
        final=share_of_samples(evaluation.samples, clients),
        between=share_of_samples(evaluation.samples_between, clients),
    )


def _rule(name: str, value: Any) -> Rule:
    if value is not None and name in AT_MOST:
        return "at_most"
    if name in AT_LEAST:
        return "at_least"
    if name in FREE or (
        name.startswith("federation.") and name not in AT_MOST and name not in OF_THE_OWNER
    ):
        return "free"
    return "exactly"


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = json.dumps(_plain(value))
    return text if len(text) <= 100 else f"{text[:97]}..."

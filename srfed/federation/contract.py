"""The contract: what each kind of message may hold, declared once. The client takes φ by it, its
guard lets nothing else out, the server screens by it, and ``deploy check`` says it in words.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

from torch import Tensor

from srfed.config import RunConfig
from srfed.federation.bounds import (
    DESCRIPTION,
    EvaluatePlan,
    Number,
    TrainPlan,
    validation_numbers,
)
from srfed.federation.coming import coming_in_words, layout_of_coming
from srfed.federation.control import control_in_words, layout_of_control
from srfed.federation.layout import Layout, layout_of, value_bytes, value_count
from srfed.federation.messages import (
    CONTROL,
    GENERATED,
    SETS,
    SHARED,
    STATISTICS,
    UPDATE,
    Description,
    ReplyHeader,
)
from srfed.federation.updates import Length, layout_of_update, longest_update, update_in_words
from srfed.training.optimizer import Reach
from srfed.units import bytes_in_words


@dataclass(frozen=True)
class Form:
    """What one kind of message may hold, and nothing besides.

    Attributes:
        header: the fields of its header, and
        header_numbers: the range of those among them that are not known beforehand.
        arrays: its tensors, by record.
        numbers: its numbers, each with its range.
        together: further numbers, all of which come or none.
    """

    header: frozenset[str]
    arrays: Mapping[str, Layout] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    together: Mapping[str, Number] = field(default_factory=dict)
    header_numbers: Mapping[str, Number] = field(default_factory=dict)

    @property
    def all_numbers(self) -> dict[str, Number]:
        return {**self.numbers, **self.together}

    def numbers_of(self, sent: Iterable[str]) -> dict[str, Number]:
        """The numbers that a message with these must have."""
        return self.all_numbers if set(sent) & set(self.together) else dict(self.numbers)


DESCRIBED = Form(frozenset(entry.name for entry in fields(Description)), header_numbers=DESCRIPTION)
"""What a client says of itself."""
_REPLY = frozenset(entry.name for entry in fields(ReplyHeader))


@dataclass(frozen=True)
class Contract:
    """What the messages of one run hold.

    Attributes:
        config: the run's configuration.
        shared: φ's layout, and that of c of control variates.
    """

    config: RunConfig
    shared: Layout

    @classmethod
    def of(cls, config: RunConfig, shared: Mapping[str, Tensor]) -> "Contract":
        return cls(config, layout_of(shared))

    @property
    def request(self) -> dict[str, Layout]:
        """What comes with a request to evaluate or validate, by record."""
        return {SHARED: self.shared}

    @property
    def training_request(self) -> dict[str, Layout]:
        """What comes with a request to train: besides φ, or its codes, c of control variates."""
        coming = layout_of_coming(self.config.updates, self.shared)
        return {SHARED: coming, **({CONTROL: coming} if self.control else {})}

    @cached_property
    def update(self) -> dict[str, Layout]:
        """What a round sends up, by record: φ_i, or what steps have made of Δ_i."""
        settings = self.config.updates
        if not settings.steps:
            return {SHARED: self.shared}
        return {UPDATE: layout_of_update(settings, self.shared)}

    @cached_property
    def control(self) -> dict[str, Layout]:
        """What travels in place of a round's c_i beside that; nothing without control variates."""
        if not self.config.training.control_variates:
            return {}
        return {CONTROL: layout_of_control(self.shared)}

    def trained(self, plan: TrainPlan) -> Form:
        """The reply to a request to train."""
        return Form(_REPLY, {**self.update, **self.control}, plan.numbers())

    def evaluated(self, plan: EvaluatePlan, dimension: int | None) -> Form:
        """The reply to a request to evaluate; ``dimension`` is that of the features, None where no
        statistics are asked for.
        """
        audit = plan.audit_numbers() if plan.audited else {}
        if dimension is not None:
            shapes = {"mean": (dimension,), "scatter": (dimension, dimension)}
            statistics: Layout = [
                (f"{name}.{part}", "float64", shape)
                for name in SETS
                for part, shape in shapes.items()
            ]
            return Form(_REPLY, {STATISTICS: statistics}, plan.numbers(), audit)
        counts = {"images": plan.samples, "strip": plan.strip}
        generated: Layout = [
            (name, "uint8", (count, *plan.shape)) for name, count in counts.items()
        ]
        return Form(_REPLY, {GENERATED: generated}, plan.numbers(), audit)

    def validated(self, images: Number) -> Form:
        """The reply to a request for the loss on so many validation images."""
        return Form(_REPLY, numbers=validation_numbers(images))

    def reach(self, reach: Reach | None) -> Reach | None:
        """How long a decoded update can be, where the optimizer comes no further than this; None
        where nothing bounds it.

        Steps shorten it, or add to it: what rounding has left of earlier rounds comes with this
        one, whose learning rate may be lower, so values are bounded over all rounds.
        """
        settings = self.config.updates
        if not settings.steps:
            return reach
        none = float("inf")
        usual, largest = (
            longest_update(settings, Length(norm, value), self.shared)
            for norm, value in (
                (none, none) if reach is None else (reach.usual, reach.usual_value),
                (none, none) if reach is None else (reach.largest, reach.largest_value),
            )
        )
        return None if usual == none else Reach(usual, largest, usual, largest)

    def in_words(self) -> list[str]:
        """What comes and what goes in each round, in bytes of the tensors' values."""
        settings, down, (up,) = self.config.updates, self.shared, self.update.values()
        come = layout_of_coming(settings, down)
        shared = f"φ, {value_count(down):,} parameters in {len(down)} tensors"
        coded = f", {coming_in_words(settings)}" if settings.shared_bits else ""
        control = [
            line
            for layout in self.control.values()
            for line in (
                f"{_bytes(come)} come: c of control variates, a gradient of φ{coded}",
                f"{_bytes(layout)} go: c_i, {control_in_words(self.config.training)}, in "
                f"{len(layout)} tensors",
            )
        ]
        if not settings.steps and not coded:
            return [f"{_bytes(down)} come and as many go: {shared}", *control]
        how = f"its change, {update_in_words(settings)}" if settings.steps else "φ as trained"
        average = f"{_bytes(down)} come at an evaluation: φ's moving average, in float32"
        return [
            f"{_bytes(come)} come: {shared}{coded}",
            f"{_bytes(up)} go: {how}, in {len(up)} tensors",
            *control,
            *([average] if coded else []),
        ]


def _bytes(layout: Layout) -> str:
    size = value_bytes(layout)
    return f"{size:,} bytes ({bytes_in_words(size)})"

"""The partition: which of a network's tensors are shared (φ) and which exclusive to a task (θ_i).

A rule is a dial over the network's shells: ``none`` (everything shared), ``io`` (the outermost, of
the UNet stem and head), k (k shells more, of the UNet down and up stages; k = 1 is the paper),
``all`` (everything exclusive), or a list of name patterns. What the network owns, such as a task's
vector, is exclusive whatever the rule. Every tensor is in exactly one part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Literal, NewType

from torch import Tensor, nn

from srfed.networks.network import Network

Rule = Literal["none", "io", "all"] | int | Sequence[str]


Shared = NewType("Shared", dict[str, Tensor])
"""φ, what has φ's names and may be where φ may, or φ's codes: the only tensors of a model that
travel.
"""
Exclusive = NewType("Exclusive", dict[str, Tensor])
"""θ_i, or its moving average: never leaves its owner. What packs messages takes no such thing."""
Control = NewType("Control", dict[str, Tensor])
"""c or c_i of control variates, which are gradients of φ, or what travels in place of them."""


@dataclass(frozen=True)
class Partition:
    """Names of the tensors of φ and of θ_i, each in the order of the model's state dict.

    The order is part of the protocol: it is the order of the tensors in a message.

    Attributes:
        shared: φ.
        exclusive: θ_i.
        owned: those of θ_i that the network owns, and which may be trained at a rate of their own.
    """

    shared: tuple[str, ...]
    exclusive: tuple[str, ...]
    owned: tuple[str, ...] = ()

    def take_shared(self, tensors: Mapping[str, Tensor]) -> Shared:
        """φ out of a whole state dict."""
        return Shared({name: tensors[name] for name in self.shared})

    def take_exclusive(self, tensors: Mapping[str, Tensor]) -> Exclusive:
        """θ_i out of a whole state dict."""
        return Exclusive({name: tensors[name] for name in self.exclusive})

    def fingerprint(self, tensors: Mapping[str, Tensor]) -> str:
        """SHA-256 over names, shapes and dtypes of φ: two parties with the same one can exchange
        φ.
        """
        lines = [
            f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}" for name in self.shared
        ]
        return sha256("\n".join(lines).encode()).hexdigest()


def divide(network: nn.Module, rule: Rule) -> Partition:
    """Divide a network's tensors by a rule.

    Args:
        network: a :class:`~srfed.networks.network.Network` (or, for patterns, any module).
        rule: the dial's position: ``none``, ``io`` (the outermost shell), a number k (that, and k
            shells more), ``all``; or patterns. A pattern is a glob over tensor names; a pattern
            without a final ``*`` that names a module takes everything below it (``up.0`` is
            ``up.0.*``).

    Raises:
        ValueError: an impossible rule, or a pattern that matches no tensor.
    """
    names = list(network.state_dict())
    owned = _matching(
        names,
        network.owned if isinstance(network, Network) else (),
        f"network {type(network).__name__}: owned pattern",
    )
    exclusive = owned | _matching(names, _patterns(network, rule), "exclusive_stages pattern")
    return Partition(
        shared=tuple(name for name in names if name not in exclusive),
        exclusive=tuple(name for name in names if name in exclusive),
        owned=tuple(name for name in names if name in owned),
    )


def describe_modules(
    tensors: Mapping[str, Tensor], partition: Partition
) -> list[tuple[str, str, int]]:
    """(module, part, parameters) for the outermost modules that lie wholly in one part, in model
    order.

    A module that both parts share in is listed by its children; what the network owns is listed by
    itself, and does not divide what is around it.
    """
    parts = {
        **dict.fromkeys(partition.shared, "shared"),
        **dict.fromkeys(partition.exclusive, "exclusive"),
    }
    others = {name: part for name, part in parts.items() if name not in partition.owned}
    rows: dict[str, tuple[str, int]] = {}
    for name, tensor in tensors.items():
        if name in others:
            module = _widest_module(name, others)
        else:
            parent = name.rpartition(".")[0]
            mixed = any(other.startswith(f"{parent}.") for other in others)
            module = parent if parent and not mixed else name
        count = rows.get(module, ("", 0))[1]
        rows[module] = (parts[name], count + tensor.numel())
    return [(module, part, count) for module, (part, count) in rows.items()]


def _widest_module(name: str, parts: Mapping[str, str]) -> str:
    """The shortest prefix of a tensor's name, list indices included, below which all is in its
    part.
    """
    steps = name.split(".")
    for length in range(1, len(steps)):
        if steps[length].isdigit():
            continue
        prefix = ".".join(steps[:length])
        if all(
            part == parts[name] for other, part in parts.items() if other.startswith(f"{prefix}.")
        ):
            return prefix
    return name


def _patterns(network: nn.Module, rule: Rule) -> list[str]:
    """The patterns that a rule stands for."""
    if rule == "none":
        return []
    if rule == "all":
        return ["*"]
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        if not rule:
            raise ValueError("exclusive_stages is an empty list; write `none` to share everything")
        return list(rule)
    if not isinstance(rule, int) and rule != "io":
        raise ValueError(
            f"exclusive_stages {rule!r} is no rule; allowed: none, io, all, a number, or patterns"
        )
    shells = network.shells() if isinstance(network, Network) else []
    stages, last = (0 if rule == "io" else int(rule)), len(shells) - 1
    if not (1 <= stages <= last or (rule == "io" and shells)):
        raise ValueError(
            f"exclusive_stages {rule} is impossible; the network has stages 1 to {last}"
            if last >= 1
            else f"exclusive_stages {rule} is impossible; the network has {len(shells)} shells"
        )
    return [pattern for shell in shells[: stages + 1] for pattern in shell]


def _matching(names: Sequence[str], patterns: Iterable[str], what: str) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name in names
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        }
        if not found:
            raise ValueError(f"{what} {pattern!r} matches no tensor of the model")
        matched |= found
    return matched

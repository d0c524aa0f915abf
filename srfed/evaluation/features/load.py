"""Feature networks by name."""

from typing import Literal

import torch

from srfed.evaluation.features.embedded import EmbeddedFeatures
from srfed.evaluation.features.inception import InceptionFeatures
from srfed.evaluation.features.network import FeatureNetwork

__all__ = ["FeatureNetwork", "load_feature_network"]


def load_feature_network(
    name: Literal["embedded", "inception"], weights: str = "", device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """The feature network of that name; there is no fallback to another.

    Args:
        name: "embedded" ships with the package; "inception" is the standard FID network.
        weights: a file with the weights of "inception"; empty downloads them once and verifies
            them. "embedded" has its own file and never looks at this one.
        device: where it computes.

    Raises:
        UserError: the weights cannot be had or are not what they should be; the text says what to
            do.
    """
    match name:
        case "embedded":
            return EmbeddedFeatures(device)
        case "inception":
            return InceptionFeatures(weights, device)
    raise ValueError(f"there is no feature network {name!r}")

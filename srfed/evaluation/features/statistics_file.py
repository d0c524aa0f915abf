"""Files of feature statistics: a reference that stands in for images, tied to the network that made
it.
"""

from collections.abc import Mapping
from pathlib import Path

from srfed.errors import DamagedError, UserError
from srfed.evaluation.features.network import FeatureNetwork, one_line
from srfed.evaluation.features.statistics import FeatureStatistics
from srfed.storage.checkpoint import read_arrays, write_arrays


def save_statistics(path: Path, statistics: FeatureStatistics, network: FeatureNetwork) -> None:
    """Write statistics and the identity of their network as safetensors, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    about = {**network.identity, "count": str(statistics.count)}
    write_arrays(path, {"mean": statistics.mean, "scatter": statistics.scatter}, about)


def load_statistics(path: Path, network: FeatureNetwork) -> FeatureStatistics:
    """Read statistics that ``network`` has made.

    Raises:
        UserError: the file cannot be read, is no statistics file, or is another network's: a score
            is never computed between the features of two networks.
    """
    try:
        arrays, metadata = read_arrays(path)
        statistics = FeatureStatistics(int(metadata["count"]), arrays["mean"], arrays["scatter"])
    except (DamagedError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no file of feature statistics: {one_line(error)}") from error
    check_same_network(network.identity, metadata, str(path))
    return statistics


def check_same_network(expected: Mapping[str, str], found: Mapping[str, str], source: str) -> None:
    """Refuse features of another network, other weights, or another resize rule.

    Args:
        expected: :attr:`FeatureNetwork.identity` of the network in use.
        found: the identity that came with the features; further entries are of no meaning.
        source: where they came from, for the message.

    Raises:
        UserError: an entry of ``expected`` is absent or different.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"{source} has features of another network: its {key} is {found.get(key)!r}, this "
                f"run's is {value!r}"
            )

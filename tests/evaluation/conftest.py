"""Fixtures that several files of this folder share."""

import pytest

from srfed.evaluation.features.load import FeatureNetwork, load_feature_network


@pytest.fixture(scope="session")
def network() -> FeatureNetwork:
    return load_feature_network("embedded")

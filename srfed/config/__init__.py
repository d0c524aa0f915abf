"""The typed, strict configuration of a run: YAML and ``--set`` overrides in, validated objects
out.
"""

from srfed.config.data import DataConfig, DatasetName
from srfed.config.diffusion import DiffusionConfig
from srfed.config.evaluation import EvaluationConfig
from srfed.config.explain import default_settings, describe
from srfed.config.federation import FederationConfig
from srfed.config.loading import load_config, parse_config, parse_config_json, read_settings
from srfed.config.model import STAGES, ModelConfig, OwnNetworkConfig, UNetConfig
from srfed.config.resources import ResourcesConfig
from srfed.config.run import RunConfig, what_decides
from srfed.config.sampling import SamplingConfig
from srfed.config.settings import Section
from srfed.config.training import TrainingConfig
from srfed.config.updates import UpdatesConfig

__all__ = [
    "STAGES",
    "DataConfig",
    "DatasetName",
    "DiffusionConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "OwnNetworkConfig",
    "ResourcesConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "TrainingConfig",
    "UNetConfig",
    "UpdatesConfig",
    "default_settings",
    "describe",
    "load_config",
    "parse_config",
    "parse_config_json",
    "read_settings",
    "what_decides",
]

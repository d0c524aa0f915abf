"""The typed, strict configuration of a run: YAML and ``--set`` overrides in, validated objects
out.
"""

from srfed.config.explain import describe
from srfed.config.loading import load_config, parse_config, parse_config_json, read_settings
from srfed.config.sections import (
    NOT_DECISIVE,
    STAGES,
    DataConfig,
    DatasetName,
    DiffusionConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    ResourcesConfig,
    RunConfig,
    SamplingConfig,
    Section,
    TrainingConfig,
)

__all__ = [
    "NOT_DECISIVE",
    "STAGES",
    "DataConfig",
    "DatasetName",
    "DiffusionConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "ResourcesConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "TrainingConfig",
    "describe",
    "load_config",
    "parse_config",
    "parse_config_json",
    "read_settings",
]

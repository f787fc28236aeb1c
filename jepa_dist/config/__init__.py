"""Typed configuration: defaults < YAML file < JEPA_* environment < KEY=VALUE command line.

``load`` returns the validated ``Config`` together with where each value came from. Anything wrong
raises ``UserError`` with one line per problem, before torch is imported and before any process
group exists. To add an option, add a field in ``jepa_dist.config.schema``.
"""

from jepa_dist.config.keys import flatten, to_dict
from jepa_dist.config.reference import reference_page
from jepa_dist.config.resolve import (
    ENVIRONMENT,
    Resolved,
    as_override,
    load,
    parse_value,
    to_yaml,
)
from jepa_dist.config.restricted_yaml import read_mapping
from jepa_dist.config.rules import check, check_world
from jepa_dist.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    JepaConfig,
    ModelConfig,
    MonitorConfig,
    ObjectiveSection,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    QuantizationConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "ENVIRONMENT",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "JepaConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveSection",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "QuantizationConfig",
    "Resolved",
    "RunConfig",
    "TrainConfig",
    "as_override",
    "check",
    "check_world",
    "flatten",
    "load",
    "parse_value",
    "read_mapping",
    "reference_page",
    "to_dict",
    "to_yaml",
]

"""The typed configuration of a run and every check that spans its fields.

Hydra composes YAML; `parse` turns the composed tree into the dataclasses of `schema` and refuses what does
not fit; `check` refuses values that fit but cannot work together. Nothing here imports torch: the command
line, the preview and the launchers need this before a run starts.
"""

from pipeline.config.checks import check, check_imbalance, check_mesh, check_replicas
from pipeline.config.errors import ConfigError, did_you_mean, nearest
from pipeline.config.parsing import (
    forms_of,
    hints_of,
    known_keys,
    parse,
    parse_group,
    parse_tokens,
    sweep_settings,
    to_tree,
    typed,
    unknown_key,
)
from pipeline.config.schema import (
    BYTE_VOCABULARY,
    TEXT_SOURCES,
    BatchConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    ImbalanceConfig,
    LlamaConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    common_unit,
)

__all__ = [
    "BYTE_VOCABULARY",
    "TEXT_SOURCES",
    "BatchConfig",
    "ClassifierConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ImbalanceConfig",
    "LlamaConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "check",
    "check_imbalance",
    "check_mesh",
    "check_replicas",
    "common_unit",
    "did_you_mean",
    "forms_of",
    "hints_of",
    "known_keys",
    "nearest",
    "parse",
    "parse_group",
    "parse_tokens",
    "sweep_settings",
    "to_tree",
    "typed",
    "unknown_key",
]

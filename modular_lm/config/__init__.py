"""Configuration: the dataclass tree, its loading from YAML and `key=value`, and its checks.

Imports neither torch nor Ray, so that a typo is answered before anything heavy is loaded.

- `schema`: the dataclasses; every key has a type, a default, bounds and one line of help.
- `load`: dataclass defaults < YAML < command line; unknown keys, wrong types, `--help`.
- `checks`: conditions that involve several keys; what may change between attempts of a run.
- `sweep`: the keys of a sweep of training runs.
- `jobs`: which job takes which of them.
- `lingua`: how the keys of a Meta Lingua YAML are read.
"""

from modular_lm.config.jobs import JOBS
from modular_lm.config.load import format_help, load_config, to_dict, to_yaml
from modular_lm.config.schema import (
    ConvertConfig,
    DataConfig,
    DoctorConfig,
    GenerateConfig,
    ModelConfig,
    ModulesConfig,
    OptimConfig,
    PrepareConfig,
    TokenizerConfig,
    TrainConfig,
)
from modular_lm.config.sweep import ReportConfig, SweepConfig

__all__ = [
    "JOBS",
    "ConvertConfig",
    "DataConfig",
    "DoctorConfig",
    "GenerateConfig",
    "ModelConfig",
    "ModulesConfig",
    "OptimConfig",
    "PrepareConfig",
    "ReportConfig",
    "SweepConfig",
    "TokenizerConfig",
    "TrainConfig",
    "format_help",
    "load_config",
    "to_dict",
    "to_yaml",
]

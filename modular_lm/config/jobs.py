"""The jobs of this project, by the name of their module, and what configures each."""

from __future__ import annotations

from modular_lm.config.schema import (
    ConvertConfig,
    GenerateConfig,
    ModulesConfig,
    PrepareConfig,
    TrainConfig,
)
from modular_lm.config.sweep import SweepConfig

JOBS: dict[str, type] = {
    "ray_jobs.train": TrainConfig,
    "ray_jobs.sweep": SweepConfig,
    "ray_jobs.prepare": PrepareConfig,
    "ray_jobs.generate": GenerateConfig,
    "ray_jobs.convert": ConvertConfig,
    "ray_jobs.modules": ModulesConfig,
}

"""What a job knows when `ray job submit` started it: read from its environment, without Ray.

Such a job runs in a copy of the submitter's working directory that Ray makes on a node of the
cluster and deletes when it likes. Relative paths that are read resolve in it, because what travels
lies there (configs, small files). What is written there would be lost, so `check_lasting` refuses
it, for every job.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_lm.errors import ConfigError

# Set by Ray for the command of a submitted job, and only for it.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Below this folder Ray unpacks working directories.
_UNPACKED = "working_dir_files"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_DEFAULT_STOP_WAIT_S = 3
# Keys of jobs that name what they write.
_WRITTEN = ("dump_dir", "dst", "out", "checkpoint.path")


@dataclass(frozen=True)
class Submission:
    """A job that was submitted.

    working_dir: the temporary copy in which it runs, None without `--working-dir`; carried: names
    of the variables of its runtime environment; stop_wait_s: seconds from the SIGTERM of
    `ray job stop` to its SIGKILL.
    """

    working_dir: Path | None
    carried: frozenset[str]
    stop_wait_s: int


def submission() -> Submission | None:
    """How this process was submitted; None for one that was started otherwise."""
    if _JOB_CONFIG not in os.environ:
        return None
    values = json.loads(os.environ[_JOB_CONFIG]).get("runtime_env") or {}
    here = Path.cwd()
    unpacked = next((p for p in (here, *here.parents) if p.parent.name == _UNPACKED), None)
    wait = os.environ.get(STOP_WAIT, "")
    return Submission(
        working_dir=unpacked,
        carried=frozenset(values.get("env_vars") or {}),
        stop_wait_s=int(wait) if wait.isdigit() else _DEFAULT_STOP_WAIT_S,
    )


def check_lasting(config: Any) -> None:
    """Raise ConfigError for a key of a job's `config` that would write into the temporary copy."""
    job = submission()
    if job is None or job.working_dir is None:
        return
    for key in _WRITTEN:
        value = _value(config, key)
        if key == "dump_dir" and hasattr(config, key):
            value = value or f"runs/{getattr(config, 'name', '')}"
        if not value or "://" in value:
            continue
        if (job.working_dir / Path(value).expanduser()).resolve().is_relative_to(job.working_dir):
            raise ConfigError(
                f"{key}={value}: lies in Ray's temporary copy of the working directory, which is "
                "deleted after the job; give an absolute path that all nodes of the cluster share"
            )


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config

"""What the launcher asks of SLURM: try a script, submit it, and whether a job is still there.

Which job a run's folder belongs to is recorded in the folder, for all who share it.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.options import LaunchConfig
from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.files import write_text_atomic

_TIMEOUT_S = 60
# States of a job that may still write into its folder.
_ALIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "STAGE_OUT"),
    "RESV_DEL_HOLD",
)
# Those of them in which there is no batch step to signal, and in which it has ended.
_QUEUED = (
    *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"),
    "RESV_DEL_HOLD",
)
_OVER = ("COMPLETING", "STAGE_OUT")
# Variables that stand for options of sbatch; they would win over the lines of a script.
_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_PARTITION": "partition",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
}
_KEPT = ("SBATCH_RESERVATION", "SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class ActiveJob:
    """A job of ours that SLURM still has."""

    job_id: str
    state: str


def try_script(text: str, options: LaunchConfig) -> str:
    """Let SLURM check a script without submitting it; what it says of when it would start.

    Raises ConfigError, with SLURM's words, for options that it refuses.
    """
    done = _run(["sbatch", "--test-only"], sbatch_environment(options, os.environ), text)
    said = _words(done.stderr or done.stdout)
    if done.returncode:
        raise ConfigError(f"SLURM refuses the job: {said}{_hint(said, options)}")
    return said


def submit(script: Path, options: LaunchConfig) -> str:
    """Submit a script; returns the job's id. Raises RunFailedError where SLURM refuses."""
    command = ["sbatch", "--parsable", str(script)]
    done = _run(command, sbatch_environment(options, os.environ))
    if done.returncode:
        raise RunFailedError(f"SLURM did not take the job: {_words(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def record_job(dump_dir: Path, job_id: str) -> None:
    """Note which job the folder belongs to."""
    write_text_atomic(_job_file(dump_dir), json.dumps({"job_id": job_id}) + "\n")


def active_job(dump_dir: Path) -> ActiveJob | None:
    """The job of ours that is queued or running in the folder, if there is one.

    Raises RunFailedError if SLURM does not answer.
    """
    try:
        job_id = json.loads(_job_file(dump_dir).read_text())["job_id"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{_job_file(dump_dir)}: not readable; remove it") from error
    done = _run(["squeue", f"--jobs={job_id}", "--noheader", "--format=%T"], dict(os.environ))
    if done.returncode:
        said = _words(done.stderr)
        if "Invalid job id" in said:  # it ended so long ago that SLURM has forgotten it
            return None
        raise RunFailedError(f"cannot tell whether job {job_id} still runs: {said}")
    state = next((s for s in done.stdout.split() if s in _ALIVE), None)
    return None if state is None else ActiveJob(job_id, state)


def ending(job_ids: Sequence[str], state: str) -> str:
    """The command that ends jobs in this state, with a checkpoint of those that run; "" for those
    that end anyway."""
    ids = " ".join(job_ids)
    if state in _OVER:
        return ""
    return f"scancel {ids}" if state in _QUEUED else f"scancel --batch --signal=TERM {ids}"


def has_sbatch() -> bool:
    """Whether this machine can submit."""
    try:
        return _run(["sbatch", "--version"], dict(os.environ)).returncode == 0
    except ConfigError:
        return False


def sbatch_environment(options: LaunchConfig, outer: Mapping[str, str]) -> dict[str, str]:
    """The environment for sbatch, which the job inherits.

    Without what describes a job that this may be running in, and without variables that would win
    over what the options say.
    """
    kept = {n: v for n, v in outer.items() if not n.startswith(("SLURM", "SBATCH")) or n in _KEPT}
    for variable, option in _VARIABLES.items():
        if variable in outer and getattr(options, option) is None:
            kept[variable] = outer[variable]
    kept.pop("RAY_ADDRESS", None)
    return kept


def _job_file(dump_dir: Path) -> Path:
    return dump_dir / "ray" / "slurm" / "job.json"


def _hint(said: str, options: LaunchConfig) -> str:
    if "partition" not in said.lower() or options.partition is None:
        return ""
    known = _run(["sinfo", "--noheader", "--format=%R"], dict(os.environ)).stdout.split()
    close = difflib.get_close_matches(options.partition, known, n=1)
    meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f" (partition={options.partition}: {meant})"


def _words(text: str) -> str:
    lines = (line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines())
    return "; ".join(line.strip() for line in lines if line.strip())


def _run(
    command: list[str], environment: dict[str, str], text: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=environment, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]}: no such command here; run this on a login node of the cluster, "
            "or look at the script with dry_run=true"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{command[0]}: no answer of SLURM in {_TIMEOUT_S} s") from None

"""What the launcher tells its user: what it did, where to look, how to stop and to resume."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cluster.checks import Job
from cluster.folders import SCRIPT
from cluster.jobs import ending
from cluster.options import LaunchConfig


def summary(
    options: LaunchConfig, jobs: Sequence[Job], ids: Sequence[str], array_dir: Path | None
) -> str:
    """Some lines about jobs; `ids` is empty if they have not been submitted."""
    lines = []
    each = f"; each of {len(jobs)} tasks" if len(jobs) > 1 else ""
    for number, job in enumerate(jobs):
        job_id = ids[number] if ids else None
        lines.append(f"job {job_id}: {job.name}" if job_id else f"not submitted: {job.name}")
        lines.append(f"  run folder  {job.dump_dir}")
        if job_id:
            log = shlex.quote(str(job.dump_dir / "logs" / f"slurm-{job_id}.out"))
            lines.append(f"  log         tail -F {log}")
    lines.append(f"  script      {(array_dir or jobs[0].dump_dir) / SCRIPT}")
    lines.append(f"  asked for   {_resources(options, jobs[0])}{each}")
    if ids:
        first = ids[0].partition("_")[0]
        lines += [
            f"  state       squeue --jobs={first}",
            f"  stop        {ending(ids, 'RUNNING')}   (saves a checkpoint)",
            f"              {ending(ids, 'PENDING')}   (while it is pending)",
            f"  resume      the same command{_without(options)}, when the job has ended",
        ]
    return "\n".join(lines)


def _without(c: LaunchConfig) -> str:
    return " without override=true" if c.override else ""


def _resources(c: LaunchConfig, job: Job) -> str:
    gpus = f", {c.gpus_per_node} GPUs" if c.gpus_per_node else ""
    workers = f"; {_workers(*job.workers)}" if job.workers else ""
    nodes = "1 node" if c.nodes == 1 else f"{c.nodes} nodes"
    limit = c.time or "SLURM's default"
    return f"{nodes} of {c.cpus_per_node} CPUs{gpus}{workers}; time limit {limit}"


def _workers(fewest: int, most: int) -> str:
    if fewest < most:
        return f"{fewest} to {most} workers"
    return "1 worker" if most == 1 else f"{most} workers"

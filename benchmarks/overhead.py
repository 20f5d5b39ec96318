"""Step time under Ray Train against the same trainer under torchrun, in turns, on this machine.

    python -m benchmarks.overhead [key=value ...]

Arguments go to both jobs. Prints a table and writes benchmarks/results/overhead.json. Times of
one machine mean little elsewhere; the ratio is the result.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from modular_lm.tracking.run_folder import RunFolder

ROUNDS = 3
WARM_UP_LINES = 2
JOB = [
    "config=configs/debug.yaml",
    "steps=60",
    "logging.freq=5",
    "logging.mlflow.enabled=false",
    "checkpoint.dump.every=0",
    "checkpoint.eval.every=0",
    "eval.validation.max_docs=0",
]
LAUNCHERS = {
    "ray": [sys.executable, "-m", "ray_jobs.train"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "modular_lm.train"),
    ],
}
RESULTS = Path(__file__).parent / "results" / "overhead.json"


def step_time(launcher: list[str], arguments: list[str]) -> tuple[float, float]:
    """Run one job; median seconds per step and median share of waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, *JOB, f"dump_dir={folder}/run", *arguments]
        # torchrun gives every worker one thread, Ray as many as it has CPUs: one.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        lines = list(RunFolder(f"{folder}/run").metrics)[WARM_UP_LINES:]
    return (
        statistics.median(line["speed/curr_iter_time"] for line in lines),
        statistics.median(line["speed/data_wait"] for line in lines),
    )


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    waits: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    for _ in range(ROUNDS):
        for name, launcher in LAUNCHERS.items():
            seconds, wait = step_time(launcher, sys.argv[1:])
            times[name].append(seconds)
            waits[name].append(wait)
    ratios = [ray / plain for ray, plain in zip(times["ray"], times["torchrun"], strict=True)]
    print(f"{'':10} {'ms per step':>24} {'data wait':>10}")
    for name in LAUNCHERS:
        shown = " ".join(f"{1000 * t:7.1f}" for t in times[name])
        print(f"{name:10} {shown:>24} {statistics.median(waits[name]):>10.2%}")
    print(f"ray / torchrun: {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})")
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"seconds_per_step": times, "data_wait": waits, "ratios": ratios}
    RESULTS.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What a sweep costs beside its trainings: Ray Tune, one Ray for all, results and report.

    python -m benchmarks.sweep [key=value ...]

The same trainings take turns as a sweep (`ray_jobs.sweep`) and one after another by hand
(`ray_jobs.train`, each with a Ray of its own, as a user would start them): the wall-clock time of
both, from command to prompt. With `concurrent=1` the ratio is what a sweep adds; with more, what it
gains. Mirroring in MLflow is off in both. Writes benchmarks/results/sweep.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks._runs import print_table, run_benchmark
from modular_lm.config.schema import key
from modular_lm.errors import RunFailedError
from modular_lm.sweep.folder import SweepFolder

WHAT = __doc__ or ""
CONFIG = Path(__file__).parents[1] / "configs" / "ablation_debug.yaml"


@dataclass
class Options:
    rounds: int = key(1, "how often each takes its turn", ge=1)
    steps: int = key(1000, "steps of each training", ge=1)
    seeds: int = key(1, "trainings of each of the three variants", ge=1)
    concurrent: int = key(1, "trials at a time", ge=1)


def timed(module: str, arguments: list[str]) -> float:
    """Seconds that a job takes, which must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, text=True, capture_output=True
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise RunFailedError(f"{module}: exit code {done.returncode}: {said}")
    return time.monotonic() - began


def one_round(o: Options, folder: Path) -> tuple[float, list[float]]:
    """Seconds of the sweep, and of each of its trainings by hand."""
    swept = folder / "sweep"
    sweep = timed(
        "ray_jobs.sweep",
        [
            f"config={CONFIG}", f"dump_dir={swept}", f"steps={o.steps}", "sweep.budget=steps",
            f"sweep.seeds={list(range(o.seeds))}", f"sweep.max_concurrent={o.concurrent}",
            "logging.mlflow.enabled=false", f"logging.freq={max(1, o.steps // 20)}",
            f"checkpoint.eval.every={max(1, o.steps // 4)}",
            f"checkpoint.dump.every={max(1, o.steps // 4)}",
        ],
    )  # fmt: skip
    by_hand = []
    for trial in SweepFolder(swept).trials():
        config = folder / f"{trial['name']}.yaml"
        config.write_text(yaml.safe_dump(trial["given"]))
        hand = folder / "hand" / trial["name"]
        by_hand.append(timed("ray_jobs.train", [f"config={config}", f"dump_dir={hand}"]))
    return sweep, by_hand


def benchmark(_: list[str], o: Options) -> dict[str, Any]:
    rounds: list[tuple[float, list[float]]] = []

    def rows() -> Any:
        for number in range(o.rounds):
            with tempfile.TemporaryDirectory(prefix="mlm-bench") as scratch:
                sweep, by_hand = one_round(o, Path(scratch))
            rounds.append((sweep, by_hand))
            each = " ".join(f"{seconds:.0f}" for seconds in by_hand)
            yield [str(number), f"{sweep:.0f}", each, f"{sweep / sum(by_hand):.3f}"]

    print_table(["round", "sweep (s)", "by hand (s)", "sweep / by hand"], rows())
    return {"rounds": [{"sweep": s, "by_hand": h, "ratio": s / sum(h)} for s, h in rounds]}


if __name__ == "__main__":
    run_benchmark("sweep", Options, [], benchmark, WHAT)

"""How fast training is: against torchrun, against other loops, against the machine's own limit.

    python -m benchmarks.train [mode ...] [key=value ...]

launcher      step time under `ray_jobs.train` against the same trainer under torchrun
peers         one process of our trainer against `transformers`' Llama of the same shape with AdamW
              (and litgpt's, if `litgpt=PYTHON` names an interpreter that has it), and all against
              the rate of this machine's fastest matrix product, measured between them
checkpoint    how long a save stops training: asynchronous against synchronous
grid          on a GPU: 125 M, 350 M and 1 B parameters, dense and modular, MFU and memory

Whatever is compared takes turns, and the ratios are those within a round: absolute times of one
machine mean little elsewhere. Prints tables and writes benchmarks/results/train.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._runs import open_source, print_table, run_benchmark
from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import Dtype, ModelConfig, TokenizerConfig, key
from modular_lm.errors import RunFailedError
from modular_lm.model.flops import flops_per_token, parameters
from modular_lm.model.sizes import sizes_of
from modular_lm.tracking.run_folder import RunFolder

WHAT = __doc__ or ""
MODES = ("launcher", "peers", "checkpoint", "grid")
WARM_UP_STEPS = 10
LINE = 5  # steps of a line of metrics
VOCAB = 32_000
PEER_LOOP = Path(__file__).with_name("_peer_loop.py")
# Nothing but training: what is saved, validated or mirrored beside it is measured apart.
BARE = [
    "config=configs/debug.yaml", f"logging.freq={LINE}", "logging.mlflow.enabled=false",
    "checkpoint.dump.every=0", "checkpoint.eval.every=0", "eval.validation.max_docs=0",
]  # fmt: skip
# Name -> dim, layers, heads; with a vocabulary of VOCAB tied to no head.
GRID = {"125M": (768, 12, 12), "350M": (1024, 24, 16), "1B": (2048, 18, 16)}
GRID_MODELS = {
    "dense": ["model.module_seq_len=null", "model.module_agg=drop"],
    "modular": ["model.module_seq_len=512", "model.module_agg=stack", "model.module_n_summary=4",
                "model.module_lookback=128"],
}  # fmt: skip


@dataclass
class Options:
    rounds: int = key(3, "how often each takes its turn", ge=1)
    steps: int = key(60, "steps of a turn, the first ten of which warm up", ge=2 * WARM_UP_STEPS)
    workers: int = key(2, "launcher: training processes", ge=1)
    threads: int = key(1, "peers, checkpoint: threads of a process", ge=1)
    dim: int = key(256, "peers, checkpoint: width", ge=1)
    n_layers: int = key(4, "peers, checkpoint: layers", ge=1)
    seq_len: int = key(512, "peers, checkpoint: tokens of a sample", ge=1)
    batch_size: int = key(4, "peers, checkpoint, grid: samples of a step", ge=1)
    dtype: Dtype = key("fp32", "peers, checkpoint: type of the computation")
    device: str = key("cpu", "peers, checkpoint: cpu or cuda")
    compile: bool = key(False, "peers: torch.compile, ours by layer, theirs as a whole")
    litgpt: str | None = key(None, "peers: a Python with litgpt and the same torch")
    save_every: int = key(20, "checkpoint: steps between two saves", ge=1)
    lengths: list[int] = key([2048, 4096, 8192], "grid: tokens of a sample")
    models: list[str] = key(list(GRID), "grid: sizes")
    compiled: list[bool] = key([False, True], "grid: without and with torch.compile by layer")


# ------------------------------------------------------------------ running


def torchrun(processes: int) -> list[str]:
    """The command that trains with so many processes, without Ray."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, f"--nproc-per-node={processes}", "-m", "modular_lm.train"]


def train(command: list[str], arguments: list[str], threads: int = 1) -> RunFolder:
    """Run one job in a folder that goes with this process; returns the folder."""
    where = tempfile.mkdtemp(dir=_SCRATCH.name)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    _call([*command, *BARE, f"dump_dir={where}/run", *arguments], environment)
    return RunFolder(f"{where}/run")


def _call(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise RunFailedError(f"{' '.join(command)}: exit code {done.returncode}: "
                             f"{done.stderr.strip()[-2000:]}")  # fmt: skip
    return done.stdout


_SCRATCH = tempfile.TemporaryDirectory(prefix="mlm-bench")


def settled(folder: RunFolder) -> list[dict[str, float]]:
    """The lines of metrics after the warm-up."""
    return [line for line in folder.metrics if line["global_step"] > WARM_UP_STEPS]


def step_time(folder: RunFolder) -> float:
    """Median seconds of a step."""
    return statistics.median(line["speed/curr_iter_time"] for line in settled(folder))


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}..{max(values):.3f})"


# ------------------------------------------------------------------ launcher


def launcher(o: Options) -> dict[str, Any]:
    """Ray Train against torchrun, the same trainer in as many processes."""
    commands = {
        "ray": [sys.executable, "-m", "ray_jobs.train"],
        "torchrun": torchrun(o.workers),
    }
    arguments = [f"steps={o.steps}", f"ray.num_workers={o.workers}"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    waits: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(o.rounds):
        for name, command in commands.items():
            folder = train(command, arguments)
            times[name].append(step_time(folder))
            waits[name] += [line["speed/data_wait"] for line in settled(folder)]
    ratios = [ray / plain for ray, plain in zip(times["ray"], times["torchrun"], strict=True)]
    print_table(
        [f"{o.workers} processes", "ms per step", "data wait", "ray / it"],
        (
            [
                name,
                " ".join(f"{1000 * t:.1f}" for t in times[name]),
                f"{statistics.median(waits[name]):.2%}",
                spread(ratios) if name == "torchrun" else "",
            ]
            for name in commands
        ),
    )
    return {"seconds_per_step": times, "data_wait": waits, "ratios": ratios}


# ------------------------------------------------------------------ peers


def model_keys(o: Options) -> list[str]:
    """The dense model of `peers` and `checkpoint`, as keys of a job."""
    heads = max(1, o.dim // 64)
    return [
        f"model.dim={o.dim}", f"model.n_layers={o.n_layers}", f"model.n_heads={heads}",
        f"model.vocab_size={VOCAB}", "model.module_seq_len=null", "model.module_agg=drop",
        f"data.seq_len={o.seq_len}", f"data.batch_size={o.batch_size}",
        f"distributed.model_dtype={o.dtype}", f"ray.use_gpu={str(o.device == 'cuda').lower()}",
    ]  # fmt: skip


def model_of(o: Options) -> ModelConfig:
    """The same model, resolved."""
    given = ModelConfig(dim=o.dim, n_layers=o.n_layers, n_heads=max(1, o.dim // 64),
                        multiple_of=64, module_agg="drop")  # fmt: skip
    return resolve_model(given, o.seq_len, VOCAB)


def write_peer_input(o: Options, folder: Path) -> list[str]:
    """The shape and the very tokens that ours trains on, for `_peer_loop`."""
    sizes = sizes_of(model_of(o))
    shape = {**dataclasses.asdict(sizes), "seq_len": o.seq_len, "dtype": o.dtype,
             "device": o.device, "compile": o.compile}  # fmt: skip
    shape.pop("modules")
    data = open_source("builtin", None, TokenizerConfig(), o.seq_len, o.batch_size)
    tokens = data.read(np.arange(o.steps * o.batch_size))
    np.save(folder / "tokens.npy", tokens.reshape(o.steps, o.batch_size, -1))
    (folder / "shape.json").write_text(json.dumps(shape))
    return [str(folder / "shape.json"), str(folder / "tokens.npy")]


def peers(o: Options) -> dict[str, Any]:
    """One process each, in turns; FLOPs are the model's formula for all."""
    interpreters = {"transformers": sys.executable}
    if o.litgpt is not None:
        interpreters["litgpt"] = o.litgpt
    inputs = write_peer_input(o, Path(_SCRATCH.name))
    environment = {**os.environ, "OMP_NUM_THREADS": str(o.threads)}
    arguments = [
        *model_keys(o),
        f"steps={o.steps}",
        f"distributed.compile={str(o.compile).lower()}",
    ]
    times: dict[str, list[float]] = {name: [] for name in ("ours", *interpreters)}
    peaks = []
    for _ in range(o.rounds):
        folder = train([sys.executable, "-m", "modular_lm.train"], arguments, o.threads)
        times["ours"].append(step_time(folder))
        for name, python in interpreters.items():
            printed = _call([python, str(PEER_LOOP), name, *inputs], environment)
            seconds = json.loads(printed.splitlines()[-1])
            times[name].append(statistics.median(seconds[WARM_UP_STEPS:]))
        peaks.append(matmul_rate(o))
    tokens = o.batch_size * o.seq_len
    flops = flops_per_token(model_of(o), o.seq_len) * tokens
    ratios = {
        name: [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
        for name in interpreters
    }
    print(f"{parameters(model_of(o)).total:,} parameters, {tokens:,} tokens a step; fastest matrix "
          f"product {max(peaks) / 1e9:,.0f} GFLOP/s")  # fmt: skip
    print_table(
        ["one process", "tok/s", "of the product", "ours is faster"],
        (
            [
                name,
                f"{tokens / statistics.median(found):,.0f}",
                spread([flops / t / peak for t, peak in zip(found, peaks, strict=True)]),
                spread(ratios[name]) if name in ratios else "",
            ]
            for name, found in times.items()
        ),
    )
    return {"seconds_per_step": times, "matmul_flops": peaks, "ratios": ratios}


def matmul_rate(o: Options) -> float:
    """FLOP/s of the fastest of some matrix products with as many threads."""
    torch.set_num_threads(o.threads)
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    sizes = (512, 1024, 2048) if o.device == "cpu" else (4096, 8192, 16384)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=o.device, dtype=dtype) for _ in range(2))
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(a, b)
            if o.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


# ------------------------------------------------------------------ checkpoint


def checkpoint(o: Options) -> dict[str, Any]:
    """What the event log says of saves of either kind."""
    found: dict[str, list[float]] = {"sync": [], "async": []}
    written: dict[str, list[float]] = {"sync": [], "async": []}
    for _, kind in itertools.product(range(o.rounds), found):
        arguments = [*model_keys(o), f"steps={o.steps}", f"checkpoint.dump.every={o.save_every}",
                     f"checkpoint.async_save={str(kind == 'async').lower()}"]  # fmt: skip
        folder = train([sys.executable, "-m", "modular_lm.train"], arguments, o.threads)
        saves = [e for e in folder.events() if e["event"] == "checkpoint" and e["step"] < o.steps]
        found[kind].append(statistics.median(save["seconds_blocked"] for save in saves))
        written[kind].append(statistics.median(save["seconds"] for save in saves))
    ratios = [a / s for a, s in zip(found["async"], found["sync"], strict=True)]
    print_table(
        ["save", "training waits (ms)", "until it is whole (ms)", "async / sync"],
        (
            [
                kind,
                f"{1000 * statistics.median(found[kind]):.1f}",
                f"{1000 * statistics.median(written[kind]):.1f}",
                spread(ratios) if kind == "async" else "",
            ]
            for kind in found
        ),
    )
    return {"seconds_blocked": found, "seconds": written, "ratios": ratios}


# ------------------------------------------------------------------ grid


def grid(o: Options) -> dict[str, Any]:
    """MFU and memory of one GPU, a run for each cell."""
    cells: list[dict[str, Any]] = []

    def lines() -> Iterator[list[str]]:
        for size, length, kind, compiled in itertools.product(
            o.models, o.lengths, GRID_MODELS, o.compiled
        ):
            cell = grid_cell(o, size, length, kind, compiled)
            cells.append(cell)
            yield [
                size,
                str(length),
                kind,
                str(compiled).lower(),
                f"{cell['wps']:,.0f}",
                f"{cell['mfu']:.1%}",
                f"{cell['gib']:.1f}",
            ]

    print_table(["parameters", "T", "model", "compile", "tok/s", "MFU", "GiB"], lines())
    return {"cells": cells}


def grid_cell(o: Options, size: str, length: int, kind: str, compiled: bool) -> dict[str, Any]:
    """One configuration; the samples of a step hold 16 times `batch_size` x 2048 tokens at most."""
    dim, layers, heads = GRID[size]
    arguments = [
        f"model.dim={dim}", f"model.n_layers={layers}", f"model.n_heads={heads}",
        f"model.vocab_size={VOCAB}", *GRID_MODELS[kind], f"data.seq_len={length}",
        f"data.batch_size={max(1, o.batch_size * 2048 // length)}", f"steps={o.steps}",
        "distributed.model_dtype=bf16", f"distributed.compile={str(compiled).lower()}",
        "ray.use_gpu=true",
    ]  # fmt: skip
    lines = settled(train([sys.executable, "-m", "modular_lm.train"], arguments))
    middle = {name: statistics.median(line[name] for line in lines)
              for name in ("speed/wps", "speed/mfu", "memory/max_allocated")}  # fmt: skip
    return {
        "size": size,
        "seq_len": length,
        "model": kind,
        "compile": compiled,
        "wps": middle["speed/wps"],
        "mfu": middle["speed/mfu"],
        "gib": middle["memory/max_allocated"] / 1024,
    }


def benchmark(chosen: list[str], options: Options) -> dict[str, Any]:
    modes = {"launcher": launcher, "peers": peers, "checkpoint": checkpoint, "grid": grid}
    if chosen == list(MODES) and not torch.cuda.is_available():
        chosen = [mode for mode in chosen if mode != "grid"]
    return {mode: modes[mode](options) for mode in MODES if mode in chosen}


if __name__ == "__main__":
    run_benchmark("train", Options, MODES, benchmark, WHAT)

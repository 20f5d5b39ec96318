"""What a training line reports: throughput, model FLOPs utilisation, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil
import torch

# Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (their headline
# figures with sparsity are twice these). The first match counts, so longer names come first.
PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device; None where we do not know it."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def device_peak(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; None for CPUs, whose peak depends on more than a name."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_mib(device: torch.device) -> dict[str, float]:
    """Peak device memory since the last call on a GPU, resident memory of the process elsewhere."""
    if device.type != "cuda":
        return {"memory/rss": psutil.Process().memory_info().rss / 2**20}
    stats = {
        "memory/max_allocated": torch.cuda.max_memory_allocated(device) / 2**20,
        "memory/max_reserved": torch.cuda.max_memory_reserved(device) / 2**20,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return stats


@dataclass
class Stopwatch:
    """Time between two metrics lines: all of it, and the part spent waiting for data."""

    steps: int = 0
    waited: float = 0.0
    paused: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def read(self, tokens_per_step: int, flops_per_token: float, peak: float | None) -> dict:
        """The speed figures since the last call; starts the next interval.

        MFU is model FLOPs per second (no recomputation counted, see model.flops) over the peak of
        all devices, with `peak` that sum.
        """
        now = time.perf_counter()
        elapsed = max(now - self._since - self.paused, 1e-9)
        speed = self.steps * tokens_per_step / elapsed
        figures = {
            "speed/wps": speed,
            "speed/curr_iter_time": elapsed / max(self.steps, 1),
            "speed/data_load_time": self.waited / max(self.steps, 1),
            "speed/data_wait": self.waited / elapsed,
            "speed/FLOPS": speed * flops_per_token,
        }
        if peak:
            figures["speed/mfu"] = speed * flops_per_token / peak
        self.steps, self.waited, self.paused, self._since = 0, 0.0, 0.0, now
        return figures

from __future__ import annotations

import time

import pytest
import torch

from modular_lm.train.metrics import Stopwatch, device_peak, memory_mib, peak_flops

# Dense bf16 FLOP/s under the names that torch.cuda.get_device_name returns. NVIDIA's data sheets
# head their tables with sparsity: H100 SXM 1979, PCIe 1513, NVL 1671, B200 4500 (DGX), L40S 733.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": None,
    "NVIDIA H800": None,
    "NVIDIA A10": None,
    "NVIDIA GeForce RTX 4090": None,
    "Tesla T4": None,
    "": None,
}


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_peaks_are_the_dense_rates_of_the_data_sheets(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_cpu_has_no_stated_peak() -> None:
    assert device_peak(torch.device("cpu")) is None


def test_memory_on_a_cpu_is_that_of_this_process() -> None:
    (name, mib), *others = memory_mib(torch.device("cpu")).items()
    assert (name, others) == ("memory/rss", [])
    assert 50 < mib < 64 * 1024


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    watch = Stopwatch()
    watch.read(1, 1.0, None)  # an interval begins with the last reading
    return watch


def test_speed_counts_the_steps_and_not_the_pauses_between_them(
    clock: Clock, watch: Stopwatch
) -> None:
    watch.steps, watch.waited, watch.paused = 5, 0.5, 6.0
    clock.now += 16.0  # ten seconds of training, six of validation and saving
    assert watch.read(tokens_per_step=400, flops_per_token=1e6, peak=1e9) == pytest.approx(
        {
            "speed/wps": 5 * 400 / 10,
            "speed/curr_iter_time": 2.0,
            "speed/data_load_time": 0.1,
            "speed/data_wait": 0.05,
            "speed/FLOPS": 200 * 1e6,
            "speed/mfu": 0.2,
        }
    )


def test_each_reading_begins_a_new_interval(clock: Clock, watch: Stopwatch) -> None:
    watch.steps, watch.waited, watch.paused = 3, 1.0, 2.0
    clock.now += 5.0
    watch.read(10, 1.0, None)
    watch.steps = 4
    clock.now += 8.0
    figures = watch.read(10, 1.0, None)
    assert figures["speed/wps"] == 4 * 10 / 8
    assert figures["speed/curr_iter_time"] == 2.0
    assert figures["speed/data_load_time"] == figures["speed/data_wait"] == 0.0


def test_without_a_known_peak_there_is_no_utilisation(clock: Clock, watch: Stopwatch) -> None:
    clock.now += 1.0
    assert "speed/mfu" not in watch.read(10, 1.0, None)


def test_an_interval_without_time_or_steps_divides_by_nothing(watch: Stopwatch) -> None:
    figures = watch.read(10, 1.0, 1e9)
    assert all(0.0 <= figure <= 1e-9 for figure in figures.values())

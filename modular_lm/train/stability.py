"""What is done about steps that go wrong numerically: skips are counted, spikes are told of.

A step whose loss or gradient is not finite changed nothing (`stepping`); here it is counted, and
after `optim.max_skipped` of them in a row the run ends, with what it saw last in a dump. A loss far
above those before it is reported, no more. Each step is looked at when the next one is under way,
so that nothing waits for a GPU; all ranks see the same figures and come to the same end.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modular_lm.config import TrainConfig
from modular_lm.errors import EXIT_FAILED, AgreedError, DivergedError
from modular_lm.files import write_text_atomic
from modular_lm.parallel import World
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.stepping import Figures, StepResult

_FEWEST = 16  # losses before which nothing is called a spike
_SIGMA = 1.4826  # standard deviations of a normal distribution per median absolute deviation


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it: their median, and their robust standard deviation."""

    median: float
    deviation: float


class SpikeDetector:
    """Tells where a loss leaves the band of the last `window` ones upwards; 0: never.

    The band is their median plus `threshold` times their median absolute deviation, scaled as a
    standard deviation: single outliers hardly move it, and a new level becomes the norm after half
    a window. A loss that stays outside is told of once.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._window = window
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)
        self._outside = False

    def see(self, loss: float) -> Spike | None:
        """Take the next (finite) loss in; a spike if one begins with it."""
        spike = None
        if self._losses and len(self._losses) >= min(_FEWEST, self._window):
            before = np.array(self._losses)
            median = float(np.median(before))
            deviation = _SIGMA * float(np.median(np.abs(before - median)))
            outside = loss > median + self._threshold * deviation
            if outside and not self._outside:
                spike = Spike(median, deviation)
            self._outside = outside
        self._losses.append(loss)
        return spike


class Stability:
    """Looks at every step of a run, one step late. All ranks do, and at the same places.

    skipped, spikes: how many there were in the run so far; streak: how many steps in a row, up to
    the last one looked at, were skipped.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        global_batch_size: int,
        record: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """record: takes the events `skipped` and `spike`, on every rank."""
        c = config.optim
        self.skipped = self.spikes = self.streak = 0
        self._max_skipped = c.max_skipped
        self._samples = global_batch_size
        self._tokens = global_batch_size * config.data.seq_len
        self._world = world
        self._folder = folder
        self._record = record
        self._detector = SpikeDetector(c.spike_window, c.spike_threshold)
        self._pending: StepResult | None = None

    def follow(self, result: StepResult) -> None:
        """Look at the step before this one, and at this one next time. A collective.

        Raises AgreedError after too many skipped steps in a row.
        """
        self.settle()
        self._pending = result

    def settle(self) -> None:
        """Look at the last step now, waiting for it if need be. A collective."""
        result, self._pending = self._pending, None
        if result is None:
            return
        figures, first = result.read(), result.rows.step * self._samples
        about = {
            "step": result.rows.step + 1,
            "samples": [first, first + self._samples - 1],
            "loss": figures.nll / self._tokens,
            "grad_norm": figures.grad_norm,
        }
        if figures.finite:
            self.streak = 0
            self._watch(about)
        else:
            self._skip(about, result, figures)

    def _watch(self, about: dict[str, Any]) -> None:
        spike = self._detector.see(about["loss"])
        if spike is None:
            return
        self.spikes += 1
        self._record("spike", {**about, "median": spike.median, "deviation": spike.deviation})

    def _skip(self, about: dict[str, Any], result: StepResult, figures: Figures) -> None:
        self.skipped += 1
        self.streak += 1
        self._record("skipped", {**about, "in_a_row": self.streak})
        if self.streak >= self._max_skipped:
            self._give_up(about, result, figures)

    def _give_up(self, about: dict[str, Any], result: StepResult, figures: Figures) -> None:
        """Write what the last step saw, and end the run."""
        step, (first, last) = about["step"], about["samples"]
        losses = self._world.gather(figures.own_nll / max(1, result.rows.tokens[:, 1:].size))
        about = {**about, "lr": result.lr, "loss_of_rank": losses, "in_a_row": self.streak}
        try:
            self._dump(about, result)
            rows = f"are in {self._folder.dump(step)}"
        except AgreedError as error:  # not what the run ends for
            rows = f"could not be written ({error})"
        begin = step - self.streak + 1
        raise DivergedError(
            f"steps {begin}..{step}: loss or gradient was not finite {self.streak} times in a row "
            f"(optim.max_skipped={self._max_skipped}); no weight was changed by them; the "
            f"rows of step {step} (samples {first}..{last}) {rows}; the same command "
            "continues from the last checkpoint: lower optim.lr or optim.clip, or look at the data",
            EXIT_FAILED,
        )

    def _dump(self, about: dict[str, Any], result: StepResult) -> None:
        """A collective. Raises AgreedError if a rank could not write."""
        folder = self._folder.dump(about["step"])

        def write() -> None:
            _write_rows(folder, self._world.rank, result)
            self._write_about(folder, about)

        self._world.together(write, f"dump {folder}")

    def _write_about(self, folder: Path, about: dict[str, Any]) -> None:
        if self._world.rank == 0:
            # With NaN and Infinity as Python writes and reads them.
            write_text_atomic(folder / "about.json", json.dumps(about, indent=1) + "\n")


def _write_rows(folder: Path, rank: int, result: StepResult) -> None:
    """The rows of one rank as `rank_00000.npz`: index [n], tokens [n, seq_len + 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = result.rows
    np.savez(folder / f"rank_{rank:05d}.npz", index=rows.index, tokens=rows.tokens)

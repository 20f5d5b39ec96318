"""The training loop: plain torch, driven by an iterator of batches and a few callbacks.

It knows nothing of Ray, MLflow or where its batches come from; whoever starts it (a Ray Train
worker, torchrun, a plain process) hands it a world, the rows of each step and the callbacks. Every
rank runs the same loop; what several ranks must agree on is agreed by a collective at the same
place of the same step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from modular_lm.config import TrainConfig
from modular_lm.data.dataset import StepRows, rank_range
from modular_lm.data.fingerprint import digest
from modular_lm.errors import RunFailedError, UserFacingError
from modular_lm.eval.documents import write_documents
from modular_lm.eval.perplexity import Validation, bits_per_byte, text_bytes
from modular_lm.eval.positions import write_curves
from modular_lm.model.columns import begin_column
from modular_lm.model.flops import flops_per_token
from modular_lm.optim import build_optimizers
from modular_lm.parallel import World, build_model
from modular_lm.tokenizer import Tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train import checkpoint, inventory
from modular_lm.train.checkpoint import TrainState
from modular_lm.train.initial import load_initial
from modular_lm.train.metrics import Stopwatch, device_peak, memory_mib
from modular_lm.train.saving import Saver
from modular_lm.train.stability import Stability
from modular_lm.train.stepping import Stepper, StepResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` ended: after `step` steps, complete or on request."""

    status: Literal["done", "stopped"]
    step: int
    loss: float | None


@dataclass
class Callbacks:
    """What happens beside the loop. Every rank calls them; most act on rank 0 only.

    metrics: a training line; evaluation: a line of validation metrics; saved: a complete
    checkpoint; stop: asked before each step, a reason if this rank was told to stop; stepped:
    after each step, how many are done; trouble: kind and fields of a skipped step or a loss spike;
    phase: around what is no step and may take longer, by name.
    """

    metrics: Callable[[dict[str, Any]], None]
    evaluation: Callable[[dict[str, Any]], None]
    saved: Callable[[dict[str, Any]], None]
    stop: Callable[[], str | None]
    stepped: Callable[[int], None]
    trouble: Callable[[str, dict[str, Any]], None]
    phase: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: (
        contextlib.nullcontext()
    )


@dataclass
class Trainer:
    """A model in training on this rank.

    global_batch_size is fixed for the life of the run; the micro-batches follow from it, from
    data.batch_size and from the number of ranks.
    """

    config: TrainConfig
    world: World
    folder: RunFolder
    tokenizer: Tokenizer
    global_batch_size: int
    callbacks: Callbacks
    validation: Validation | None = None

    def __post_init__(self) -> None:
        c = self.config
        self.model = build_model(c, self.world)
        self.optimizers = build_optimizers(self.model, c.optim)
        self.stepper = Stepper(
            c, self.world, self.model, self.optimizers, self.tokenizer, self.global_batch_size
        )
        self.stability = Stability(
            c, self.world, self.folder, self.global_batch_size, self.callbacks.trouble
        )
        self.step = self.tokens = 0
        # Of the samples seen so far: this rank's part of the digest of all of them.
        self._seen = 0
        self.last_loss: float | None = None
        self.checkpoints = inventory.checkpoints_of(c.checkpoint, self.folder.path)
        self._saver = Saver(self.checkpoints, c, self.tokenizer, self.world)
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._clock = Stopwatch()
        self._tokens_per_step = self.stepper.tokens
        self._flops_per_token = flops_per_token(c.model, c.data.seq_len)
        peak = device_peak(self.world.device)
        self._peak = peak * self.world.size if peak else None

    def resume(self, start_step: int) -> None:
        """Load the checkpoint of `start_step`; for 0, the weights that a new run starts from.

        A collective.
        """
        if start_step == 0:
            self._begin()
            return
        folder = inventory.step_folder(self.checkpoints, start_step)
        state = checkpoint.load(folder, self.model, self.optimizers.parts, self.world)
        if (state.step, state.global_batch_size) != (start_step, self.global_batch_size):
            raise RunFailedError(
                f"{folder}: holds step {state.step} of {state.global_batch_size} samples a step, "
                f"expected step {start_step} of {self.global_batch_size}"
            )
        self.step = self._saved_step = start_step
        self.tokens = state.tokens
        self.stability.skipped, self.stability.spikes = state.skipped, state.spikes
        if self.world.rank == 0:
            self._seen = int(state.data_digest, 16)
        log.info("resumed at step %d from %s", start_step, folder)

    def _begin(self) -> None:
        """The weights of step 0, where they are not simply drawn."""
        c = self.config
        if path := c.checkpoint.init_ckpt_path:
            load_initial(path, self.model, c.data.tokenizer, self.world)
        if c.model.create_module_name is not None:
            begin_column(self.model, c.model.create_module_name, c.model.create_module_init)

    def run(self, steps: Iterator[StepRows], stop_step: int) -> Outcome:
        """Train up to `stop_step` on the rows of `steps`, which begin at the current step."""
        try:
            outcome = self._run(steps, stop_step)
            self._collect()
        except Exception:
            # What is on its way to the disk gets there.
            self._saver.settle()
            raise
        return outcome

    def _run(self, steps: Iterator[StepRows], stop_step: int) -> Outcome:
        self.model.train()
        self._clock = Stopwatch()
        self._saved_at = time.monotonic()
        while self.step < stop_step:
            rows = self._next(steps)
            if self._agreed_stop(rows):
                self._save(rolling=True)
                return Outcome("stopped", self.step, self.last_loss)
            assert isinstance(rows, StepRows)
            result = self.stepper.step(rows)
            self.step += 1
            self.stability.follow(result)
            self.tokens += self._tokens_per_step
            self._seen += digest(rows.index, rows.tokens)
            self._clock.steps += 1
            self.callbacks.stepped(self.step)
            if self.step % self.config.logging.freq == 0 or self.step in (1, stop_step):
                self._report(result)
            self._after_step(stop_step)
        return Outcome("done", self.step, self.last_loss)

    # -------------------------------------------------------------- one step

    def _next(self, steps: Iterator[StepRows]) -> StepRows | UserFacingError:
        """The rows of this step, or why this rank has none: not raised, others may have theirs."""
        asked = time.perf_counter()
        try:
            rows = next(steps, None)
        except UserFacingError as error:
            return error
        self._clock.waited += time.perf_counter() - asked
        expected = np.arange(
            *rank_range(
                self.step, self.global_batch_size, self.world.data_rank, self.world.data_size
            )
        )
        if rows is None or not np.array_equal(rows.index, expected):
            got = "nothing" if rows is None else f"{rows.index[:1]}..{rows.index[-1:]}"
            return RunFailedError(
                f"step {self.step}, rank {self.world.rank}: expected the samples {expected[0]}.."
                f"{expected[-1]}, the data stream delivered {got}"
            )
        return rows

    # -------------------------------------------------------------- beside the steps

    def _agreed_stop(self, rows: StepRows | UserFacingError) -> bool:
        """Whether any rank was asked to stop; sees to checkpoints meanwhile. A collective.

        Raises AgreedError if any rank got no rows, or could not write a checkpoint.
        """
        reason = self.callbacks.stop()
        failed = isinstance(rows, UserFacingError)
        told, failures, written, overdue = self.world.sum(
            float(reason is not None), float(failed), float(self._saver.written), self._overdue()
        )
        if written == self.world.size:
            self._collect()
        if failures:
            self.world.together(lambda: _raise(rows), "the training data cannot be read")
        if overdue and not told:
            self.stability.settle()
            if not self.stability.streak:
                self._save(rolling=True)
        if told and self.world.rank == 0:
            log.info("stopping at step %d: %s", self.step, reason or "another rank was asked to")
        return bool(told)

    def _after_step(self, stop_step: int) -> None:
        cadence, last = self.config.checkpoint, self.step == stop_step
        evaluate = _due(self.step, cadence.eval.every)
        if (last or evaluate) and self.validation is not None:
            with self._paused("validation"):
                scores = self.validation.score(self.model, self.world)
                if self.world.rank == 0:
                    # Before the line that tells of it.
                    write_curves(self.folder.curves_file(self.step), self.step, scores.curves)
                    path = self.folder.documents_file(self.step)
                    write_documents(path, self.step, scores.documents)
            self.callbacks.evaluation({"global_step": self.step, **scores.metrics})
        due = evaluate or _due(self.step, cadence.dump.every)
        if due and not last:
            self.stability.settle()
        # Last, so that the checkpoint of a step exists only when all else of the step is done. None
        # of weights that give no finite loss: it might push out one of better weights.
        if last or (due and not self.stability.streak):
            self._save()

    def _overdue(self) -> float:
        """Whether so much work is unsaved that a rolling checkpoint is due, by rank 0's clock."""
        minutes = self.config.checkpoint.rolling.minutes
        if not minutes or self.world.rank or self._saved_step == self.step:
            return 0.0
        return float(time.monotonic() - self._saved_at >= 60 * minutes)

    def _save(self, *, rolling: bool = False) -> None:
        if self._saved_step == self.step:
            return
        self._collect()
        self.stability.settle()
        seen = self._digest(*self.world.sum_over_rows(*self._halves()))
        state = TrainState(
            self.step,
            self.global_batch_size,
            self.tokens,
            seen,
            self.stability.skipped,
            self.stability.spikes,
        )
        with self._paused("saving"):
            self._saved_at = time.monotonic()
            self._saver.save(self.model, self.optimizers.parts, state, rolling=rolling)
        self._saved_step = self.step
        if not self.config.checkpoint.async_save:
            self._collect()

    def _collect(self) -> None:
        """See the save that is under way to its end, if there is one, and tell of it."""
        if self._saver.busy:
            with self._paused("waiting for the checkpoint"):
                saved = self._saver.collect()
            self.callbacks.saved(saved)

    @contextlib.contextmanager
    def _paused(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        with self.callbacks.phase(what):
            yield
        self._clock.paused += time.perf_counter() - began

    def _report(self, result: StepResult) -> None:
        """Hand the metrics line of the step just done to the callback. A collective."""
        self.stability.settle()
        figures = result.read()
        n_bytes = text_bytes(self.tokenizer, result.rows.tokens)
        total_bytes, low, high = self.world.sum_over_rows(float(n_bytes), *self._halves())
        self.last_loss = figures.nll / self._tokens_per_step
        self.callbacks.metrics(
            {
                "global_step": self.step,
                "loss/out": self.last_loss,
                "loss/bpb": bits_per_byte(figures.nll, int(total_bytes)),
                "optim/lr": result.lr,
                "optim/grad_norm": figures.grad_norm,
                "optim/skipped": self.stability.skipped,
                "optim/spikes": self.stability.spikes,
                "optim/total_tokens": self.tokens,
                "data/digest": self._digest(low, high),
                **self._clock.read(self._tokens_per_step, self._flops_per_token, self._peak),
                **memory_mib(self.world.device),
            }
        )

    def _halves(self) -> tuple[float, float]:
        """`_seen` as two numbers that can be summed exactly in fp64 over all ranks."""
        return float(self._seen % 2**32), float(self._seen // 2**32 % 2**32)

    @staticmethod
    def _digest(low: float, high: float) -> str:
        """The digest of all samples seen, 16 hexadecimal digits, from the sums of `_halves`."""
        return f"{(int(low) + (int(high) << 32)) % 2**64:016x}"


def _raise(rows: StepRows | UserFacingError) -> None:
    if isinstance(rows, UserFacingError):
        raise rows


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0

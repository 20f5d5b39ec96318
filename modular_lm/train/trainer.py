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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from modular_lm.config import TrainConfig
from modular_lm.data.dataset import StepRows, document_ids, micro_batches, rank_range
from modular_lm.data.fingerprint import digest
from modular_lm.errors import RunFailedError, UserFacingError
from modular_lm.eval.perplexity import Validation, bits_per_byte, text_bytes
from modular_lm.eval.positions import write_curves
from modular_lm.model.columns import begin_column
from modular_lm.model.flops import flops_per_token
from modular_lm.optim import apply_settings, build_optimizer, learning_rate
from modular_lm.parallel import World, build_model, sync_gradients
from modular_lm.tokenizer import Tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train import checkpoint, inventory
from modular_lm.train.checkpoint import TrainState
from modular_lm.train.metrics import Stopwatch, device_peak, memory_mib

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
    after each step, how many are done.
    """

    metrics: Callable[[dict[str, Any]], None]
    evaluation: Callable[[dict[str, Any]], None]
    saved: Callable[[dict[str, Any]], None]
    stop: Callable[[], str | None]
    stepped: Callable[[int], None]


@dataclass
class _StepResult:
    """Of one optimizer step on this rank: summed nll [on device], its rows, global grad norm."""

    nll: torch.Tensor
    rows: StepRows
    grad_norm: torch.Tensor
    lr: float


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
        self.optimizer = build_optimizer(self.model, c.optim)
        self.step = self.tokens = 0
        # Of the samples seen so far: this rank's part of the digest of all of them.
        self._seen = 0
        self.last_loss: float | None = None
        self._saved_step = 0
        self._clock = Stopwatch()
        # Every position of a packed sample has a target, so the token count needs no collective.
        self._tokens_per_step = self.global_batch_size * c.data.seq_len
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
        folder = inventory.step_folder(self.folder.checkpoints, start_step)
        state = checkpoint.load(folder, self.model, self.optimizer, self.world)
        apply_settings(self.optimizer, self.config.optim)
        if (state.step, state.global_batch_size) != (start_step, self.global_batch_size):
            raise RunFailedError(
                f"{folder}: holds step {state.step} of {state.global_batch_size} samples a step, "
                f"expected step {start_step} of {self.global_batch_size}"
            )
        self.step = self._saved_step = start_step
        self.tokens = state.tokens
        if self.world.rank == 0:
            self._seen = int(state.data_digest, 16)
        log.info("resumed at step %d from %s", start_step, folder)

    def _begin(self) -> None:
        """The weights of step 0, where they are not simply drawn."""
        c = self.config
        if path := c.checkpoint.init_ckpt_path:
            checkpoint.load_model(Path(path), self.model, self.world)
        if c.model.create_module_name is not None:
            begin_column(self.model, c.model.create_module_name, c.model.create_module_init)

    def run(self, steps: Iterator[StepRows], stop_step: int) -> Outcome:
        """Train up to `stop_step` on the rows of `steps`, which begin at the current step."""
        self.model.train()
        self._clock = Stopwatch()
        while self.step < stop_step:
            rows = self._next(steps)
            if self._agreed_stop(rows):
                self._save()
                return Outcome("stopped", self.step, self.last_loss)
            assert isinstance(rows, StepRows)
            result = self._optimize(rows)
            self.step += 1
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
            *rank_range(self.step, self.global_batch_size, self.world.rank, self.world.size)
        )
        if rows is None or not np.array_equal(rows.index, expected):
            got = "nothing" if rows is None else f"{rows.index[:1]}..{rows.index[-1:]}"
            return RunFailedError(
                f"step {self.step}, rank {self.world.rank}: expected the samples {expected[0]}.."
                f"{expected[-1]}, the data stream delivered {got}"
            )
        return rows

    def _optimize(self, rows: StepRows) -> _StepResult:
        """One optimizer step: the gradient of the mean loss over all tokens of all ranks."""
        lr = learning_rate(self.config.optim, self.config.steps, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        most = -(-self.global_batch_size // self.world.size)
        parts = micro_batches(rows.tokens, most, self.config.data.batch_size)
        nll = torch.zeros((), device=self.world.device)
        for i, part in enumerate(parts):
            sync_gradients(self.model, i == len(parts) - 1)
            loss = self._loss(part) if len(part) else self._idle()
            # FSDP averages gradients over the ranks; undo that, a mean over tokens is wanted.
            (loss * (self.world.size / self._tokens_per_step)).backward()
            nll += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return _StepResult(nll, rows, norm, lr)

    def _loss(self, rows: np.ndarray) -> torch.Tensor:
        """The summed negative log-likelihood of rows [n, T + 1]."""
        device, documents = self.world.device, None
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
        if self.config.data.document_mask:
            documents = torch.from_numpy(document_ids(rows[:, :-1], self.tokenizer)).to(device)
        return self.model(tokens[:, :-1], tokens[:, 1:], documents).sum()

    def _idle(self) -> torch.Tensor:
        """A pass without weight, for a rank that has no rows left while others have.

        As long as theirs, so that it goes through the same modules.
        """
        shape = (1, self.config.data.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        return self.model(tokens, tokens).sum() * 0.0

    # -------------------------------------------------------------- beside the steps

    def _agreed_stop(self, rows: StepRows | UserFacingError) -> bool:
        """Whether any rank was asked to stop. A collective.

        Raises AgreedError if any rank got no rows.
        """
        reason = self.callbacks.stop()
        failed = isinstance(rows, UserFacingError)
        told, failures = self.world.sum(float(reason is not None), float(failed))
        if failures:
            self.world.together(lambda: _raise(rows), "the training data cannot be read")
        if told and self.world.rank == 0:
            log.info("stopping at step %d: %s", self.step, reason or "another rank was asked to")
        return bool(told)

    def _after_step(self, stop_step: int) -> None:
        cadence, last = self.config.checkpoint, self.step == stop_step
        evaluate = _due(self.step, cadence.eval.every)
        if (last or evaluate) and self.validation is not None:
            with self._paused():
                scores = self.validation.score(self.model, self.world)
                if self.world.rank == 0:
                    # Before the line that tells of it.
                    write_curves(self.folder.curves_file(self.step), self.step, scores.curves)
            self.callbacks.evaluation({"global_step": self.step, **scores.metrics})
        # Last, so that the checkpoint of a step exists only when all else of the step is done.
        if last or evaluate or _due(self.step, cadence.dump.every):
            self._save()

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        seen = self._digest(*self.world.sum(*self._halves()))
        state = TrainState(self.step, self.global_batch_size, self.tokens, seen)
        with self._paused():
            saved = checkpoint.save(
                self.folder.checkpoints,
                self.model,
                self.optimizer,
                state,
                self.config,
                self.tokenizer,
                self.world,
            )
            if self.world.rank == 0:
                inventory.retain(self.folder.checkpoints, self.config.checkpoint)
        self._saved_step = self.step
        self.callbacks.saved(saved)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._clock.paused += time.perf_counter() - began

    def _report(self, result: _StepResult) -> None:
        """Hand the metrics line of the step just done to the callback. A collective."""
        n_bytes = text_bytes(self.tokenizer, result.rows.tokens)
        mine = (result.nll.item(), float(n_bytes), *self._halves())
        nll, total_bytes, low, high = self.world.sum(*mine)
        norm = result.grad_norm
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.last_loss = nll / self._tokens_per_step
        self.callbacks.metrics(
            {
                "global_step": self.step,
                "loss/out": self.last_loss,
                "loss/bpb": bits_per_byte(nll, int(total_bytes)),
                "optim/lr": result.lr,
                "optim/grad_norm": norm.item(),
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

"""One optimizer step: micro-batches, the gradient of the mean loss, its clipping, the update.

Nothing here waits for a GPU. Whether a step's loss and gradient are finite is decided on the
device, where it also decides whether weights change; the figures of a step travel to the host
meanwhile (`StepResult.read`) and are looked at later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from modular_lm.config import TrainConfig
from modular_lm.data.dataset import StepRows, document_ids, micro_batches
from modular_lm.model.lm import LanguageModel
from modular_lm.optim import Optimizers, learning_rate, local_squares, scale_gradients
from modular_lm.parallel import World, begin_micro_step
from modular_lm.tokenizer import Tokenizer


class Figures(NamedTuple):
    """Of one step: negative log-likelihood of all ranks and of this one, summed over tokens, and
    the global norm of the gradient before clipping."""

    nll: float
    own_nll: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        """Whether the step changed the weights: no rank's loss or gradient was NaN or infinite."""
        return bool(np.isfinite((self.nll, self.grad_norm)).all())


class StepResult:
    """A step just done on this rank: the rows it took, its learning rate, and its figures, which
    may still be on their way from the device."""

    def __init__(self, rows: StepRows, lr: float, figures: Tensor) -> None:
        """figures: [3], on any device, as in `Figures`."""
        self.rows = rows
        self.lr = lr
        self._arrived: torch.cuda.Event | None = None
        self._figures = figures
        if figures.is_cuda:
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Figures:
        """The figures; waits for the device to have done the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return Figures(*self._figures.tolist())


@dataclass(frozen=True)
class Stepper:
    """What an optimizer step works on.

    global_batch_size: samples per step, over all ranks.
    """

    config: TrainConfig
    world: World
    model: LanguageModel
    optimizers: Optimizers
    tokenizer: Tokenizer
    global_batch_size: int

    @property
    def tokens(self) -> int:
        """Scored tokens per step: every position of a packed sample has a target."""
        return self.global_batch_size * self.config.data.seq_len

    def step(self, rows: StepRows) -> StepResult:
        """Follow the gradient of the mean loss over all tokens of all ranks. A collective.

        Where that or a loss is not finite, neither weights nor optimizer change.
        """
        c = self.config.optim
        lr = learning_rate(c, self.config.steps, rows.step)
        self.optimizers.set_learning_rate(lr)
        own_nll = self._backward(rows)
        parameters = list(self.model.parameters())
        squares = local_squares(parameters, self.world.device)
        sums = torch.stack((own_nll.double() * self.world.counts_rows, squares))
        dist.all_reduce(sums)
        nll, norm = sums[0], sums[1].sqrt()
        scale_gradients(parameters, norm, c.clip)
        self.optimizers.step(found_inf=1.0 - (nll + norm).isfinite().float())
        self.optimizers.zero_grad()
        return StepResult(rows, lr, torch.stack((nll, own_nll.double(), norm)))

    def _backward(self, rows: StepRows) -> Tensor:
        """Gradients of the mean loss; this rank's summed nll."""
        most = -(-self.global_batch_size // self.world.data_size)
        parts = micro_batches(rows.tokens, most, self.config.data.batch_size)
        nll = torch.zeros((), device=self.world.device)
        for i, part in enumerate(parts):
            begin_micro_step(self.model, self.config.distributed, last=i == len(parts) - 1)
            loss = self._loss(part) if len(part) else self._idle()
            # FSDP averages gradients over data-parallel ranks; a mean over tokens is wanted.
            (loss * (self.world.data_size / self.tokens)).backward()
            nll += loss.detach()
        return nll

    def _loss(self, rows: np.ndarray) -> Tensor:
        """The summed negative log-likelihood of rows [n, T + 1]."""
        tokens, documents = self._upload(rows.astype(np.int64)), None
        if self.config.data.document_mask:
            documents = self._upload(document_ids(rows[:, :-1], self.tokenizer))
        return self.model(tokens[:, :-1], tokens[:, 1:], documents).sum()

    def _upload(self, array: np.ndarray) -> Tensor:
        """`array` on the device. From pinned memory, else the copy would wait for the device."""
        host = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.world.device, non_blocking=True)

    def _idle(self) -> Tensor:
        """A pass without weight, for a rank that has no rows left while others have.

        As long as theirs, so that it goes through the same modules.
        """
        shape = (1, self.config.data.seq_len)
        tokens = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        return self.model(tokens, tokens).sum() * 0.0

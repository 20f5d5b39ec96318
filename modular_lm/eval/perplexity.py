"""Validation: the loss of held-out documents, per source, weighted by tokens over all ranks.

One document per row, right-padded, cut at seq_len, so that chunks begin where documents do and
the score does not depend on the batch. Where a document's tokens are hard is in `positions`, how
hard each document is in `documents`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from modular_lm.data.reader import SourceReader
from modular_lm.eval.documents import DocumentScores
from modular_lm.eval.positions import ChunkCurves, LossSums, fold
from modular_lm.model.lm import IGNORE, LanguageModel
from modular_lm.parallel import World
from modular_lm.tokenizer import Tokenizer

Document = npt.NDArray[np.integer]

# Batches are padded to multiples of this: compiled kernels then meet few shapes.
_WIDTHS = 128


@dataclass(frozen=True)
class Scores:
    """What a validation found.

    metrics: `validation/<source>/<name>`, name being nll, ppl, bpb, avg_seqlen and those of
    `ChunkCurves.metrics`; curves: by source, empty where a document is one chunk. The source `all`
    stands for all of them together, where there are several. documents: by source, without `all`.
    """

    metrics: dict[str, float]
    curves: dict[str, ChunkCurves]
    documents: dict[str, DocumentScores]


@dataclass(frozen=True)
class _Sums:
    """Of some documents: losses by position, UTF-8 bytes scored, summed nll of each [D]."""

    losses: LossSums
    n_bytes: float
    documents: list[float]

    def __add__(self, other: _Sums) -> _Sums:
        """Of the documents of both."""
        return _Sums(
            self.losses + other.losses,
            self.n_bytes + other.n_bytes,
            self.documents + other.documents,
        )


class Validation:
    """The validation documents of some sources, and how to score a model on them.

    folders: source name -> its folder; max_docs: documents per source, the first ones of its
    validation split; chunk_len: that of the curves, none if None or not below seq_len. Every rank
    holds the same documents and scores its share.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        tokenizer: Tokenizer,
        seq_len: int,
        max_docs: int,
        batch_size: int,
        chunk_len: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._chunk_len = chunk_len if chunk_len and chunk_len < seq_len else None
        self._documents: dict[str, list[Document]] = {}
        for name, folder in folders.items():
            found = SourceReader(folder, "val").documents(max_docs)
            # A target needs a token before it.
            documents = [d[: seq_len + 1] for d in found if len(d) > 1]
            if documents:
                self._documents[name] = documents

    def score(self, model: LanguageModel, world: World) -> Scores:
        """Score the model on every source and on all of them together. A collective.

        nll: nats per token; avg_seqlen: mean number of scored tokens per document.
        """
        was_training = model.training
        model.eval()
        sums = {}
        for name, documents in self._documents.items():
            sums[name] = _over_ranks(self._score_share(model, world, documents), world)
        model.train(was_training)
        documents = {
            name: DocumentScores(sums[name].documents, [len(d) - 1 for d in found])
            for name, found in self._documents.items()
        }
        if len(sums) > 1:
            sums["all"] = reduce(add, sums.values())
        curves = {}
        if self._chunk_len is not None:
            curves = {name: fold(each.losses, self._chunk_len) for name, each in sums.items()}
        metrics = {}
        for name, each in sums.items():
            found = _metrics(each) | (curves[name].metrics() if name in curves else {})
            metrics |= {f"validation/{name}/{key}": value for key, value in found.items()}
        return Scores(metrics, curves, documents)

    @torch.no_grad()
    def _score_share(
        self, model: LanguageModel, world: World, documents: Sequence[Document]
    ) -> _Sums:
        """Sums over this rank's share of `documents`; 0 for each document of another rank."""
        # The ranks gather sharded weights together: each makes the same number of passes, of the
        # same width (which decides how many chunks there are), where need be with empty rows.
        together = world.data_size * self._batch_size
        step = math.lcm(_WIDTHS, world.tp_size)  # which split tokens evenly
        losses = LossSums.zeros(self._seq_len)
        by_document = torch.zeros(len(documents), dtype=torch.float64)
        n_bytes = 0
        for first in range(0, len(documents), together):
            everyone = documents[first : first + together]
            mine = everyone[world.data_rank :: world.data_size]
            longest = max(map(len, everyone)) - 1
            width = min(-(-longest // step) * step, self._seq_len)
            inputs, targets = pad(mine, width)
            nll = model(inputs.to(world.device), targets.to(world.device))
            losses.accumulate(nll, targets != IGNORE)
            sums = nll.double().cpu().where(targets != IGNORE, 0.0).sum(1)
            by_document[first + world.data_rank : first + together : world.data_size] = sums[
                : len(mine)
            ]
            n_bytes += sum(text_bytes(self._tokenizer, d[None]) for d in mine)
        return _Sums(losses, n_bytes, by_document.tolist())


def _over_ranks(share: _Sums, world: World) -> _Sums:
    """The sums of all ranks' shares. A collective."""
    losses = share.losses
    n_bytes, *flat = world.sum_over_rows(
        share.n_bytes, *losses.nll.tolist(), *losses.count.tolist(), *share.documents
    )
    width = len(losses.nll)
    nll, count = torch.tensor(flat[: 2 * width], dtype=torch.float64).chunk(2)
    return _Sums(LossSums(nll, count), n_bytes, flat[2 * width :])


def _metrics(sums: _Sums) -> dict[str, float]:
    nll, tokens = sums.losses.nll.sum().item(), sums.losses.count.sum().item()
    mean = nll / tokens
    return {
        "nll": mean,
        "ppl": math.exp(min(mean, 700.0)),
        "bpb": bits_per_byte(nll, int(sums.n_bytes)),
        "avg_seqlen": tokens / len(sums.documents),
    }


def pad(documents: Sequence[Document], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [n, width] of n token sequences; targets are IGNORE on padding.

    Without documents one row of padding, so that a model can still be called.
    """
    inputs = torch.zeros(max(len(documents), 1), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, document in enumerate(documents):
        tokens = torch.from_numpy(document.astype(np.int64))
        inputs[row, : len(document) - 1] = tokens[:-1]
        targets[row, : len(document) - 1] = tokens[1:]
    return inputs, targets


def text_bytes(tokenizer: Tokenizer, tokens: npt.NDArray[np.integer]) -> int:
    """UTF-8 bytes of text that the targets tokens[:, 1:] stand for. tokens: [n, T + 1]."""
    total = int(tokenizer.token_bytes[tokens[:, 1:]].sum())
    if tokenizer.prefix_bytes:
        starts = int((tokens[:, :-1] == tokenizer.bos_id).sum())
        total -= starts * tokenizer.prefix_bytes
    return max(total, 0)


def bits_per_byte(nll_sum: float, n_bytes: int) -> float:
    """Total negative log-likelihood in nats over a text -> bits per byte of that text."""
    return nll_sum / math.log(2) / max(n_bytes, 1)

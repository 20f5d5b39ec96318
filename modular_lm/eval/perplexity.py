"""Validation: the loss of held-out documents, per source, weighted by tokens over all ranks.

One document per row, right-padded, cut at seq_len, so that chunks begin where documents do and
the score does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from modular_lm.data.reader import SourceReader
from modular_lm.model.lm import IGNORE, LanguageModel
from modular_lm.parallel import World
from modular_lm.tokenizer import Tokenizer

Document = npt.NDArray[np.integer]


class Validation:
    """The validation documents of some sources, and how to score a model on them.

    folders: source name -> its folder; max_docs: documents per source, the first ones of its
    validation split. Every rank holds the same documents and scores its share.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        tokenizer: Tokenizer,
        seq_len: int,
        max_docs: int,
        batch_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._documents: dict[str, list[Document]] = {}
        for name, folder in folders.items():
            found = SourceReader(folder, "val").documents(max_docs)
            # A target needs a token before it.
            documents = [d[: seq_len + 1] for d in found if len(d) > 1]
            if documents:
                self._documents[name] = documents

    def score(self, model: LanguageModel, world: World) -> dict[str, float]:
        """Metrics of every source and of all: `validation/<source>/{nll,ppl,bpb,avg_seqlen}`.

        nll: nats per token; avg_seqlen: mean number of scored tokens per document. A collective.
        """
        was_training = model.training
        model.eval()
        sums = {}
        for name, documents in self._documents.items():
            sums[name] = world.sum(*self._score_share(model, world, documents))
        model.train(was_training)
        if len(sums) > 1:
            sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
        results = {}
        for name, (nll, tokens, n_bytes, documents) in sums.items():
            mean = nll / tokens
            results |= {
                f"validation/{name}/nll": mean,
                f"validation/{name}/ppl": math.exp(min(mean, 700.0)),
                f"validation/{name}/bpb": bits_per_byte(nll, int(n_bytes)),
                f"validation/{name}/avg_seqlen": tokens / documents,
            }
        return results

    @torch.no_grad()
    def _score_share(
        self, model: LanguageModel, world: World, documents: Sequence[Document]
    ) -> tuple[float, float, float, float]:
        """(nll, scored tokens, bytes, documents) summed over this rank's share of `documents`."""
        # The ranks gather sharded weights together: each makes the same number of passes, of the
        # same width (which decides how many chunks there are), where need be with empty rows.
        together = world.size * self._batch_size
        nll = torch.zeros((), dtype=torch.float64)
        tokens = n_bytes = n_documents = 0
        for first in range(0, len(documents), together):
            everyone = documents[first : first + together]
            mine = everyone[world.rank :: world.size]
            inputs, targets = pad(mine, width=max(map(len, everyone)) - 1)
            losses = model(inputs.to(world.device), targets.to(world.device))
            nll += losses.double().sum().cpu()
            tokens += int((targets != IGNORE).sum())
            n_bytes += sum(text_bytes(self._tokenizer, d[None]) for d in mine)
            n_documents += len(mine)
        return nll.item(), tokens, n_bytes, n_documents


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

"""The loss of every validation document, so that two models can be compared document by document.

Two runs that validate on the same sources with the same tokenizer and seq_len score the same
documents in the same order. How the losses are found is in `perplexity`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modular_lm.files import full_disk_named, write_text_atomic


@dataclass(frozen=True)
class DocumentScores:
    """Of the documents of a source: summed nll in nats, and number of scored tokens."""

    nll: list[float]
    tokens: list[int]


def write_documents(path: Path, step: int, documents: Mapping[str, DocumentScores]) -> None:
    """Write them as JSON, in place of what an earlier attempt left.

    `{"step", "unit", "sources": {source: {"nll": [...], "tokens": [...]}}}`; `nll` is null where it
    is not finite. Raises RunFailedError on a full disk.
    """
    sources = {
        name: {
            "nll": [nll if math.isfinite(nll) else None for nll in each.nll],
            "tokens": each.tokens,
        }
        for name, each in documents.items()
    }
    report = {"step": step, "unit": "nats, summed over a document", "sources": sources}
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(report, allow_nan=False) + "\n")

"""Sources that hold given documents for validation, written as `prepare` would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modular_lm.data.manifest import Manifest, Problems, Settings, Split, TokenizerId
from modular_lm.data.shards import ROW_TOKENS, ShardWriter
from modular_lm.tokenizer import Tokenizer

Document = npt.NDArray[np.integer]


def write_held_out(folder: Path, documents: Sequence[Document], tokenizer: Tokenizer) -> Path:
    """A source without training text whose validation split is `documents`, in their order."""
    folder.mkdir(parents=True)
    made_by = TokenizerId.of(tokenizer)
    with ShardWriter(folder / "val-00000.parquet", "val", made_by) as writer:
        for document in documents:
            writer.add(document, len(document))
    Manifest(
        source=folder.name,
        tokenizer=made_by,
        dtype=made_by.dtype,
        row_tokens=ROW_TOKENS,
        settings=Settings(1, 1.0, False, False, False, None),
        train=Split.of([]),
        val=Split.of([writer.info]),
        duplicates={"train": 0, "val": 0},
        problems=Problems(),
        inputs=(),
        command="",
    ).save(folder)
    return folder


def random_documents(lengths: Sequence[int], n_words: int, seed: int = 0) -> list[Document]:
    """One document of random tokens for each of `lengths`."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, n_words, length) for length in lengths]

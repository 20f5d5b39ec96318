"""The training data of a run: its sources, their plan, and the rows of each step and rank.

`Dataset` joins the plan (which samples) with the readers (which tokens). `LocalLoader` walks it in
the process of the training loop; under Ray the same `Dataset.read` runs in Ray Data's tasks (see
`ray_jobs/_ingest.py`). Both give a rank the same `StepRows` for the same step.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modular_lm.config.schema import DataConfig
from modular_lm.data.builtin import BUILTIN, ensure_builtin
from modular_lm.data.fingerprint import Fingerprint
from modular_lm.data.mixture import Int64s, Stage
from modular_lm.data.permutation import Blocks
from modular_lm.data.plan import ORDER, DataPlan, Source
from modular_lm.data.reader import SourceReader, open_sources
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class StepRows:
    """The rows of one rank at one optimizer step.

    index: [n] global sample indices; tokens: [n, seq_len + 1], inputs and, shifted by one, targets.
    """

    step: int
    index: Int64s
    tokens: npt.NDArray[np.integer]


class Dataset:
    """Sources of token shards under a plan; picklable, so that tasks on other nodes can read it.

    global_batch_size: samples per step, by which `data.stages` turns steps into samples.
    Raises ConfigError or DataError for sources that are missing, foreign or too small.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, global_batch_size: int) -> None:
        assert config.seed is not None, "Dataset takes a resolved config"
        self.seq_len = config.seq_len
        self.folders = source_folders(config, tokenizer)
        self._readers = [SourceReader(folder, "train") for folder in self.folders.values()]
        if config.document_mask:
            _check_borders(self.folders, self._readers)
        self.tokenizer = tokenizer
        sources = [
            Source(name, reader.n_windows(config.seq_len))
            for name, reader in zip(self.folders, self._readers, strict=True)
        ]
        stages = [
            Stage(0, config.sources, "data.sources"),
            *(
                Stage(int(step) * global_batch_size, weights, f"data.stages.{step}")
                for step, weights in config.stages.items()
            ),
        ]
        self.plan = DataPlan(sources, stages, config.seed, Blocks.for_seq_len(config.seq_len))

    def read(self, index: Int64s) -> npt.NDArray[np.integer]:
        """The samples of the global indices `index` [n] -> tokens [n, seq_len + 1]."""
        where = self.plan.locate(index)
        if len(self._readers) == 1:
            return self._readers[0].windows(where.position, self.seq_len)
        dtype = self._readers[0].manifest.dtype
        tokens = np.empty((len(index), self.seq_len + 1), dtype)
        for number, reader in enumerate(self._readers):
            mine = np.flatnonzero(where.source == number)
            if len(mine):
                tokens[mine] = reader.windows(where.position[mine], self.seq_len)
        return tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of a token as it is stored and read."""
        return np.dtype(self._readers[0].manifest.dtype).itemsize

    def fingerprint(self) -> Fingerprint:
        """What decides the order and the content of the samples, as name -> value.

        Two runs with equal fingerprints see the same tokens at the same step (given equal global
        batch sizes).
        """
        parts = {
            "data.order": str(ORDER),
            "data.seed": str(self.plan.seed),
            "data.seq_len": str(self.seq_len),
            "data.tokenizer": self.tokenizer.content_hash,
        }
        for stage in self.plan.stages:
            for name, weight in stage.weights.items():
                parts[f"{stage.key}.{name}"] = f"{weight:.9g}"
        for name, reader in zip(self.folders, self._readers, strict=True):
            parts[f"data.shards.{name}"] = reader.manifest.fingerprint[:16]
        return parts


def document_ids(tokens: npt.NDArray[np.integer], tokenizer: Tokenizer) -> Int64s:
    """The document of each token of packed samples, [n, T] -> [n, T]; from 0 on, along each row.

    A document begins with BOS, or behind an EOS. Where one token serves as both, as in GPT-2, it
    is the BOS of what follows, and of two in a row the first is an EOS.
    """
    begins = tokens == tokenizer.bos_id
    if tokenizer.bos_id == tokenizer.eos_id:
        begins[:, :-1] &= ~begins[:, 1:]
    else:
        begins[:, 1:] |= tokens[:, :-1] == tokenizer.eos_id
    begins[:, 0] = False
    return begins.cumsum(1, dtype=np.int64)


def _check_borders(folders: dict[str, Path], readers: list[SourceReader]) -> None:
    for (name, folder), reader in zip(folders.items(), readers, strict=True):
        made = reader.manifest.settings
        if not (made.add_bos or made.add_eos):
            raise ConfigError(
                f"data.document_mask=true: data.sources.{name} ({folder}) was prepared with "
                "neither BOS nor EOS: its documents have no borders; prepare it with add_bos=true"
            )


def source_names(config: DataConfig) -> list[str]:
    """The sources that are drawn at some step, by name."""
    return sorted({*config.sources, *(name for names in config.stages.values() for name in names)})


def source_folders(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Path]:
    """The folder of each source; prepares the built-in corpus where it is asked for and missing."""
    names = source_names(config)
    named = [name for name in names if name != BUILTIN]
    folders = open_sources(config.root_dir, named, tokenizer)
    if BUILTIN in names:
        folders[BUILTIN] = ensure_builtin(config.tokenizer)
    return {name: folders[name] for name in names}


def check_sources(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError or DataError unless the prepared sources are there; prepares nothing."""
    named = [name for name in source_names(config) if name != BUILTIN]
    open_sources(config.root_dir, named, tokenizer)


def rank_range(step: int, global_batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The global sample indices [first, last) that `rank` trains on at `step`."""
    first = step * global_batch_size
    return (
        first + global_batch_size * rank // world_size,
        first + global_batch_size * (rank + 1) // world_size,
    )


def micro_batches(
    tokens: npt.NDArray[np.integer], most: int, batch_size: int
) -> list[npt.NDArray[np.integer]]:
    """Split the rows of a rank into micro-batches of up to `batch_size`.

    most: the rows of the fullest rank. Every rank makes as many passes as that one needs, for they
    gather weights together; parts are ragged, and may be empty, where rows do not divide evenly.
    """
    return np.array_split(tokens, -(-most // batch_size))


class LocalLoader:
    """Reads the rows of one rank in the process that asks for them, from `start` to `stop`."""

    def __init__(
        self, dataset: Dataset, global_batch_size: int, rank: int, world_size: int
    ) -> None:
        self._dataset = dataset
        self._batch = (global_batch_size, rank, world_size)

    def steps(self, start: int, stop: int) -> Generator[StepRows]:
        """The rows of the steps start..stop-1, in order."""
        for step in range(start, stop):
            index = np.arange(*rank_range(step, *self._batch), dtype=np.int64)
            yield StepRows(step, index, self._dataset.read(index))

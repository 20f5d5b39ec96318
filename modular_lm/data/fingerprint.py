"""What decides the samples of a run, as text, so that a change is noticed and can be named.

Together with one integer, the number of samples seen, a fingerprint is the whole state of the data
loader. `Dataset.fingerprint` makes it; a run keeps it in its event log.

    data.order            the version of the plan (`plan.ORDER`)
    data.seed             the seed of the order
    data.seq_len          tokens per sample
    data.tokenizer        content hash of the tokenizer
    data.sources.NAME     weight of a source
    data.stages.STEP.NAME weight of a source from a step on
    data.shards.NAME      hash of all shards of a source

`digest` is the proof of what was seen under it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Fingerprint = dict[str, str]

_STAGES, _SOURCES, _SHARDS = "data.stages.", "data.sources.", "data.shards."


def differences(stored: Fingerprint, current: Fingerprint, steps: int) -> list[str]:
    """What differs between two fingerprints of a run that has done `steps` steps: `name: a -> b`.

    A stage that has not begun yet, and a source that nothing has drawn yet, may still change.
    """
    before, now = _begun(stored, steps), _begun(current, steps)
    names = sorted(before.keys() | now.keys())
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _begun(fingerprint: Fingerprint, steps: int) -> Fingerprint:
    """The entries that the first `steps` steps depend on."""
    kept = {
        name: value
        for name, value in fingerprint.items()
        if not name.startswith(_STAGES) or int(name.split(".")[2]) < steps
    }
    drawn = {name.removeprefix(_SOURCES) for name in kept if name.startswith(_SOURCES)}
    drawn |= {name.split(".", 3)[3] for name in kept if name.startswith(_STAGES)}
    return {
        name: value
        for name, value in kept.items()
        if not name.startswith(_SHARDS) or name.removeprefix(_SHARDS) in drawn
    }


def digest(index: npt.NDArray[np.int64], tokens: npt.NDArray[np.integer]) -> int:
    """A 64-bit number that stands for the samples `tokens` [n, T + 1] under their global `index`
    [n]: the sum, modulo 2**64, of a hash of each sample's index and tokens.

    A sum, so that ranks and steps can be added in any order: what a run has seen has one digest,
    whatever the number of its workers and restarts, and anyone can compute it from the shards.
    """
    total = 0
    for number, row in zip(index.tolist(), tokens.astype("<u4"), strict=True):
        hashed = hashlib.blake2b(row.data, digest_size=8, key=number.to_bytes(8, "little"))
        total += int.from_bytes(hashed.digest(), "little")
    return total % 2**64

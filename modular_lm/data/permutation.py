"""The order of one source within one epoch: pseudo-random bijections of 0..n-1, in closed form.

`permute` mixes all of 0..n-1 alike. Over a corpus of terabytes that would make every sample of a
step a read in another file, so an epoch is ordered by `epoch_order`: blocks of consecutive samples
are permuted among each other, and within windows of many blocks all samples are permuted. Reads
then stay within some hundred pieces at a time, while the samples of a step come from all of them.
That suffices, because documents were shuffled globally when they were prepared: neighbours in a
block are related only where one long document fills several samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_ROUNDS = 6
# 1 MiB of uint16 tokens: what network file systems read and stripe by. 128 of them make a window
# of 67 M tokens, 134 MB, which the page cache of a node holds.
BLOCK_TOKENS = 1 << 19
WINDOW_BLOCKS = 128


@dataclass(frozen=True)
class Blocks:
    """How an epoch is cut: samples of a block, blocks of a window."""

    samples: int
    window: int = WINDOW_BLOCKS

    @classmethod
    def for_seq_len(cls, seq_len: int) -> Blocks:
        """Blocks of about BLOCK_TOKENS tokens of samples of `seq_len` tokens."""
        return cls(max(1, BLOCK_TOKENS // seq_len))


def epoch_order(nth: Int64s, n: int, key: int, blocks: Blocks) -> Int64s:
    """The positions of the samples that come as the `nth` [k] of an epoch of n samples. [k].

    A bijection of 0..n-1 for every key. Blocks begin at an offset that depends on the key, so that
    they are other ones in every epoch; what is left over behind the last whole block belongs to
    the last window, which may hold up to twice as many blocks.
    """
    full = n // blocks.samples
    windows = max(1, full // blocks.window)
    per_window = blocks.samples * blocks.window
    window = np.minimum(nth // per_window, windows - 1)
    last = window == windows - 1
    place = nth - window * per_window
    keys = _mix(np.uint64(key) + window.astype(np.uint64))
    for mine, size in ((~last, per_window), (last, n - (windows - 1) * per_window)):
        place[mine] = permute(place[mine], size, keys[mine])
    position = window * per_window + place
    whole = position < full * blocks.samples
    block, within = np.divmod(position[whole], blocks.samples)
    position[whole] = permute(block, full, key) * blocks.samples + within
    return (position + key % blocks.samples) % n


def permute(index: Int64s, n: int, key: int | Keys) -> Int64s:
    """A pseudo-random permutation of 0..n-1, evaluated at `index` [k]; bijective for every key.

    key: one for all, or one for each index [k]. A Feistel network over as many bits as n - 1 has,
    walked along its cycle until the value falls below n (J. Black and P. Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002). Mixing, not secrecy, is wanted: the round function is
    splitmix64's.
    """
    bits = max(2, (n - 1).bit_length())
    # The halves may differ by a bit; they change places in every round, of which there are evenly
    # many, so that each is as wide in the end as at first.
    widths = [np.uint64(bits // 2), np.uint64(bits - bits // 2)]
    masks = [(np.uint64(1) << width) - np.uint64(1) for width in widths]
    numbers = np.arange(_ROUNDS, dtype=np.uint64)[:, None]
    keys = _mix(np.atleast_1d(np.asarray(key, np.uint64)) + numbers)
    value = index.astype(np.uint64)
    walking = np.arange(len(value))
    while len(walking):
        left, right = value[walking] >> widths[0], value[walking] & masks[0]
        here = keys if keys.shape[1] == 1 else keys[:, walking]
        for number in range(_ROUNDS):
            mask = masks[1 - number % 2]
            left, right = right, left ^ (_mix(right ^ here[number]) & mask)
        value[walking] = (left << widths[0]) | right
        walking = walking[value[walking] >= np.uint64(n)]
    return value.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (S. Vigna, public domain): a bijection of 64-bit numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

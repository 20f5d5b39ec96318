"""What a model costs, as formulas over its resolved config: parameters, FLOPs, decoding state.

No torch: a dry run prints these within a second. Tests hold them against the real tensors and
against PyTorch's FLOP counter.
"""

from __future__ import annotations

from dataclasses import dataclass

from modular_lm.config.schema import ModelConfig
from modular_lm.model.sizes import n_sites, sizes_of


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    embedding: the table; tied, it is the head as well; head: 0 when tied
    layers: matrices of the base's layers; aggs: all of the aggregation sites; norms: those of the
    base and the last one; columns: all of the columns beside the base
    matmul: those that multiply each token (layers and head, tied or not): the N of 6 N FLOPs
    """

    embedding: int
    layers: int
    aggs: int
    norms: int
    head: int
    columns: int
    matmul: int

    @property
    def total(self) -> int:
        return self.non_embedding + self.embedding

    @property
    def non_embedding(self) -> int:
        return self.layers + self.aggs + self.norms + self.head + self.columns


def parameters(config: ModelConfig) -> Parameters:
    """The parameters of a resolved config, by what they are for."""
    z = sizes_of(config)
    attention = 2 * z.dim * z.attn_dim + 2 * z.dim * z.kv_dim
    layers = z.n_layers * (attention + 3 * z.dim * z.ffn_dim)
    table = z.vocab_size * z.dim
    return Parameters(
        embedding=table,
        layers=layers,
        aggs=n_sites(config) * _site_parameters(config),
        norms=(2 * z.n_layers + 1) * z.dim,
        head=0 if config.weight_tying else table,
        columns=len(config.module_names) * (layers + 2 * z.n_layers * z.dim),
        matmul=layers + table,
    )


def trained_parameters(config: ModelConfig) -> int:
    """How many of the parameters learn, by `module_train`."""
    z, count = sizes_of(config), parameters(config)
    column = count.layers + 2 * z.n_layers * z.dim
    shared = count.total - count.columns - column
    return column + (shared if config.module_train == "all" else 0)


def trained_matrices(config: ModelConfig) -> int:
    """How many of the trained parameters are in matrices of layers and sites."""
    sites = n_sites(config) * _site_matrices(config)
    return parameters(config).layers + (sites if config.module_train == "all" else 0)


def _site_parameters(config: ModelConfig) -> int:
    norms = 2 if config.module_agg == "stack" else 1
    return _site_matrices(config) + norms * sizes_of(config).dim


def _site_matrices(config: ModelConfig) -> int:
    z = sizes_of(config)
    return 4 * z.dim * z.agg_dim if config.module_agg == "stack" else z.dim * z.dim


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token (forward 1/3, backward 2/3), averaged over `seq_len`.

    6 per parameter that multiplies the token, and 12 times the attention's width per visible
    (query, key) pair and layer; pairs are counted exactly, padding and recomputation not at all.
    A document mask, which hides pairs according to the data, is not counted.
    """
    z = sizes_of(config)
    local = z.n_layers * 12 * z.attn_dim * _visible_pairs(config, seq_len)
    sites = n_sites(config) * _site_flops(config, seq_len)
    return 6 * parameters(config).matmul + (local + sites) / seq_len


def _site_flops(config: ModelConfig, seq_len: int) -> int:
    """Of one aggregation site over a whole sequence."""
    z = sizes_of(config)
    chunk = _chunk(config, seq_len)
    n_chunks = -(-seq_len // chunk)
    if n_chunks == 1:
        return 0  # the site does not run
    if config.module_agg != "stack":
        return 6 * z.dim * z.dim * n_chunks  # wo, once per chunk
    m = config.module_n_summary
    projections = 2 * seq_len + 2 * m * n_chunks  # wq, wo per token; wk, wv per summary
    pairs = seq_len + m * _earlier_chunks(seq_len, chunk)  # every token sees the zero slot
    return 6 * z.dim * z.agg_dim * projections + 12 * z.agg_dim * pairs


def state_elements(config: ModelConfig, t: int) -> int:
    """Numbers that decoding holds per sequence after t tokens, at the fullest point of a chunk.

    Keys and values of up to one chunk, and of what it looks back at, in every layer; per site the
    pooled current chunk, and the running sum (`avg`, `sum`) or the keys and values of all earlier
    summaries (`stack`). With a window all but the oldest token in it, which the next one replaces.
    """
    z = sizes_of(config)
    cached = 2 * z.n_layers * z.kv_dim * _cached_tokens(config, t)
    if config.module_seq_len is None:
        return cached
    m = config.module_n_summary
    if config.module_agg == "stack":
        memory = 2 * z.agg_dim * m * (t // config.module_seq_len)
    else:
        memory = z.dim
    return cached + n_sites(config) * (m * z.dim + memory)


def _chunk(config: ModelConfig, seq_len: int) -> int:
    return min(config.module_seq_len or seq_len, seq_len)


def _cached_tokens(config: ModelConfig, t: int) -> int:
    if config.sliding_window is not None:
        return min(config.sliding_window - 1, t)
    chunk = _chunk(config, t)
    return max(chunk, config.module_lookback + min(t - chunk, chunk)) if t > chunk else chunk


def _visible_pairs(config: ModelConfig, seq_len: int) -> int:
    """(query, key) pairs of one layer over a sequence."""
    if config.sliding_window is not None:
        window = min(config.sliding_window, seq_len)
        return window * seq_len - window * (window - 1) // 2
    chunk = _chunk(config, seq_len)
    return _causal_pairs(seq_len, chunk) + config.module_lookback * (seq_len - chunk)


def _causal_pairs(seq_len: int, chunk: int) -> int:
    """(query, key) pairs with the key not after the query and in the same chunk."""
    full, rest = divmod(seq_len, chunk)
    return full * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2


def _earlier_chunks(seq_len: int, chunk: int) -> int:
    """The number of earlier chunks, summed over all tokens."""
    full, rest = divmod(seq_len, chunk)
    return chunk * (full * (full - 1) // 2) + rest * full

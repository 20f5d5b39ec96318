"""Attention as a function of queries, keys, values and a mask, by the backend that suits best.

`attend` is all that the layers know; the mask that it takes is made ready once for all layers.
Which backend computes which kind of mask is decided once, by `choose_backends`, for a device and a
type; without that decision it is PyTorch's SDPA, which computes every mask everywhere. Knows no
parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_lm.config.checks import has_one_chunk
from modular_lm.config.schema import ModelConfig
from modular_lm.errors import ConfigError, reason
from modular_lm.model import masks
from modular_lm.model.kernels import BACKENDS, border_masks
from modular_lm.model.masks import EVERY, Kind, Mask
from modular_lm.model.sizes import n_sites, sizes_of
from modular_lm.model.summaries import summary_documents

log = logging.getLogger(__name__)

Backends = Mapping[Kind, str]
"""Kind of mask -> name of the backend; `sdpa` where nothing is said."""

ANYWHERE: Backends = {}

# On a GPU SDPA has fast kernels for triangles only; for other masks the first of these that works.
_PREFERRED = ("flex", "xformers", "sdpa")
_PROBE_CHUNK = 64


class ReadyMask:
    """A mask for `rows` rows, with the backend that computes it and what that takes of it.

    Neither a dataclass nor a tuple: into those FSDP reaches to cast a layer's inputs to bf16.
    """

    def __init__(
        self, mask: Mask, rows: int, device: torch.device, backends: Backends = ANYWHERE
    ) -> None:
        self.mask = mask
        self.backend = backends.get(mask.kind, "sdpa")
        self._device, self._backends = device, backends
        self.form = BACKENDS[self.backend].form(mask, rows, device)

    def select(self, rows: Tensor) -> ReadyMask:
        """For these rows of the batch."""
        return ReadyMask(self.mask.select(rows), len(rows), self._device, self._backends)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: ReadyMask) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that `mask` lets each query see.

    q: [B, s, n_heads, d]; k, v: [B, n, n_kv_heads, d]; returns [B, s, n_heads, d]. Each query
    must see at least one key.
    """
    return BACKENDS[mask.backend].attend(q, k, v, mask.mask, mask.form)


def memory_mask(config: ModelConfig, n_chunks: int, length: int, documents: Tensor | None) -> Mask:
    """What the tokens of whole sequences see of their summaries, at any site of `stack`.

    documents: [B, K, S]
    """
    m = config.module_n_summary
    if documents is None:
        return masks.memory(n_chunks * length, length, n_chunks, m)
    k_docs = F.pad(summary_documents(documents, m).flatten(1), (1, 0), value=EVERY)
    return masks.memory(
        n_chunks * length, length, n_chunks, m, q_docs=documents.flatten(1), k_docs=k_docs
    )


# ------------------------------------------------------------------ choosing


def choose_backends(
    wanted: str,
    config: ModelConfig,
    *,
    seq_len: int,
    document_mask: bool,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = True,
) -> Backends:
    """The backend of every kind of mask that the model meets on samples of `seq_len` tokens.

    Any but SDPA is proven by a trial: a forward (and backward) pass of a few tokens with each mask
    of that kind, compared with SDPA's. wanted: `auto` (the first of a fixed order that works) or
    one backend for all. Raises ConfigError if that one cannot do it here.
    """
    if device.type == "cpu" and wanted == "auto":
        return ANYWHERE
    examples: dict[Kind, list[Example]] = {}
    for example in _examples(config, seq_len, document_mask):
        examples.setdefault(example[0].kind, []).append(example)
    chosen: dict[Kind, str] = {}
    for kind, of_kind in examples.items():
        candidates = (wanted,)
        if wanted == "auto":
            candidates = ("sdpa",) if kind in ("plain", "causal") else _PREFERRED
        for name in candidates:
            trouble = _trouble(name, of_kind, device, dtype, training)
            if not trouble:
                chosen[kind] = name
                break
        else:
            raise ConfigError(
                f"distributed.attn_impl={wanted}: {trouble} ({_WORDS[kind]}, {device.type}, "
                f"{str(dtype).removeprefix('torch.')}); use auto"
            )
    log.info("attention: %s", ", ".join(f"{_WORDS[k]} by {b}" for k, b in chosen.items()))
    return chosen


_WORDS: dict[Kind, str] = {
    "plain": "causal attention",
    "causal": "look-back",
    "window": "sliding window",
    "documents": "document mask",
    "memory": "memory attention of module_agg=stack",
}

Example = tuple[Mask, tuple[int, int, int]]
"""A mask that training meets, and the heads that it is for: of queries, of keys, their width."""


def _examples(config: ModelConfig, seq_len: int, document_mask: bool) -> Iterator[Example]:
    """One of each form, made as `modular` makes them, of a few short chunks."""
    z, chunk, n_chunks = sizes_of(config), _PROBE_CHUNK * config.module_n_summary, 4
    heads = (z.n_heads, z.n_kv_heads, z.head_dim)
    chunked = not has_one_chunk(config, seq_len)
    documents = None
    if document_mask:
        # Borders within and between the chunks of two samples.
        place = torch.arange(n_chunks * chunk)
        documents = torch.stack((place // (chunk + 7), place // (2 * chunk - 5)))
        documents = documents.unflatten(1, (n_chunks, chunk))
    if chunked and config.module_lookback:
        lookback = max(1, chunk * config.module_lookback // (config.module_seq_len or chunk))
        for mask in border_masks(chunk, lookback, documents):
            yield mask, heads
    else:
        window = None if config.sliding_window is None else chunk // 3
        of_rows = None if documents is None else documents.flatten(0, 1)
        yield masks.causal(chunk, window=window, q_docs=of_rows), heads
    if chunked and config.module_agg == "stack" and n_sites(config):
        width = z.agg_dim // z.n_heads
        yield memory_mask(config, n_chunks, chunk, documents), (z.n_heads, z.n_heads, width)


def _trouble(
    name: str,
    examples: Sequence[Example],
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> str | None:
    """Why a backend cannot be used for these masks; None if it can."""
    if name == "sdpa":
        return None
    if name == "xformers" and device.type == "cpu":
        return "xformers has kernels for GPUs only"
    if name == "xformers" and any(mask.kind == "memory" for mask, _ in examples):
        return "xformers has no kernel that reads summaries"
    if name == "flex" and device.type == "cpu" and training:
        return "flex_attention has no backward pass on the CPU"
    try:
        error = max(_try(name, example, device, dtype, training) for example in examples)
    except Exception as caught:  # whatever a foreign kernel throws, it means: not here
        log.debug("%s", name, exc_info=True)
        return f"{name} does not work here: {reason(caught)}"
    allowed = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return None if error <= allowed else f"{name} computes something else (off by {error:.2g})"


def _try(
    name: str, example: Example, device: torch.device, dtype: torch.dtype, training: bool
) -> float:
    """The largest difference to SDPA over outputs and gradients, relative to the largest value."""
    mask, (n_heads, n_kv_heads, width) = example
    rows = 2 if mask.q_docs is None else len(mask.q_docs)
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((rows, mask.q_len, n_heads, width), *[(rows, mask.k_len, n_kv_heads, width)] * 2)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]

    def results(backend: str) -> list[Tensor]:
        q, k, v = leaves = [x.to(device, dtype).requires_grad_(training) for x in inputs]
        y = attend(q, k, v, ReadyMask(mask.to(device), rows, device, {mask.kind: backend}))
        if not training:
            return [y]
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    with torch.inference_mode(False), torch.set_grad_enabled(training):
        pairs = zip(results(name), results("sdpa"), strict=True)
        errors = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    worst = torch.stack(errors).max().item()
    return worst if worst == worst else float("inf")

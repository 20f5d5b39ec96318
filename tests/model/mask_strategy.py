"""The masks that the model uses, drawn at random."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from modular_lm.model.masks import EVERY, Mask, causal, everything, memory


def runs(n: int, seed: int) -> torch.Tensor:
    """[2, n] ids that grow along a row."""
    starts = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.25
    return starts.long().cumsum(1)


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """All that the model uses, with and without documents."""
    n, seed = draw(st.integers(1, 24)), draw(st.integers(0, 99))
    with_documents = draw(st.booleans())
    kind = draw(st.sampled_from(["causal", "suffix", "memory", "everything"]))
    if kind == "memory":
        chunk, m = draw(st.integers(1, 6)), draw(st.integers(1, 3))
        n_chunks = draw(st.integers(1, 4))
        q_docs = runs(chunk * n_chunks, seed) if with_documents else None
        k_docs = None
        if q_docs is not None:
            k_docs = q_docs[:, chunk - 1 :: chunk].repeat_interleave(m, dim=1)
            k_docs = torch.nn.functional.pad(k_docs, (1, 0), value=EVERY)
        return memory(chunk * n_chunks, chunk, n_chunks, m, q_docs=q_docs, k_docs=k_docs)
    if kind == "everything":
        return everything(n, draw(st.integers(1, 9)))
    window = draw(st.none() | st.integers(1, 30))
    k_len = n + (draw(st.integers(1, 9)) if kind == "suffix" else 0)
    k_docs = runs(k_len, seed) if with_documents else None
    q_docs = None if k_docs is None else k_docs[:, k_len - n :]
    return causal(n, k_len, window=window, q_docs=q_docs, k_docs=k_docs)

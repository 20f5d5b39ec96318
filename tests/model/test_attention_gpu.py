"""Forward and backward of every backend and mask on a GPU, against SDPA with the dense mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modular_lm.model.attention import attend, choose_backends
from modular_lm.model.masks import Mask, causal, memory

from .mask_strategy import runs
from .tiny_models import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTH = 256
MASKS = {
    "plain": causal(LENGTH),
    "look-back": causal(LENGTH, LENGTH + 64),
    "window": causal(LENGTH, window=48),
    "documents": causal(LENGTH, q_docs=runs(LENGTH, 0)),
    "memory": memory(LENGTH, 32, 8, 4),
}


def outputs(backend: str | None, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients; without a backend, by the dense mask in fp32."""
    cuda, mask = torch.device("cuda"), MASKS[name]
    if mask.q_docs is not None:
        mask = causal(LENGTH, q_docs=mask.q_docs.to(cuda))
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, mask.q_len, 4, 64), *[(2, mask.k_len, 2, 64)] * 2)
    leaves = [torch.randn(s, generator=generator).to(cuda, dtype) for s in shapes]
    q, k, v = leaves = [(x if backend else x.float()).requires_grad_() for x in leaves]
    y = attend(q, k, v, mask, {mask.kind: backend}) if backend else by_hand(q, k, v, mask)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    visible = mask.dense(q.device)
    visible = visible[:, None] if visible.dim() == 3 else visible
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return y.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "xformers"])
def test_outputs_and_gradients_agree(backend: str, name: str, dtype: torch.dtype) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
        if name == "memory":
            pytest.skip("refused: xformers has no kernel that reads summaries")
    try:
        found = outputs(backend, name, dtype)
    except (NotImplementedError, RuntimeError) as error:
        if backend != "xformers":
            raise
        pytest.skip(f"this xformers does not work with this torch: {error}")
    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for a, b in zip(found, outputs(None, name, dtype), strict=True):
        assert ((a.float() - b).abs().max() / b.abs().max()).item() < allowed


def test_auto_proves_what_it_picks() -> None:
    config = tiny_config(
        dim=128, n_heads=2, module_agg="stack", module_seq_len=64, module_agg_dim=128
    )
    chosen = choose_backends(
        "auto",
        config,
        document_mask=True,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
    )
    assert chosen.keys() == {"plain", "documents", "memory"}
    assert chosen["plain"] == "sdpa"

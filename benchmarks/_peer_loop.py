"""A plain training loop around another library's Llama, for `benchmarks.train peers`.

    PYTHON benchmarks/_peer_loop.py transformers|litgpt SHAPE.json TOKENS.npy

A script of its own that imports nothing of this project, so that PYTHON may be that of another
environment. Trains on TOKENS [steps, B, T + 1], one step each: mean cross-entropy in fp32, gradient
clipping, AdamW. Prints a JSON list with the seconds of each step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


def transformers_llama(shape: dict[str, Any]) -> tuple[nn.Module, Forward]:
    """The model and its logits [B, T, V] of tokens [B, T]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_heads"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=shape["seq_len"],
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return model, lambda tokens: model(tokens).logits


def litgpt_llama(shape: dict[str, Any]) -> tuple[nn.Module, Forward]:
    """The model and its logits [B, T, V] of tokens [B, T]."""
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]

    config = Config(
        block_size=shape["seq_len"],
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        n_embd=shape["dim"],
        intermediate_size=shape["ffn_dim"],
        padded_vocab_size=shape["vocab_size"],
        vocab_size=shape["vocab_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    return model, model


PEERS = {"transformers": transformers_llama, "litgpt": litgpt_llama}


def main(peer: str, shape_file: str, tokens_file: str) -> None:
    with open(shape_file, encoding="utf-8") as file:
        shape = json.load(file)
    device = torch.device(shape["device"])
    torch.manual_seed(0)
    model, forward = PEERS[peer](shape)
    model.to(device)
    if shape["compile"]:
        model.compile()
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused)
    seconds = []
    for batch in np.load(tokens_file, mmap_mode="r"):
        began = time.perf_counter()
        tokens = torch.from_numpy(batch.astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=shape["dtype"] == "bf16"):
            logits = forward(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])

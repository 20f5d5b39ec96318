"""One rank of `test_sharded`, as `python sharded_worker.py RANK SIZE STORE`; raises on failure."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import some_tokens, tiny_config, tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel


def sharded(mesh: DeviceMesh, dtype: torch.dtype, keys: dict[str, Any]) -> LanguageModel:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    with torch.device("meta"):
        model = LanguageModel(tiny_config(**keys))
    for unit in [*model.layers, *model.aggs, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    return model


def train(model: LanguageModel, length: int, steps: int = 3) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        batch = some_tokens(2, length + 1, seed=step)
        loss = model(batch[:, :-1], batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def check(mesh: DeviceMesh, mode: str) -> None:
    keys = {"module_agg": mode, "module_seq_len": 4}
    plain = tiny_model(torch.float32, reading=False, **keys)
    model = sharded(mesh, torch.float32, keys)
    for (name, whole), (other, part) in zip(
        plain.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(part.full_tensor(), whole), name  # type: ignore[attr-defined]
    torch.testing.assert_close(train(model, 10), train(plain, 10))
    one_chunk = train(model, 4), train(plain, 4)  # the sites stay silent, on every rank
    torch.testing.assert_close(*one_chunk)

    model = sharded(mesh, torch.bfloat16, keys)
    seen = set()
    model.layers[1].get_submodule("attention").register_forward_pre_hook(
        lambda _, args: seen.add((args[0].dtype, args[1].rope.cos.dtype))
    )
    losses = train(model, 10)
    assert seen == {(torch.bfloat16, torch.float32)}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)


def main(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    for mode in ("avg", "stack"):
        check(mesh, mode)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

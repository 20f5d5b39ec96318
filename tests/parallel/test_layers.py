"""What is done to single layers: recomputation, float8, compilation. In one process."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.numerics import MODEL
from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.schema import DistributedConfig
from modular_lm.errors import ConfigError
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel.float8 import convert_to_float8
from modular_lm.parallel.recompute import SAVED, recompute, saved_operators

CPU = torch.device("cpu")


def tiny(*args: str) -> TrainConfig:
    return resolve(load_config(TrainConfig, [*MODEL.split(), *args])[0], 258)


def plain(*args: str) -> LanguageModel:
    config = tiny(*args)
    model = LanguageModel(config.model)
    init_weights(model, 0)
    return model


TOKENS = torch.arange(128).view(2, 64) % 258


def kept_and_run(mode: str, *save: str) -> tuple[int, int]:
    """Bytes that the layers keep for backward, and how often a layer's attention runs in a step."""
    model = plain()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    config = DistributedConfig(activation_checkpointing=mode, activation_checkpointing_save=[*save])  # type: ignore[arg-type]
    for block in model.layers:
        block.get_submodule("attention").register_forward_hook(count)
        recompute(block, config)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(TOKENS, TOKENS).sum()
    loss.backward()
    return sum(kept.values()), runs


def test_recomputation_keeps_less_and_runs_layers_twice() -> None:
    none, runs = kept_and_run("none")
    full, runs_of_full = kept_and_run("full")
    assert full < none / 2
    assert (runs, runs_of_full) == (3, 6)


def operators_run_in_backward(mode: str, *save: str) -> set[str]:
    """The forward operators of layers that run again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.of: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.of.append(f"{func.namespace}.{func._opname}")
            return func(*args, **(kwargs or {}))

    model = plain("model.module_agg=drop")
    config = DistributedConfig(activation_checkpointing=mode, activation_checkpointing_save=[*save])  # type: ignore[arg-type]
    for block in model.layers:
        recompute(block, config)
    loss = model(TOKENS, TOKENS).sum()
    with Names() as names:
        loss.backward()
    return set(names.of)


ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def test_selective_recomputation_runs_all_again_but_what_is_kept() -> None:
    assert ATTENTION in SAVED
    assert ATTENTION in operators_run_in_backward("full")
    selective = operators_run_in_backward("selective")
    assert ATTENTION not in selective
    assert "aten.silu" in selective
    assert "aten.silu" not in operators_run_in_backward("none")
    named = operators_run_in_backward("selective", "aten.silu")
    assert "aten.silu" not in named
    assert ATTENTION in named


@pytest.mark.parametrize("name", ["aten.mmm", "nowhere.mm", "aten", "", "mm"])
def test_an_operator_that_does_not_exist_is_named(name: str) -> None:
    config = DistributedConfig(activation_checkpointing_save=["aten.mm", name])
    with pytest.raises(ConfigError, match=f"activation_checkpointing_save: {name} is no operator"):
        saved_operators(config)


# ------------------------------------------------------------------ float8


def float8_layers(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"}


def test_float8_takes_the_layers_that_the_filter_finds() -> None:
    model = plain()
    convert_to_float8(model, DistributedConfig(float8_recipe="rowwise"), CPU)
    found = float8_layers(model)
    assert len(found) == 3 * 7
    assert all(name.startswith("layers.") for name in found)
    model = plain()
    pattern = r"layers\.[12]\.feed_forward"
    settings = DistributedConfig(float8_recipe="tensorwise", float8_filter=pattern)
    convert_to_float8(model, settings, CPU)
    assert len(float8_layers(model)) == 2 * 3


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_is_near_fp32_and_not_equal_to_it(recipe: Any) -> None:
    exact = plain()(TOKENS, TOKENS).mean()
    model = plain()
    convert_to_float8(model, DistributedConfig(float8_recipe=recipe), CPU)
    loss = model(TOKENS, TOKENS).mean()
    loss.backward()
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.layers.parameters())


def test_a_filter_that_finds_nothing_is_refused() -> None:
    settings = DistributedConfig(float8_recipe="rowwise", float8_filter="nothing")
    with pytest.raises(ConfigError, match="finds no linear layer"):
        convert_to_float8(plain(), settings, CPU)


def test_without_torchao_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchao"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"needs torchao .*pip install 'modular-lm\[float8\]'"):
        convert_to_float8(plain(), DistributedConfig(float8_recipe="rowwise"), CPU)


# ------------------------------------------------------------------ compilation


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth() -> None:
    """All layers of a shape run the same compiled code."""
    graphs = []
    for depth in (2, 5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = plain(f"model.n_layers={depth}", "model.module_agg=drop")
        for block in model.layers:
            block.forward = torch.compile(block.forward, backend="aot_eager")
        model(TOKENS, TOKENS).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 2

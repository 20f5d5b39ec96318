"""Meta's and Lingua's `.pth` files: names are ours already, everything else is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modular_lm.errors import CheckpointError
from modular_lm.model.foreign import dense_config, parameter_shapes
from modular_lm.model.lm import LanguageModel
from modular_lm.model.meta import load_pth, read_meta

from .tiny_models import some_tokens

META: dict[str, Any] = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": False,
}
LINGUA: dict[str, Any] = {
    "name": "run",
    "optim": {"lr": 3e-4},
    "model": {
        "dim": 16,
        "n_layers": 2,
        "head_dim": 4,
        "n_heads": None,
        "n_kv_heads": 2,
        "rope_theta": 500000.0,
        "norm_eps": 1e-5,
        "init_std_factor": "disabled",
        "max_seqlen": 48,
        "seed": 42,
        "vocab_size": 24,
        "weight_tying": False,
        "sliding_window": None,
    },
}
WEIGHTS = dense_config(
    40, 32, "x", dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=24, rope_theta=500000.0
)


def weights(tied: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(WEIGHTS)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if tied:
        del tensors["output.weight"]
    return tensors


def write(folder: Path, name: str, values: Any, params: Any = META) -> Path:
    torch.save(values, folder / name)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def test_meta_and_lingua_hold_the_same_model(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    tensors = weights()
    meta = read_meta(write(a, "consolidated.00.pth", {**tensors, "rope.freqs": torch.zeros(2)}))
    frequencies = {"rope_embeddings.freqs_cis": torch.zeros(3)}
    saved = {"model": {**tensors, **frequencies}, "optim": {"step": 3}}
    lingua = read_meta(write(b, "consolidated.pth", saved, LINGUA))
    assert meta[0] == lingua[0]
    assert (meta[1], lingua[1]) == (2048, 48)
    for state in (meta[2], lingua[2], read_meta(a / "consolidated.00.pth")[2]):
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    expected, model = LanguageModel(WEIGHTS), LanguageModel(meta[0])
    expected.load_state_dict(tensors)
    model.load_state_dict(meta[2])
    tokens = some_tokens(2, 9) % 24
    assert torch.equal(expected(tokens), model(tokens))


@pytest.mark.parametrize("head", ["output.weight", "output.tied_module.weight"])
def test_the_head_of_a_tied_model_is_the_embedding(tmp_path: Path, head: str) -> None:
    params = {"model": {**LINGUA["model"], "weight_tying": True}}
    tensors = weights(tied=True)
    embedding = tensors["tok_embeddings.weight"]
    folder = write(tmp_path, "consolidated.pth", {**tensors, head: embedding.clone()}, params)
    config, _, state = read_meta(folder)
    assert config.weight_tying
    assert state.keys() == tensors.keys()
    write(tmp_path, "consolidated.pth", {**tensors, head: embedding + 1}, params)
    with pytest.raises(CheckpointError, match=f"{head} differs from tok_embeddings"):
        read_meta(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope=true: not known of a plain Llama"),
        ({"moe": {"n_experts": 8}}, "moe="),
        ({"dim": None}, "dim=None: expected a whole number >= 1"),
        ({"n_heads": None}, "n_heads=None: expected a whole number >= 1"),
        ({"n_kv_heads": 3}, "model.n_kv_heads=3: must divide"),
    ],
)
def test_anything_but_a_plain_llama_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, "consolidated.00.pth", weights(), {**META, **changes})
    with pytest.raises(CheckpointError) as caught:
        read_meta(folder)
    assert str(caught.value).startswith(f"{tmp_path / 'params.json'}: {message}")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = weights()
    w2, norm = "layers.1.feed_forward.w2.weight", "norm.weight"
    cases = {
        f"tensor {norm} is missing": {n: t for n, t in tensors.items() if n != norm},
        "tensor tok_embeddings.weight is missing": {norm: tensors[norm]},
        "tensor layers.2.attention.wq.weight has no place": {
            **tensors,
            "layers.2.attention.wq.weight": torch.zeros(16, 16),
        },
        f"tensor {w2} has the shape [16, 41], expected [16, 40]": {
            **tensors,
            w2: torch.zeros(16, 41),
        },
        f"tensor {w2} is torch.float64": {**tensors, w2: tensors[w2].double()},
        'expected a dict of tensors, or one under "model"': {"model": {"a": 1}},
    }
    for message, values in cases.items():
        with pytest.raises(CheckpointError) as caught:
            read_meta(write(tmp_path, "consolidated.00.pth", values))
        assert message in str(caught.value)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither consolidated\.00\.pth nor"):
        read_meta(tmp_path)
    write(tmp_path, "consolidated.00.pth", weights())
    (tmp_path / "consolidated.01.pth").touch()
    with pytest.raises(CheckpointError, match="split over several files"):
        read_meta(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    (tmp_path / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json: no such file"):
        read_meta(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code in a checkpoint ran",)


def test_broken_files_and_code_in_them_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.pth"
    whole = write(tmp_path, "x.pth", weights()) / "x.pth"
    for data in (b"", b"garbage", whole.read_bytes()[:-100]):
        file.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=r"x\.pth: not readable as a torch file"
        ) as caught:
            load_pth(file)
        assert "\n" not in str(caught.value)
    torch.save({"model": Malicious()}, file)
    with pytest.raises(CheckpointError, match="not readable"):
        load_pth(file)
    assert capsys.readouterr().out == ""
    torch.save([1], file)
    with pytest.raises(CheckpointError, match="expected a dict, found a list"):
        load_pth(file)

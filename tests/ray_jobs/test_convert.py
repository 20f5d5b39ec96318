"""`python -m ray_jobs.convert`: every way through it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modular_lm.config import ConvertConfig, TrainConfig, load_config, to_dict
from modular_lm.config.checks import resolve
from modular_lm.config.load import format_help, from_dict
from modular_lm.config.schema import TokenizerConfig
from modular_lm.errors import CheckpointError, ConfigError, RunFailedError
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.tokenizer import build_tokenizer
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.saved_config import read_config
from modular_lm.train.saving import save_model
from ray_jobs.convert import main
from tests.support import REPO

TOKENIZER = build_tokenizer(TokenizerConfig())
BASE = (
    "data.seq_len=32 model.dim=16 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 "
    "model.multiple_of=4 model.module_agg_dim=8"
)


def convert(*args: str) -> int:
    return main(*load_config(ConvertConfig, args))


def checkpoint(folder: Path, *args: str) -> LanguageModel:
    """A model, which then also lies in `folder` as a checkpoint."""
    c = resolve(load_config(TrainConfig, [*BASE.split(), *args])[0], TOKENIZER.n_words)
    model = LanguageModel(c.model)
    init_weights(model, 1)
    save_model(folder, model, c, TOKENIZER)
    return model


def same_weights(one: LanguageModel, other: LanguageModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("agg", ["drop", "stack"])
def test_a_checkpoint_survives_the_way_through_one_file(tmp_path: Path, agg: str) -> None:
    keys = (f"model.module_agg={agg}", "model.module_seq_len=8")
    model = checkpoint(tmp_path / "a", *keys)
    assert (
        convert("from=dcp", "to=torch", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'm.pth'}") == 0
    )
    assert convert("from=torch", f"src={tmp_path / 'm.pth'}", f"dst={tmp_path / 'b'}") == 0
    found, tokenizer, config, _ = load_for_inference(str(tmp_path / "b"))
    assert same_weights(found, model)
    assert config == read_config(tmp_path / "a")
    assert tokenizer.content_hash == TOKENIZER.content_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "m.pth"]
    values = torch.load(tmp_path / "m.pth", weights_only=True)
    assert values.keys() == {"format", "model", "config", "tokenizer"}


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_dense_checkpoint_survives_the_way_through_hugging_face(
    tmp_path: Path, tied: str
) -> None:
    model = checkpoint(tmp_path / "a", "model.module_agg=drop", f"model.weight_tying={tied}")
    convert("from=dcp", "to=hf", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'hf'}")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (hf["bos_token_id"], hf["max_position_embeddings"]) == (TOKENIZER.bos_id, 32)
    convert("from=hf", f"src={tmp_path / 'hf'}", f"dst={tmp_path / 'b'}", "tokenizer.name=bytes")
    found, _, config, _ = load_for_inference(str(tmp_path / "b"))
    assert same_weights(found, model)
    assert (config.data.seq_len, config.model.weight_tying) == (32, tied == "true")


def test_sites_that_never_ran_are_left_out_of_an_export(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "a", "model.module_agg=avg", "model.module_seq_len=32")
    assert any(name.startswith("aggs.") for name in model.state_dict())
    convert("from=dcp", "to=hf", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'hf'}")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("aggs.")
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("model.module_seq_len=8 model.module_agg=drop", "model.module_seq_len=8: attends within"),
        ("model.module_seq_len=8 model.module_agg=stack", "model.module_seq_len=8: attends within"),
        ("model.sliding_window=8", "model.sliding_window=8: attends within a window"),
        ("model.module_names=code", "model.module_names=code: has several columns"),
    ],
)
def test_what_hugging_face_cannot_compute_is_not_exported(
    tmp_path: Path, args: str, message: str
) -> None:
    checkpoint(tmp_path / "a", *args.split())
    with pytest.raises(ConfigError) as caught:
        convert("from=dcp", "to=hf", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'hf'}")
    assert str(caught.value).startswith(f"to=hf: {message}")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "keys",
    [
        "model.module_agg=stack model.module_seq_len=8",
        "model.module_agg=sum model.module_seq_len=8 model.module_names=code",
        "model.module_agg=drop model.weight_tying=true",
    ],
)
def test_any_model_survives_the_way_through_safetensors(tmp_path: Path, keys: str) -> None:
    model = checkpoint(tmp_path / "a", *keys.split())
    convert("from=dcp", "to=safetensors", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'plain'}")
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == [
        "model.safetensors",
        "params.json",
    ]
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())
    convert("from=safetensors", f"src={tmp_path / 'plain'}", f"dst={tmp_path / 'b'}")
    found, _, config, _ = load_for_inference(str(tmp_path / "b"))
    assert same_weights(found, model)
    assert config == read_config(tmp_path / "a")
    (tmp_path / "plain" / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"plain/params.json: "):
        convert("from=safetensors", f"src={tmp_path / 'plain'}", f"dst={tmp_path / 'c'}")


@pytest.mark.parametrize("tied", ["true", "false"])
def test_transformers_computes_the_same_from_an_export(tmp_path: Path, tied: str) -> None:
    """A random model with grouped queries, all of whose tensors differ from their defaults."""
    transformers = pytest.importorskip("transformers")
    keys = ("model.module_agg=drop", f"model.weight_tying={tied}", "model.rope_theta=5e4")
    model = checkpoint(tmp_path / "a", *keys)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_model(tmp_path / "b", model, read_config(tmp_path / "a"), TOKENIZER)
    convert("from=dcp", "to=hf", f"src={tmp_path / 'b'}", f"dst={tmp_path / 'hf'}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, TOKENIZER.n_words, (3, 32), generator=generator)
    with torch.no_grad():
        ours, found = model(tokens), theirs(tokens).logits
    assert ours.std() > 0.1
    assert torch.allclose(found, ours, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    convert("from=hf", f"src={tmp_path / 'again'}", f"dst={tmp_path / 'c'}", "tokenizer.name=bytes")
    assert same_weights(load_for_inference(str(tmp_path / "c"))[0], model)


def test_stories260k_from_both_formats_and_back(tmp_path: Path, shared_data: Path) -> None:
    golden = shared_data / "golden" / "stories260K"
    tokenizer = ("tokenizer.name=sp", f"tokenizer.path={golden / 'tok512.model'}")
    for kind in ("hf", "meta"):
        convert(f"from={kind}", f"src={golden / kind}", f"dst={tmp_path / kind}", *tokenizer)
    one, other = (load_for_inference(str(tmp_path / kind)) for kind in ("hf", "meta"))
    assert same_weights(one[0], other[0])
    assert one[1].content_hash == other[1].content_hash
    tokens = one[1].encode("Once upon", add_bos=True)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(one[0](torch.tensor([tokens]))[0, -1].argmax()))
    assert one[1].decode(tokens).startswith("Once upon a time, there was a")
    convert("from=dcp", "to=hf", f"src={tmp_path / 'meta'}", f"dst={tmp_path / 'back'}")
    back = load_file(tmp_path / "back" / "model.safetensors")
    original = load_file(golden / "hf" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    copy = tmp_path / "back" / "tokenizer.model"
    assert copy.read_bytes() == (golden / "tok512.model").read_bytes()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "from=null: expected one of hf, meta, torch, dcp"),
        ("from=gguf", "from=gguf: expected one of hf, meta, torch, dcp"),
        ("frm=hf", "unknown key frm: did you mean from?"),
        ("from=hf to=meta", "to=meta: expected one of dcp, torch, hf"),
        ("from=hf src=A", "dst=: expected a path to write"),
        ("from=hf dst=NEW", "src=: no such file or folder"),
        ("from=hf src=NONE dst=NEW", "src=NONE: no such file or folder"),
        ("from=dcp src=NONE dst=NEW", "src=NONE: no such folder"),
        ("from=dcp src=EMPTY dst=NEW", "src=EMPTY: holds no complete checkpoint"),
        ("from=dcp src=A dst=A", "dst=A: is a folder with files in it"),
        ("from=dcp src=A dst=FILE", "dst=FILE: is a file already"),
        ("from=dcp to=torch src=A dst=EMPTY", "dst=EMPTY: is a folder; to=torch writes one file"),
        ("from=hf src=A dst=NEW", "tokenizer.name: from=hf needs the model's tokenizer"),
        ("from=dcp src=A dst=NEW tokenizer.name=sp", "tokenizer: from=dcp brings its own"),
        ("from=meta src=A dst=NEW tokenizer.name=sp", "tokenizer.path=null: this kind of"),
        ("from=torch src=FILE dst=NEW", "FILE: not readable as a torch file of weights"),
        ("from=torch src=OTHER dst=NEW", "OTHER: was not written by to=torch"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, args: str, message: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("text")
    torch.save({"a": torch.ones(1)}, tmp_path / "OTHER")
    checkpoint(tmp_path / "A")
    before = sorted(tmp_path.rglob("*"))

    def placed(text: str) -> str:
        for name in ("NONE", "EMPTY", "FILE", "OTHER", "NEW", "A"):
            text = text.replace(f"={name}", f"={tmp_path / name}")
        return text

    with pytest.raises((ConfigError, CheckpointError)) as caught:
        convert(*placed(args).split())
    text = str(caught.value).replace(f"{tmp_path}/", "")
    assert text.startswith(message)
    assert "\n" not in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a", "model.module_agg=drop")
    convert("from=dcp", "to=hf", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'hf'}")
    config, tensors = tmp_path / "hf" / "config.json", tmp_path / "hf" / "model.safetensors"
    hf = {**json.loads(config.read_text()), "vocab_size": 100}
    config.write_text(json.dumps(hf))
    args = ("from=hf", f"src={tmp_path / 'hf'}", f"dst={tmp_path / 'b'}", "tokenizer.name=bytes")
    with pytest.raises(CheckpointError, match=r"has the shape \[258, 16\], expected \[100, 16\]"):
        convert(*args)
    from safetensors.torch import save_file

    cut = {n: t[:100].clone() if t.shape[0] == 258 else t for n, t in load_file(tensors).items()}
    save_file(cut, tensors)
    with pytest.raises(ConfigError, match=r"tokenizer\.name=bytes: has 258 tokens, but the model"):
        convert(*args)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("target", ["dcp", "torch", "hf"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "a")

    def full(*args: Any, **kwargs: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            # What torch makes of it.
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunFailedError, match=r"/out: No space left on device; free some space"):
        convert("from=dcp", f"to={target}", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'out'}")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_empty_may_be_filled(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    convert("from=dcp", f"src={tmp_path / 'a'}", f"dst={tmp_path / 'b'}")
    assert same_weights(load_for_inference(str(tmp_path / "b"))[0], model)


# ------------------------------------------------------------------ the key `from`


def test_from_is_a_key_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("from: meta\nsrc: x\n")
    config, given = load_config(ConvertConfig, [f"config={file}"])
    assert (config.from_, given["from"]) == ("meta", "meta")
    assert to_dict(config)["from"] == "meta"
    assert from_dict(ConvertConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"^unknown key from_: did you mean from\?"):
        load_config(ConvertConfig, ["from_=hf"])
    lines = [
        line.split()[0] for line in format_help(ConvertConfig, "What.", "usage").splitlines()[5:]
    ]
    assert lines[0] == "from=null"


def test_mistakes_are_answered_before_torch_is_loaded() -> None:
    code = "import sys, ray_jobs.convert; print([m for m in ('torch', 'ray') if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
    job = [sys.executable, "-m", "ray_jobs.convert", "from=hf", "src=nowhere", "dst=x"]
    failed = subprocess.run(job, cwd=REPO, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: src=nowhere: no such file or folder\n"

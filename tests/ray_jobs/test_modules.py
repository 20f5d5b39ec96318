"""`python -m ray_jobs.modules`: every action, what it refuses, and how columns are then run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modular_lm.config import GenerateConfig, ModulesConfig, TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.load import format_help
from modular_lm.config.schema import TokenizerConfig
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.model.columns import layers_of
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.tokenizer import build_tokenizer
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.column_file import base_hash, column_hash
from modular_lm.train.saved_config import read_config
from modular_lm.train.saving import save_model
from ray_jobs.generate import main as generate
from ray_jobs.modules import main
from tests.support import REPO

TOKENIZER = build_tokenizer(TokenizerConfig())
BASE = (
    "data.seq_len=32 model.dim=16 model.n_layers=2 model.n_heads=2 model.multiple_of=16 "
    "model.module_seq_len=8 model.module_agg=stack model.module_agg_dim=8"
)


def modules(*args: str) -> int:
    return main(*load_config(ModulesConfig, args))


def checkpoint(folder: Path, names: str = "code,law", *args: str, seed: int = 1) -> LanguageModel:
    """A model with columns, which then also lies in `folder` as a checkpoint."""
    keys = [*BASE.split(), f"model.module_names=[{names}]", *args]
    c = resolve(load_config(TrainConfig, keys)[0], TOKENIZER.n_words)
    model = LanguageModel(c.model)
    init_weights(model, seed)
    save_model(folder, model, c, TOKENIZER)
    return model


def load(folder: Path) -> LanguageModel:
    return load_for_inference(str(folder), torch.device("cpu"))[0]


def tokens() -> torch.Tensor:
    return torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))


def weights(model: LanguageModel, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach() for key, p in layers_of(model, name).named_parameters()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_list_shows_columns_parameters_and_hashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path / "run" / "checkpoints" / "0000000003")
    assert modules("action=list", f"ckpt={tmp_path / 'run'}") == 0
    header, *rows, base = capsys.readouterr().out.splitlines()
    assert header.split() == ["column", "parameters", "weights"]
    expected = [
        [name, f"{sum(p.numel() for p in weights(model, name).values()):,}", of_it[:12]]
        for name in ("base", "code", "law")
        for of_it in [column_hash(model, name)]
    ]
    assert [row.split() for row in rows] == expected
    assert base.startswith(f"base {base_hash(model)[:12]}: ")


@pytest.mark.parametrize("init", [None, "copy", "fresh"])
def test_add_leaves_all_else_as_it_was(tmp_path: Path, init: str | None) -> None:
    model = checkpoint(tmp_path / "a")
    asked = [] if init is None else [f"init={init}"]
    args = ("action=add", f"ckpt={tmp_path / 'a'}", "name=new", f"dst={tmp_path / 'b'}")
    assert modules(*args, *asked) == 0
    grown = load(tmp_path / "b")
    assert grown.column_names == ("base", "code", "law", "new")
    before, after = model.state_dict(), grown.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert equal(weights(grown, "new"), weights(model, "base")) is (init != "fresh")
    with torch.no_grad():
        assert torch.equal(grown(tokens()), model(tokens()))
    if init == "fresh":
        for key, tensor in weights(grown, "new").items():
            silent = key.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            assert bool((tensor == 0).all()) is silent, key
    there, here = read_config(tmp_path / "a"), read_config(tmp_path / "b")
    there.model = dataclasses.replace(there.model, module_names=["code", "law", "new"])
    assert here == there
    assert equal(load(tmp_path / "a").state_dict(), model.state_dict()), "ckpt is never changed"


@pytest.mark.parametrize("name", [None, "law", "other"])
def test_an_exported_column_is_imported_to_the_bit(tmp_path: Path, name: str | None) -> None:
    model = checkpoint(tmp_path / "a", "code,law")
    checkpoint(tmp_path / "b", "prose")
    file = tmp_path / "files" / "law.pt"
    modules("action=export", f"ckpt={tmp_path / 'a'}", "name=law", f"out={file}")
    rename = [] if name is None else [f"name={name}"]
    args = ("action=import", f"ckpt={tmp_path / 'b'}", f"src={file}", f"dst={tmp_path / 'c'}")
    modules(*args, *rename)
    found = load(tmp_path / "c")
    assert found.column_names == ("base", "prose", name or "law")
    assert equal(weights(found, name or "law"), weights(model, "law"))
    routes = torch.full((2, 4), 2)
    with torch.no_grad():
        assert torch.equal(found(tokens(), routes=routes), model(tokens(), routes=routes))
        assert torch.equal(found(tokens()), model(tokens()))
    # Out again: nothing is lost on the way.
    again = tmp_path / "again.pt"
    modules("action=export", f"ckpt={tmp_path / 'c'}", f"name={name or 'law'}", f"out={again}")
    first, second = (torch.load(f, weights_only=True) for f in (file, again))
    assert equal(first["weights"], second["weights"])
    assert first["base_hash"] == second["base_hash"]


def test_merge_takes_the_mean(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "a")
    for number, asked in enumerate(("modules=code,law,base", "modules=[code, law, base]")):
        dst = tmp_path / f"b{number}"
        modules("action=merge", f"ckpt={tmp_path / 'a'}", asked, "name=all", f"dst={dst}")
        found = load(dst)
        assert found.column_names == ("base", "code", "law", "all")
        for key, tensor in weights(found, "all").items():
            parts = [weights(model, name)[key] for name in ("code", "law", "base")]
            torch.testing.assert_close(tensor, sum(parts) / 3, rtol=1e-6, atol=1e-7)
        before, after = model.state_dict(), found.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "action=null: expected one of list, add, export, import, merge"),
        ("action=remove", "action=remove: expected one of list, add, export, import, merge"),
        ("action=list chkpt=A", "unknown key chkpt: did you mean ckpt?"),
        ("action=list", "ckpt=: no such folder"),
        ("action=list ckpt=NONE", "ckpt=NONE: no such folder"),
        ("action=list ckpt=EMPTY", "ckpt=EMPTY: holds no complete checkpoint"),
        ("action=list ckpt=A dst=NEW", "dst: action=list does not take it, only ckpt"),
        ("action=add ckpt=A name=new", "dst=: action=add needs it"),
        ("action=add ckpt=A dst=NEW", "name=: action=add needs it"),
        ("action=add ckpt=A name=new dst=A", "dst=A: is a folder with files in it"),
        ("action=add ckpt=A name=new dst=FILE", "dst=FILE: is a file already"),
        ("action=add ckpt=A name=new dst=NEW init=zero", "init=zero: expected one of copy, fresh"),
        ("action=add ckpt=A name=new dst=NEW out=x", "out: action=add does not take it, only ckpt"),
        ("action=add ckpt=A name=code dst=NEW", "name=code: there is such a column already, of"),
        ("action=add ckpt=A name=base dst=NEW", "name=base: there is such a column already, of"),
        ("action=add ckpt=A name=auto dst=NEW", "name=auto: PyTorch or the jobs use this word"),
        ("action=add ckpt=A name=a/b dst=NEW", "name=a/b: expected a name of letters"),
        ("action=export ckpt=A name=code", "out=: action=export needs it"),
        ("action=export ckpt=A out=NEW", "name=: action=export needs it"),
        ("action=export ckpt=A name=code out=FILE", "out=FILE: is there already"),
        ("action=export ckpt=A name=prose out=NEW", "name=prose: expected a column beside the"),
        ("action=export ckpt=A name=base out=NEW", "name=base: expected a column beside the base"),
        ("action=import ckpt=A dst=NEW", "src=: action=import needs it"),
        ("action=import ckpt=A src=NONE dst=NEW", "src=NONE: no such file"),
        ("action=import ckpt=A src=EMPTY dst=NEW", "src=EMPTY: no such file"),
        ("action=import ckpt=A src=FILE dst=NEW", "FILE: not readable as a torch file"),
        ("action=import ckpt=A src=COLUMN dst=NEW", "name=code: there is such a column already"),
        ("action=import ckpt=A src=COLUMN dst=NEW name=law", "name=law: there is such a column"),
        ("action=import ckpt=A src=COLUMN dst=NEW name=x.y", "name=x.y: expected a name"),
        ("action=import ckpt=B src=COLUMN dst=NEW", "COLUMN: the column code belongs to the base"),
        ("action=merge ckpt=A name=new dst=NEW", "modules=: action=merge needs it"),
        ("action=merge ckpt=A modules=code,law dst=NEW", "name=: action=merge needs it"),
        ("action=merge ckpt=A modules=code name=n dst=NEW", "modules=code: expected two or more"),
        ("action=merge ckpt=A modules=law,law name=n dst=NEW", "modules=law,law: expected two"),
        ("action=merge ckpt=A modules=a,law name=n dst=NEW", "modules=a,law: expected two or more"),
        ("action=merge ckpt=A modules=code,law name=law dst=NEW", "name=law: there is such"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, args: str, message: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("text")
    checkpoint(tmp_path / "A")
    checkpoint(tmp_path / "B", "prose", seed=2)
    if "COLUMN" in args:
        modules(*f"action=export ckpt={tmp_path}/A name=code out={tmp_path}/COLUMN".split())
    before = sorted(tmp_path.rglob("*"))
    names = "NONE|EMPTY|FILE|COLUMN|NEW|A|B"
    placed = re.sub(rf"=({names})(?= |$)", rf"={tmp_path}/\1", args)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        modules(*placed.split())
    text = str(caught.value)
    assert text.replace(f"{tmp_path}/", "").startswith(message)
    assert "\n" not in text
    assert sorted(tmp_path.rglob("*")) == before


def test_an_import_onto_another_base_says_what_to_do(tmp_path: Path) -> None:
    ours, theirs = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", "", seed=2)
    modules(*f"action=export ckpt={tmp_path}/a name=code out={tmp_path}/code.pt".split())
    with pytest.raises(CheckpointError) as caught:
        modules(*f"action=import ckpt={tmp_path}/b src={tmp_path}/code.pt dst={tmp_path}/c".split())
    hashes = re.findall(r"\b[0-9a-f]{12}\b", str(caught.value))
    assert hashes == [base_hash(ours)[:12], base_hash(theirs)[:12]]
    assert "add it to a checkpoint of its own base" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_model_without_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "a", "")
    modules("action=list", f"ckpt={tmp_path / 'a'}")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["base"] * 2
    with pytest.raises(ConfigError, match="beside the base: there is none"):
        modules("action=export", f"ckpt={tmp_path / 'a'}", "name=code", f"out={tmp_path / 'x'}")


def test_names_are_checked_before_torch_is_loaded(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a")
    code = (
        "import sys; from ray_jobs.modules import main; from modular_lm.config import *\n"
        "from modular_lm.errors import ConfigError\n"
        f"args = 'action=add ckpt={tmp_path}/a name=code dst={tmp_path}/b'.split()\n"
        "try: main(*load_config(ModulesConfig, args))\n"
        "except ConfigError: print('refused', [m for m in ('torch', 'ray') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert shown.stdout.strip() == "refused []"


def test_help_names_every_key() -> None:
    text = format_help(ModulesConfig, "", "")
    assert all(f"  {f.name}=" in text for f in dataclasses.fields(ModulesConfig))
    assert "list|add|export|import|merge" in text


# Generating by them


def generated(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert generate(*load_config(GenerateConfig, [*args, "max_tokens=24"])) == 0
    return capsys.readouterr().out


def test_generate_runs_the_column_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "a", "code")
    ckpt = f"ckpt={tmp_path / 'a'}"
    base, code = (generated(capsys, ckpt, f"route={name}") for name in ("base", "code"))
    assert base != code
    assert generated(capsys, ckpt) == base
    assert generated(capsys, ckpt, "route=auto", "modules=code") == code
    out = tmp_path / "out.jsonl"
    generated(capsys, ckpt, "route=auto", f"out={out}")
    line = json.loads(out.read_text())
    assert len(line["columns"]) == math.ceil((1 + len(line["tokens"])) / 8)  # BOS stands first
    assert line["columns"][0] == "base"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("route=cod", "route=cod: expected auto or a column: base, code"),
        ("route=auto modules=base,law", "modules=base,law: there is no column law; there are base"),
        ("route=code modules=base", "modules=base: is for route=auto"),
        ("out=FOLDER", "out=FOLDER: is a folder; name a file"),
    ],
)
def test_generate_refuses_what_is_not_there(tmp_path: Path, args: str, message: str) -> None:
    checkpoint(tmp_path / "a", "code")
    placed = args.replace("FOLDER", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        generate(*load_config(GenerateConfig, [f"ckpt={tmp_path / 'a'}", *placed.split()]))
    assert str(caught.value).replace(str(tmp_path), "FOLDER").startswith(message)

"""`python -m modular_lm.data.shards`: what it says of whole and of damaged sources."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modular_lm.config.schema import PrepareConfig, ShardsConfig, TokenizerConfig
from modular_lm.data.inspect import inspect, verify
from modular_lm.data.prepare import prepare_sources
from modular_lm.errors import ConfigError, DataError
from tests.support import REPO


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sources of two shards."""
    for name in ("books", "wiki"):
        (tmp_path / "src" / name).mkdir(parents=True)
        texts = [f"{name} {i} " + "la " * (i % 9) for i in range(80)] + ["", f"{name} 1 la "]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "src" / name / "a.jsonl").write_text(lines)
    out = tmp_path / "out"
    prepare_sources(PrepareConfig(src=str(tmp_path / "src"), dst=str(out), shards=2))
    return out


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_inspect_tells_what_is_inside(root: Path) -> None:
    text = "\n".join(inspect(ShardsConfig(dir=str(root), samples=2)))
    assert text.count(" in ") >= 2
    for said in ("books in", "wiki in", "bytes, 258 tokens", "uint16", "rows of 1,024", "seed 42",
                 "empty 1", "train 1, val 0", "made from   1 files"):  # fmt: skip
        assert said in text
    assert text.count(" tokens: '") == 4
    (one,) = [x for x in inspect(ShardsConfig(dir=str(root / "wiki"), samples=0)) if " in " in x][
        :1
    ]
    assert one == f"wiki in {root / 'wiki'}"


def test_inspect_with_another_tokenizer(root: Path, tmp_path: Path, shared_data: Path) -> None:
    llama = TokenizerConfig("sp", str(shared_data / "tokenizers/llama2/tokenizer.model"))
    with pytest.raises(ConfigError, match=r"tokenizer\.name=sp: .*was made with another \(bytes"):
        list(inspect(ShardsConfig(dir=str(root), tokenizer=llama)))
    source, out = str(tmp_path / "src" / "wiki"), tmp_path / "llama"
    prepare_sources(PrepareConfig(src=source, dst=str(out), tokenizer=llama))
    ids = "\n".join(inspect(ShardsConfig(dir=str(out), samples=1)))
    assert "tokens: 1 " in ids  # BOS
    assert "for text name the tokenizer" in ids
    assert "tokens: 'wiki " in "\n".join(inspect(ShardsConfig(dir=str(out), tokenizer=llama)))


def test_verify_lists_every_damaged_shard(root: Path) -> None:
    whole = list(verify(ShardsConfig(dir=str(root))))
    assert [line.split(":")[0] for line in whole] == ["books", "wiki"]
    assert all(" shards are whole, 81 documents, " in line for line in whole)
    damage(root / "books" / "train-00000.parquet")
    damage(root / "books" / "train-00001.parquet")
    (root / "wiki" / "train-00000.parquet").unlink()
    with pytest.raises(DataError) as caught:
        list(verify(ShardsConfig(dir=str(root))))
    first, second, third = str(caught.value).split("\nerror: ")
    assert re.search(r"books/train-00000\.parquet: row \d+ differs from what was written", first)
    assert re.search(r"books/train-00001\.parquet: row \d+ differs from what was written", second)
    assert "wiki/train-00000.parquet: named in manifest.json but missing" in third


@pytest.mark.slow
def test_the_command(root: Path, tmp_path: Path) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "modular_lm.data.shards", *args]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run("action=verify", f"dir={root}")[0] == 0
    damage(root / "books" / "train-00000.parquet")
    code, out, error = run("action=verify", f"dir={root}")
    assert (code, error.count("error: ")) == (2, 1)
    assert "books: 1 of " in out
    assert "wiki: " in out
    for arguments in (["dir=x"], ["action=verify"], ["action=verify", f"dir={tmp_path}/none"]):
        code, _, error = run(*arguments)
        assert (code, error.count("\n")) == (2, 1)

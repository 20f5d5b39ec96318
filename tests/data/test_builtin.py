"""The built-in corpus: enough text, prepared once, wherever the cache is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data import builtin
from modular_lm.data.builtin import ensure_builtin, prepare_builtin, standard_library
from modular_lm.data.manifest import Manifest
from modular_lm.data.reader import SourceReader
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import build_tokenizer

BYTES = TokenizerConfig()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files in place of the real one."""
    library = tmp_path / "lib"
    for name in ("a.py", "json/b.py", "test/no.py", "x/tests/no.py", "site-packages/no.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n")
    (library / "notes.txt").write_text("no")
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(library))
    return library


def test_it_is_real_text_of_a_useful_size(cache: Path) -> None:
    folder = ensure_builtin(BYTES)
    assert cache in folder.parents
    assert [p.name for p in folder.parent.iterdir()] == ["builtin"]
    manifest = Manifest.load(folder)
    assert 5e6 < manifest.train.text_bytes < 20e6
    assert manifest.val.documents >= 10
    text = build_tokenizer(BYTES).decode(next(SourceReader(folder).documents()).tolist())
    assert text in set(standard_library())


def test_tests_and_unreadable_files_are_left_out(small_library: Path, caplog) -> None:
    (small_library / "bad.py").write_bytes(b"# \xff\xfe no coding\n")
    (small_library / "odd.py").write_bytes(b"# coding: no-such-codec\n")
    (small_library / "latin.py").write_bytes("# coding: latin-1\n# é\n".encode("latin-1"))
    caplog.set_level("INFO")
    assert list(standard_library()) == ["# a.py\n", "# coding: latin-1\n# é\n", "# json/b.py\n"]
    assert "2 files could not be read" in caplog.text


def test_prepared_once(small_library: Path) -> None:
    folder = ensure_builtin(BYTES)
    before = (folder / "manifest.json").stat().st_mtime_ns
    (small_library / "new.py").write_text("new")
    assert ensure_builtin(BYTES) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_cache_is_made_again(small_library: Path) -> None:
    folder = ensure_builtin(BYTES)
    (folder / "train-00000.parquet").unlink()
    assert ensure_builtin(BYTES) == folder
    Manifest.load(folder).check_sizes(folder)
    shard = folder / "train-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"a", b"b"))
    ensure_builtin(BYTES, verify=True)
    assert shard.read_bytes() == whole


def test_each_tokenizer_has_its_own(small_library: Path, shared_data: Path) -> None:
    llama2 = TokenizerConfig("sp", str(shared_data / "tokenizers/llama2/tokenizer.model"))
    folders = {ensure_builtin(BYTES), ensure_builtin(llama2)}
    assert len(folders) == 2
    assert {Manifest.load(f).tokenizer.n_words for f in folders} == {258, 32000}


def test_concurrent_callers_wait_for_one_of_them(cache: Path) -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO');"
        "from modular_lm.config import TokenizerConfig;"
        "from modular_lm.data.builtin import ensure_builtin;"
        "print(ensure_builtin(TokenizerConfig()))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(ensure_builtin(BYTES))}
    assert sum("preparing the built-in corpus" in err for _, err in outputs) == 1


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MODULAR_LM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert builtin._cache() == tmp_path / "xdg" / "modular-lm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin._cache() == tmp_path / ".cache" / "modular-lm"


def test_into_a_folder_of_ones_own(small_library: Path, cache: Path, tmp_path: Path) -> None:
    manifest = prepare_builtin(PrepareConfig(dst=str(tmp_path / "dst"), seed=3))
    assert Manifest.load(tmp_path / "dst" / "builtin") == manifest
    assert manifest.settings.seed == 3
    assert not cache.exists()


def test_a_bad_tokenizer_is_the_users_mistake(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.path=no\.model: no such file"):
        ensure_builtin(TokenizerConfig("sp", "no.model"))
    assert not os.path.exists(cache)

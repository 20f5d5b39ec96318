"""Tokenizers: golden ids, round trips, byte counts, and errors that say what to do."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config import TokenizerConfig
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import Tokenizer, _short_runs, build_tokenizer

TRICKY = ["", " ", "  two  blanks ", "a\r\nb\tc\0d", "naïve ½ 日本語 🙂 é", "'Ve 1234567 !!\n\n  x"]
SPECIALS = ["<s>a</s>", "<|begin_of_text|>x<|end_of_text|>", "<|endoftext|>", "<unk> <0x0A>"]


@pytest.fixture(scope="module", params=["bytes", "llama2", "llama3", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return build_tokenizer(TokenizerConfig())
    return load(request.param, request.getfixturevalue("shared_data"))


def load(name: str, shared_data: Path) -> Tokenizer:
    folder = shared_data / "tokenizers"
    if name == "gpt2":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken_cache"))
            return build_tokenizer(TokenizerConfig(name="tiktoken", path="gpt2"))
    path = str(folder / name / "tokenizer.model")
    return build_tokenizer(TokenizerConfig("sp" if name == "llama2" else "tiktoken", path))


@pytest.mark.parametrize("name", ["llama2", "llama3", "gpt2"])
def test_golden_ids(name: str, shared_data: Path) -> None:
    vectors = json.loads((shared_data / "golden/tokenization/vectors.json").read_text())
    vectors = [v for v in vectors if v["tokenizer"] == name]
    tokenizer = load(name, shared_data)
    assert len(vectors) >= 44
    for v in vectors:
        bos, eos = "BOS=1" in v["source"] or "bos=" in v["source"], "eos=" in v["source"]
        assert tokenizer.encode(v["text"], add_bos=bos, add_eos=eos) == v["ids"], v
        assert tokenizer.decode(v["ids"]) == v["text"]
        array = tokenizer.encode_array(v["text"].encode(), np.uint32, add_bos=bos, add_eos=eos)
        assert array.tolist() == v["ids"]


def test_all_golden_vectors_are_of_a_tested_tokenizer(shared_data: Path) -> None:
    vectors = json.loads((shared_data / "golden/tokenization/vectors.json").read_text())
    assert {v["tokenizer"] for v in vectors} == {"llama2", "llama3", "gpt2"}
    assert len(vectors) == 137


def test_known_sizes_and_special_ids(tokenizer: Tokenizer) -> None:
    known = {258: (256, 257), 32000: (1, 2), 128256: (128000, 128001), 50257: (50256, 50256)}
    assert known[tokenizer.n_words] == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.shape == (tokenizer.n_words,)


@settings(deadline=None, max_examples=60)
# Sentencepiece writes blanks as U+2581: it cannot tell the two apart.
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_round_trip_and_byte_count(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("text", TRICKY + SPECIALS)
def test_round_trip_of_tricky_text(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    expected = len(text.encode()) + (tokenizer.prefix_bytes if text else 0)
    assert tokenizer.token_bytes[ids].sum() == expected
    dtype = "uint16" if tokenizer.n_words <= 1 << 16 else "uint32"
    array = tokenizer.encode_array(text.encode(), dtype, add_bos=True, add_eos=True)
    assert array.dtype == dtype
    assert array.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]


@pytest.mark.parametrize("text", SPECIALS)
def test_special_tokens_in_text_are_ordinary_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text  # and the two ids stand for no text


def test_decode_survives_any_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, tokenizer.n_words, tokenizer.n_words + 1000]) == ""
    half = tokenizer.encode("日")[:-1]
    assert set(tokenizer.decode(half).strip(" ")) <= {"\ufffd"}


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("run", [" ", "\n", "a", "é"])
def test_a_very_long_run_of_one_character(tokenizer: Tokenizer, run: str) -> None:
    """Without care, tiktoken panics on a run of some 10^5 blanks."""
    text = f"x{run * 300_000}y"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text.encode(), np.uint32).tolist() == ids


@pytest.mark.parametrize("length", [24_998, 24_999, 25_000, 25_001, 50_000, 50_001])
@pytest.mark.parametrize("before", [0, 1, 12_499, 12_500, 24_999])
def test_runs_are_cut_at_25_000(before: int, length: int) -> None:
    for run, other in (("a", " "), ("\n", "a"), ("\u3000", "é")):
        long, text = run * length, "e " * (before // 2) + other * (before % 2)
        pieces = _short_runs(f"{text}{other}{long}{other}")
        assert "".join(pieces) == f"{text}{other}{long}{other}"
        assert len(pieces) == 1 + (length - 1) // 25_000
        assert pieces[0] == (f"{text}{other}{run * 25_000}" if len(pieces) > 1 else pieces[0])


def test_pickling_keeps_everything(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.content_hash == tokenizer.content_hash
    assert copy.encode(TRICKY[-1]) == tokenizer.encode(TRICKY[-1])


def test_a_relative_path_can_be_unpickled_elsewhere(
    shared_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(shared_data)
    tokenizer = build_tokenizer(TokenizerConfig("sp", "tokenizers/llama2/tokenizer.model"))
    data = pickle.dumps(tokenizer)
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(data).content_hash == tokenizer.content_hash


def test_content_hashes_are_fixed() -> None:
    """Shards record this hash: changing how it is computed orphans every prepared corpus."""
    expected = "9613d8dc1da422b294c247844eb20197e65501bd5e08c0f80fa36137ff47e410"
    assert build_tokenizer(TokenizerConfig()).content_hash == expected


def test_content_hash_tells_tokenizers_apart(shared_data: Path, tmp_path: Path) -> None:
    hashes = {load(n, shared_data).content_hash for n in ("llama2", "llama3", "gpt2")}
    assert len(hashes) == 3
    moved = tmp_path / "other-name.model"
    moved.write_bytes((shared_data / "tokenizers/llama2/tokenizer.model").read_bytes())
    assert build_tokenizer(TokenizerConfig("sp", str(moved))).content_hash in hashes


@pytest.mark.parametrize("kind", ["sp", "tiktoken"])
@pytest.mark.parametrize(
    "content", [b"", b"PAR1" + bytes(200), b'{"text": "a"}\n', b"\n\x05ab", b"IQ== x\n"]
)
def test_a_file_that_is_no_model(kind, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer\.path=.*tokenizer\.model: not a "
    ) as e:
        build_tokenizer(TokenizerConfig(kind, str(file)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("kind", "file"), [("sp", "llama3"), ("tiktoken", "llama2")])
def test_the_other_kind_of_model_is_recognised(kind, file: str, shared_data: Path) -> None:
    path = str(shared_data / "tokenizers" / file / "tokenizer.model")
    right = {"sp": "tiktoken", "tiktoken": "sp"}[kind]
    with pytest.raises(ConfigError, match=f"set the tokenizer's name to {right}$"):
        build_tokenizer(TokenizerConfig(kind, path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerConfig("sp"), r"data\.tokenizer\.path=null: .* needs a sentencepiece model"),
        (TokenizerConfig("tiktoken"), r"data\.tokenizer\.path=null: .* needs a tiktoken rank file"),
        (TokenizerConfig("sp", "no/such.model"), r"path=no/such.model: no such file"),
        (TokenizerConfig("tiktoken", "gtp2"), r"path=gtp2: neither a file .*did you mean gpt2\?"),
        (TokenizerConfig("bytes", "a.model"), r"path=a.model: .*set the name to sp or tiktoken"),
    ],
)
def test_a_missing_path(config: TokenizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(config)


def test_messages_name_the_key_of_the_job() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.path=null"):
        build_tokenizer(TokenizerConfig("sp"), key="tokenizer")


def test_an_encoding_that_cannot_be_downloaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"path=p50k_base: cannot download.*TIKTOKEN_CACHE_DIR"):
        build_tokenizer(TokenizerConfig("tiktoken", "p50k_base"))


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from modular_lm.config import TokenizerConfig as C;"
        "from modular_lm.tokenizer import build_tokenizer; build_tokenizer(C());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

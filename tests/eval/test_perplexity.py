"""Scores of held-out documents equal those of a plain loop over them, one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import ModelConfig, TokenizerConfig
from modular_lm.eval.documents import DocumentScores, write_documents
from modular_lm.eval.perplexity import Scores, Validation, bits_per_byte, pad, text_bytes
from modular_lm.model.init import init_weights
from modular_lm.model.lm import IGNORE, LanguageModel
from modular_lm.parallel import World, init_world
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from tests.eval.held_out import Document, random_documents, write_held_out

SEQ_LEN = 24
BYTES = build_tokenizer(TokenizerConfig())
TEXTS = ("a", " a  b", "Ein Bär, 熊, 🐻", "one\ntwo\n\n", "\x00 <s> </s> ", "x" * 60)
N_BYTES = sum(len(text.encode()) for text in TEXTS)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(use_gpu=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    path = shared_data / "tokenizers" / "llama2" / "tokenizer.model"
    return build_tokenizer(TokenizerConfig(name="sp", path=str(path)))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Chunks of 8 tokens whose aggregation sites act."""
    keys = ModelConfig(
        dim=16, n_layers=2, n_heads=2, multiple_of=8, module_seq_len=8, module_agg="avg"
    )
    model = LanguageModel(resolve_model(keys, SEQ_LEN, BYTES.n_words))
    init_weights(model, seed=0)
    for agg in model.aggs:
        torch.nn.init.normal_(agg.get_parameter("wo.weight"), std=0.5)
    return model


def plain_sums(model: LanguageModel, documents: list[Document]) -> tuple[float, int, int]:
    """(nll, scored tokens, bytes) of byte documents, from the logits of each by itself."""
    nll, tokens, n_bytes = 0.0, 0, 0
    for document in documents:
        ids = torch.from_numpy(document[: SEQ_LEN + 1].astype(np.int64))
        if len(ids) < 2:
            continue
        logits = model(ids[None, :-1])[0]
        nll += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        n_bytes += int((ids[1:] < 256).sum())  # BOS and EOS stand for no text
    return nll, tokens, n_bytes


@torch.no_grad()
def check_scores(
    scores: dict[str, float], model: LanguageModel, name: str, documents: list[Document]
) -> None:
    nll, tokens, n_bytes = plain_sums(model, documents)
    n_scored = sum(len(d) > 1 for d in documents)
    expected = {
        "nll": nll / tokens,
        "ppl": math.exp(nll / tokens),
        "bpb": nll / math.log(2) / n_bytes,
        "avg_seqlen": tokens / n_scored,
    }
    found = {key: scores[f"validation/{name}/{key}"] for key in expected}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_a_plain_loop_over_the_documents(
    world: World, model: LanguageModel, tmp_path: Path, batch_size: int
) -> None:
    # One without a target, some of one chunk, some of exactly seq_len tokens and around it.
    lengths = {"short": (1, 2, 8, 9, 10, 3), "long": (25, 24, 26, 90, 17)}
    documents = {name: random_documents(n, BYTES.n_words) for name, n in lengths.items()}
    folders = {n: write_held_out(tmp_path / n, d, BYTES) for n, d in documents.items()}
    scores = Validation(folders, BYTES, SEQ_LEN, 100, batch_size).score(model, world).metrics
    for name in lengths:
        check_scores(scores, model, name, documents[name])
    # By tokens, not a mean of the two sources' means.
    check_scores(scores, model, "all", documents["short"] + documents["long"])
    assert len(scores) == 4 * 3


@pytest.mark.parametrize("batch_size", [2, 16])
def test_every_document_has_its_own_loss(
    world: World, model: LanguageModel, tmp_path: Path, batch_size: int
) -> None:
    lengths = {"short": (2, 1, 9, 3, 10), "long": (25, 90)}
    documents = {name: random_documents(n, BYTES.n_words) for name, n in lengths.items()}
    folders = {n: write_held_out(tmp_path / n, d, BYTES) for n, d in documents.items()}
    scores = Validation(folders, BYTES, SEQ_LEN, 100, batch_size).score(model, world)
    assert scores.documents.keys() == documents.keys()
    for name, found in scores.documents.items():
        expected = [plain_losses(model, d) for d in documents[name] if len(d) > 1]
        assert found.nll == pytest.approx([sum(each) for each in expected], rel=1e-5)
        assert found.tokens == [len(each) for each in expected]
        mean = sum(found.nll) / sum(found.tokens)
        assert mean == pytest.approx(scores.metrics[f"validation/{name}/nll"], rel=1e-9)


def test_the_losses_of_documents_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "evals" / "0000000007" / "documents.json"
    write_documents(path, 7, {"web": DocumentScores([1.5, math.nan], [3, 4])})
    written = json.loads(path.read_text())
    assert written["step"] == 7
    assert written["sources"] == {"web": {"nll": [1.5, None], "tokens": [3, 4]}}


def test_one_source_has_no_sum_and_only_the_first_documents_count(
    world: World, model: LanguageModel, tmp_path: Path
) -> None:
    documents = random_documents((12, 30, 5, 20), BYTES.n_words)
    folders = {"web": write_held_out(tmp_path / "web", documents, BYTES)}
    scores = Validation(folders, BYTES, SEQ_LEN, 2, 4).score(model, world).metrics
    check_scores(scores, model, "web", documents[:2])
    assert {key.split("/")[1] for key in scores} == {"web"}


def test_sources_without_documents_are_left_out(
    world: World, model: LanguageModel, tmp_path: Path
) -> None:
    folders = {"dots": write_held_out(tmp_path / "dots", random_documents((1, 1), 256), BYTES)}
    assert Validation(folders, BYTES, SEQ_LEN, 9, 4, 8).score(model, world) == Scores({}, {}, {})


def test_scoring_leaves_the_mode_of_the_model_and_builds_no_graph(
    world: World, model: LanguageModel, tmp_path: Path
) -> None:
    folders = {"web": write_held_out(tmp_path / "web", random_documents((5,), 256), BYTES)}
    validation, modes = Validation(folders, BYTES, SEQ_LEN, 9, 4), []
    hook = model.register_forward_pre_hook(
        lambda *_: modes.append((model.training, torch.is_grad_enabled()))
    )
    for training in (True, False):
        model.train(training)
        validation.score(model, world)
        assert model.training is training
    hook.remove()
    assert modes == [(False, False)] * 2


def test_a_hopeless_model_has_a_finite_perplexity(
    world: World, model: LanguageModel, tmp_path: Path
) -> None:
    folders = {"web": write_held_out(tmp_path / "web", random_documents((9,), 256), BYTES)}

    class Hopeless(LanguageModel):
        def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None):
            return torch.full(tokens.shape, 1e4)

    hopeless = Hopeless(model.config)
    scores = Validation(folders, BYTES, SEQ_LEN, 9, 4).score(hopeless, world).metrics
    assert scores["validation/web/nll"] == 1e4
    assert math.isfinite(scores["validation/web/ppl"])


# ---------------------------------------------------------------- by position


@torch.no_grad()
def plain_losses(model: LanguageModel, document: Document) -> list[float]:
    """The nll of each target of a document, from its logits by itself."""
    ids = torch.from_numpy(document[: SEQ_LEN + 1].astype(np.int64))
    return F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("chunk_len", [5, 8, 23])
def test_curves_are_those_of_a_plain_loop_over_the_tokens(
    world: World, model: LanguageModel, tmp_path: Path, batch_size: int, chunk_len: int
) -> None:
    lengths = {"short": (2, 8, 9, 10, 3), "long": (25, 24, 26, 90, 17)}
    documents = {name: random_documents(n, BYTES.n_words) for name, n in lengths.items()}
    folders = {n: write_held_out(tmp_path / n, d, BYTES) for n, d in documents.items()}
    validation = Validation(folders, BYTES, SEQ_LEN, 100, batch_size, chunk_len)
    scores = validation.score(model, world)
    assert scores.curves.keys() == {"short", "long", "all"}
    for name, curves in scores.curves.items():
        found = documents.get(name, documents["short"] + documents["long"])
        by_position: dict[int, list[float]] = {}
        by_chunk: dict[int, list[float]] = {}
        for document in found:
            for t, nll in enumerate(plain_losses(model, document)):
                by_position.setdefault(t % chunk_len, []).append(nll)
                by_chunk.setdefault(t // chunk_len, []).append(nll)
        for curve, expected in (
            (curves.position_in_chunk, by_position),
            (curves.chunk_index, by_chunk),
        ):
            counts = [len(expected.get(i, ())) for i in range(len(curve.count))]
            assert curve.count.tolist() == counts
            sums = [sum(expected.get(i, ())) for i in range(len(curve.nll))]
            assert curve.nll.tolist() == pytest.approx(sums, rel=1e-5)
            mean = scores.metrics[f"validation/{name}/nll"]
            assert mean * curve.count.sum() == pytest.approx(curve.nll.sum().item(), rel=1e-12)
        for key, value in curves.metrics().items():
            assert scores.metrics[f"validation/{name}/{key}"] == value
    assert "validation/long/nll_chunk_start" in scores.metrics


@pytest.mark.parametrize("chunk_len", [None, SEQ_LEN, 100])
def test_one_chunk_has_no_curves(
    world: World, model: LanguageModel, tmp_path: Path, chunk_len: int | None
) -> None:
    folders = {"web": write_held_out(tmp_path / "web", random_documents((40,), 256), BYTES)}
    scores = Validation(folders, BYTES, SEQ_LEN, 9, 4, chunk_len).score(model, world)
    assert scores.curves == {}
    assert len(scores.metrics) == 4


# ---------------------------------------------------------------- padding


@given(lengths=st.lists(st.integers(2, 12), max_size=5), extra=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_rows_hold_their_document_and_then_padding(lengths: list[int], extra: int) -> None:
    documents = random_documents(lengths, 250)
    width = max(lengths, default=2) - 1 + extra
    inputs, targets = pad(documents, width)
    assert inputs.shape == targets.shape == (max(len(documents), 1), width)
    for document, row_in, row_out in zip(documents, inputs, targets, strict=False):
        n = len(document) - 1
        assert row_in[:n].tolist() == document[:-1].tolist()
        assert row_out[:n].tolist() == document[1:].tolist()
    assert int((targets != IGNORE).sum()) == sum(n - 1 for n in lengths)


def test_padding_adds_no_loss_and_changes_none(model: LanguageModel) -> None:
    documents = random_documents((4, 12, 20), BYTES.n_words)
    with torch.no_grad():
        narrow = [model(*pad([d], len(d) - 1))[0] for d in documents]
        wide = model(*pad(documents, 2 * SEQ_LEN))
        empty = model(*pad([], 10))
    for document, alone, padded in zip(documents, narrow, wide, strict=True):
        n = len(document) - 1
        torch.testing.assert_close(padded[:n], alone, rtol=1e-5, atol=1e-6)
        assert not padded[n:].any()
    assert not empty.any()


# ---------------------------------------------------------------- bytes of text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_whole_document_are_those_of_its_text(llama2: Tokenizer, text: str) -> None:
    assert llama2.prefix_bytes == 1
    for tokenizer in (BYTES, llama2):
        ids = np.array([tokenizer.encode(text, add_bos=True, add_eos=True)], np.uint16)
        assert text_bytes(tokenizer, ids) == len(text.encode()), tokenizer.name


@pytest.mark.parametrize("seq_len", [1, 2, 7, 30])
def test_samples_cut_from_a_stream_of_documents_share_its_bytes(
    llama2: Tokenizer, seq_len: int
) -> None:
    ids = [i for text in TEXTS for i in llama2.encode(text, add_bos=True, add_eos=True)]
    starts = range(0, len(ids) - 1, seq_len)
    ids += [llama2.eos_id] * seq_len  # stands for no text, fills the last sample
    samples = np.array([ids[start : start + seq_len + 1] for start in starts], np.uint16)
    assert text_bytes(llama2, samples) == N_BYTES
    assert sum(text_bytes(llama2, sample[None]) for sample in samples) == N_BYTES


def test_validation_counts_sentencepiece_bytes_exactly(
    world: World, llama2: Tokenizer, tmp_path: Path
) -> None:
    documents = [np.array(llama2.encode(text, add_bos=True, add_eos=True)) for text in TEXTS]
    folders = {"web": write_held_out(tmp_path / "web", documents, llama2)}
    keys = ModelConfig(dim=8, n_layers=1, n_heads=2)
    model = LanguageModel(resolve_model(keys, 64, llama2.n_words))
    init_weights(model, seed=0)
    scores = Validation(folders, llama2, 64, 99, 4).score(model, world).metrics
    nll = scores["validation/web/nll"] * sum(len(d) - 1 for d in documents)
    assert scores["validation/web/bpb"] == pytest.approx(nll / math.log(2) / N_BYTES)


def test_bits_per_byte_of_a_coin_flip_per_byte_is_one() -> None:
    assert bits_per_byte(800 * math.log(2), 800) == pytest.approx(1.0)
    assert bits_per_byte(0.0, 0) == 0.0

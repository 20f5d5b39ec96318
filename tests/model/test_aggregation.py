from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.model.aggregation import MemoryAttention, WeightedSum
from modular_lm.model.summaries import pool_chunks, pool_piece, running_sums

from .tiny_models import READING_MODES, tiny_config

DIM = 16


def random_weights(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module


def make_site(mode: str, **keys: Any) -> Any:
    config = tiny_config(module_agg=mode, **keys)
    return random_weights((MemoryAttention if mode == "stack" else WeightedSum)(config))


def some_chunks(n_chunks: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_chunks)
    return torch.randn(2, n_chunks, length, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("mode", READING_MODES)
def test_the_first_chunk_reads_exactly_nothing(mode: str) -> None:
    h = some_chunks(3, 4)
    out = make_site(mode)(h)
    assert torch.equal(out[:, 0], h[:, 0])
    assert (out[:, 1:] != h[:, 1:]).any()


def by_hand(site: WeightedSum, h: torch.Tensor, weight: Any) -> torch.Tensor:
    """r_k = weight(k) * W_o sum over the summaries of chunks before k, chunk by chunk."""
    m = site.n_summary
    out = []
    for k in range(h.shape[1]):
        total = torch.zeros(h.shape[0], DIM, dtype=h.dtype)
        for j in range(k):
            for part in h[:, j].chunk(m, dim=1):
                total = total + site.norm(part.mean(1))
        out.append(h[:, k] + (weight(k) * total @ site.wo.weight.T)[:, None])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("m", [1, 2])
def test_avg_and_sum_are_their_definitions(m: int) -> None:
    h = some_chunks(4, 6)
    avg = make_site("avg", module_n_summary=m)
    torch.testing.assert_close(avg(h), by_hand(avg, h, lambda k: 1 / (max(k, 1) * m)))
    total = make_site("sum", module_n_summary=m, module_sum_scale=0.3)
    torch.testing.assert_close(total(h), by_hand(total, h, lambda _: 0.3))


def test_stack_is_its_definition() -> None:
    """Token by token: e^l over one plus the sum of e^l, rotated by the number of the sub-chunk."""
    n_chunks, length, m = 4, 4, 2
    site = make_site("stack", module_n_summary=m, module_agg_dim=8)
    h = some_chunks(n_chunks, length)
    summaries = site.norm(pool_chunks(h, m, "mean"))

    def heads(x: torch.Tensor, number: int) -> torch.Tensor:
        """[B, 8] -> [B, 2 heads, 2 pairs], complex and turned by `number` steps."""
        frequency = site.config.rope_theta ** (-torch.arange(0, 4, 2).double() / 4)
        turn = torch.polar(torch.ones(2).double(), number * frequency)
        return torch.view_as_complex(x.view(-1, 2, 2, 2)) * turn

    expected = h.clone()
    for k in range(n_chunks):
        for i in range(length):
            q = heads(site.wq(site.query_norm(h[:, k, i])), k * m)
            above, below = torch.zeros(()), torch.ones(())
            for j, r in ((j, r) for j in range(k) for r in range(m)):
                key = heads(site.wk(summaries[:, j, r]), j * m + r)
                e = ((q * key.conj()).real.sum(-1) / 2).exp()  # sqrt(head_dim) = 2
                above = above + e[..., None] * site.wv(summaries[:, j, r]).view(-1, 2, 4)
                below = below + e
            if k:
                expected[:, k, i] += site.wo((above / below[..., None]).flatten(1))
    torch.testing.assert_close(site(h), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("m", [1, 2])
def test_avg_is_sum_with_scale_one_over_m_in_the_second_chunk(m: int) -> None:
    h = some_chunks(3, 4)
    avg = make_site("avg", module_n_summary=m)(h)
    total = make_site("sum", module_n_summary=m, module_sum_scale=1 / m)(h)
    torch.testing.assert_close(avg[:, 1], total[:, 1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(avg[:, 2], total[:, 2])


@pytest.mark.parametrize("m", [1, 2])
def test_stack_without_queries_is_a_damped_avg(m: int) -> None:
    """All slots weigh the same, and one of the km + 1 is the zero slot."""
    stack = make_site("stack", module_n_summary=m, module_agg_dim=8)
    torch.nn.init.zeros_(stack.wq.weight)
    avg = make_site("avg", module_n_summary=m)
    with torch.no_grad():
        avg.norm.weight.copy_(stack.norm.weight)
        avg.wo.weight.copy_(stack.wo.weight @ stack.wv.weight)
    h = some_chunks(5, 4)
    km = m * torch.arange(5).double()[:, None, None]
    expected = h + km / (km + 1) * (avg(h) - h)
    torch.testing.assert_close(stack(h), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", READING_MODES)
def test_an_outlier_does_not_leak_into_its_own_or_earlier_chunks(mode: str) -> None:
    """A prefix sum taken as a difference of sums would, by rounding."""
    site = make_site(mode).float()
    h = some_chunks(4, 4).float()
    loud = h.clone()
    loud[:, 2, 1] = 1e4
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[2, 1] = kept[3] = False
    assert torch.equal(site(loud)[:, kept], site(h)[:, kept])


def test_sum_and_avg_are_not_the_same_function() -> None:
    """They would be, were the summaries normalised after aggregation."""
    h = some_chunks(5, 4)
    avg, total = (make_site(mode)(h) - h for mode in ("avg", "sum"))
    growth = (total[:, 4] / avg[:, 4]).mean() / (total[:, 1] / avg[:, 1]).mean()
    torch.testing.assert_close(growth.item(), 4.0)


@pytest.mark.parametrize("mode", ["avg", "stack"])
def test_the_read_stays_bounded_with_many_chunks(mode: str) -> None:
    site = make_site(mode)
    h = some_chunks(1, 4).repeat(1, 200, 1, 1)
    read = (site(h) - h).abs().amax((0, 2, 3))
    assert read[-1] < 3 * read[1:8].max()


@given(
    part=st.integers(1, 4),
    m=st.integers(1, 3),
    pool=st.sampled_from(["mean", "last"]),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_pooling_piece_by_piece(part: int, m: int, pool: Any, cuts: list[int]) -> None:
    length = part * m
    h = some_chunks(1, length)[:, 0]
    borders = sorted({0, length, *(c for c in cuts if c < length)})
    pooled = torch.zeros(2, m, DIM, dtype=h.dtype)
    for start, end in itertools.pairwise(borders):
        pooled = pool_piece(pooled, h[:, start:end], [start, start], length, pool)
    expected = pool_chunks(h[:, None], m, pool)[:, 0]
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_pooling_of_bf16_sums_in_fp32() -> None:
    """The mean of two neighbouring bf16 numbers is none."""
    h = torch.tensor([1.0, 1.0 + 2**-7], dtype=torch.bfloat16).repeat(256).view(1, 1, 512, 1)
    assert pool_chunks(h, 1, "mean").item() == 1.0 + 2**-8
    assert pool_piece(torch.zeros(1, 1, 1), h[:, 0], [0], 512, "mean").item() == 1.0 + 2**-8


# Documents


def documents_of(lengths: list[int], n_chunks: int) -> torch.Tensor:
    """[1, K, S] ids of documents of these lengths, one after the other."""
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return owners.unflatten(0, (n_chunks, -1))[None]


@pytest.mark.parametrize("mode", ["avg", "sum"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("lengths", [[5, 1, 12, 2], [20], [4, 4, 4, 8], [2, 1, 3, 14]])
def test_a_token_reads_the_summaries_of_its_own_document(
    mode: str, m: int, lengths: list[int]
) -> None:
    """Summary by summary: those that end in an earlier chunk and in the token's document, each
    the mean over that document's tokens of its sub-chunk."""
    n_chunks, length = 5, 4
    site = make_site(mode, module_n_summary=m, module_sum_scale=0.3)
    h = some_chunks(n_chunks, length)[:1]
    documents = documents_of(lengths, n_chunks)
    expected = h.clone()
    tokens, owners, part = h.flatten(1, 2)[0], documents.flatten(), length // m
    for t in range(n_chunks * length):
        own = []
        for last in range(part - 1, t // length * length, part):
            if owners[last] == owners[t]:
                mine = [i for i in range(last - part + 1, last + 1) if owners[i] == owners[t]]
                own.append(site.norm(tokens[mine].mean(0)))
        if own:
            weight = 0.3 if mode == "sum" else 1 / len(own)
            expected[0, t // length, t % length] += weight * site.wo(torch.stack(own).sum(0))
    torch.testing.assert_close(site(h, documents), expected, rtol=1e-11, atol=1e-11)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_running_sums_begin_anew_with_each_document(lengths: list[int]) -> None:
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    values = torch.randn(1, sum(lengths), 3, generator=torch.Generator().manual_seed(0)).double()
    sums, numbers = running_sums(values, owners)
    expected = torch.cat([part.cumsum(0) for part in values[0].split(lengths)])
    torch.testing.assert_close(sums[0], expected)
    assert numbers[0, :, 0].tolist() == [i + 1 for n in lengths for i in range(n)]

"""Blocks of ports: apart for different jobs, never shared, never in another's way."""

from __future__ import annotations

import socket
from itertools import islice

import pytest

from cluster.ports import PortBlock, block_size, candidates, claimed
from modular_lm.errors import ConfigError
from tests.support import free_ports

SPAN = (20000, 32000)


def test_a_block_names_different_ports_within_itself() -> None:
    block = PortBlock(20000, block_size(4))
    names = (
        "gcs",
        "dashboard",
        "client",
        "object_manager",
        "node_manager",
        "agent_http",
        "agent_grpc",
    )
    named = [block[name] for name in (*names, "runtime_env_agent", "metrics")]
    first, last = block.workers
    assert named == list(range(20001, 20010))
    assert (first, last) == (20010, 20000 + block.size - 1)
    assert last - first >= 4 * 4


def test_neighbouring_jobs_prefer_blocks_apart_and_all_stay_in_the_range() -> None:
    size = block_size(8)
    preferred = [next(candidates(job, size, 2, SPAN)) for job in range(1000, 1040)]
    assert len(set(preferred)) == 40
    for first in candidates(1000, size, 2, SPAN):
        assert SPAN[0] <= first <= SPAN[1] - 2 * size
        assert (first - SPAN[0]) % (2 * size) == 0
    every = list(candidates(1007, size, 2, SPAN))
    assert len(every) == len(set(every)) == 12000 // (2 * size)


def test_a_range_too_small_for_one_job_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"port_range=\[20000, 20100\]: 2 nodes .* need 162 ports"
    ):
        next(candidates(1, 81, 2, (20000, 20100)))


def test_a_block_is_held_by_one_job_at_a_time() -> None:
    block = _free_block()
    with claimed(block) as taken:
        assert taken == []
        with claimed(block) as second:
            assert second == [block.first]
    with claimed(block) as again:
        assert again == []


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "0.0.0.0"])
def test_ports_on_which_others_listen_are_found(address: str) -> None:
    block = _free_block()
    with (
        socket.create_server((address, block.first + 3)),
        claimed(block) as taken,
    ):
        assert taken == [block.first + 3]


def _free_block() -> PortBlock:
    for start in islice(free_ports(20), 20):
        block = PortBlock(min(start, 65000), 12)
        with claimed(block) as taken:
            if not taken:
                return block
    pytest.fail("no twelve free ports in a row")

"""How many workers there is room for, on the session's Ray: one node of six CPUs."""

from __future__ import annotations

import pytest

from modular_lm.config.schema import RayConfig, TrainConfig
from tests.support import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]


def test_room_is_what_nodes_hold_whole_workers_of_beside_one_cpu(
    ray_session_joined: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from ray_jobs import _cluster

    one, two, four = (RayConfig(num_workers=[1, 8], cpus_per_worker=n) for n in (1, 2, 4))
    assert [_cluster.room_for(c, False) for c in (one, two, four)] == [5, 2, 1]
    assert _cluster.room_for(one, True) == 0, "there is no GPU"
    assert _cluster.leaving() == set()

    def free() -> int:
        return _cluster.room_for(one, False, free=True)

    wait_until(lambda: free() == 5, "the CPUs that others held", 60)
    held = ray.util.placement_group([{"CPU": 3}])
    wait_until(lambda: free() == 2, "CPUs to be taken", 60)
    assert _cluster.room_for(one, False) == 5

    monkeypatch.setattr(_cluster, "_SETTLE_S", 0.0)
    some, three = TrainConfig(ray=RayConfig(num_workers=[1, 8])), TrainConfig()
    three.ray.num_workers = 3
    assert _cluster.wait_for_workers(some, False, lambda: None) == 2, "the rest is another's"
    assert _cluster.wait_for_workers(three, False, lambda: "stopped") is None
    monkeypatch.setattr(_cluster, "_PATIENCE_S", 0.0)
    with pytest.raises(_cluster.RunFailedError, match=r"room for 5, 2 of it free"):
        _cluster.wait_for_workers(three, False, lambda: None)
    ray.util.remove_placement_group(held)
    wait_until(lambda: free() == 5, "the CPUs to be given back", 60)

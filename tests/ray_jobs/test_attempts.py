"""How often a run is started anew, and when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.schema import RayConfig
from modular_lm.errors import AgreedError
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.run import Run, open_run, resolve_config
from tests.support import TINY


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    config = load_config(TrainConfig, [*TINY, f"dump_dir={tmp_path / 'run'}"])[0]
    run = open_run(*resolve_config(config), 1)
    run.begin({})
    return run


def save(run: Run, step: int) -> None:
    """A checkpoint, as far as counting looks at it."""
    made = step_folder(run.folder.checkpoints, step)
    made.mkdir(parents=True)
    (made / COMPLETE).touch()


def test_failures_are_counted_anew_after_each_checkpoint(run: Run) -> None:
    from ray_jobs._attempts import Ended, _Budget

    budget = _Budget(RayConfig(max_failures=2))
    for step in (10, 20):
        budget.spend(Ended("failed", "a worker died"), run)
        budget.spend(Ended("hung", "no progress"), run)
        budget.spend(Ended("preempted", "a node went"), run)
        budget.spend(Ended("resized", "a node came"), run)
        save(run, step)
    budget.spend(Ended("failed", "a worker died"), run)
    budget.spend(Ended("failed", "a worker died"), run)
    with pytest.raises(AgreedError, match=r"a worker died \(logs: ") as raised:
        budget.spend(Ended("failed", "a worker died", code=1), run)
    assert raised.value.exit_code == 1
    assert run.folder.stop_requested() is None


def test_preemptions_have_a_budget_of_their_own_and_then_stop_the_run(run: Run) -> None:
    from ray_jobs._attempts import Ended, _Budget

    budget = _Budget(RayConfig(max_failures=0, max_preemptions=2))
    for _ in range(2):
        budget.spend(Ended("preempted", "10.0.0.7 will be taken away"), run)
    assert run.folder.stop_requested() is None
    budget.spend(Ended("preempted", "10.0.0.8 will be taken away"), run)
    told = run.folder.stop_requested()
    assert told == "10.0.0.8 will be taken away; ray.max_preemptions=2 is used up"

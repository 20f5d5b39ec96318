"""What a run folder that is opened again accepts: the data under which its checkpoint was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.errors import DataError
from modular_lm.train.checkpoint import portable_config
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.run import Run, open_run, resolve_config
from tests.support import TINY


@pytest.fixture
def config(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    return load_config(TrainConfig, [*TINY, f"dump_dir={tmp_path / 'run'}"])[0]


def opened(config: TrainConfig, **data: object) -> Run:
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    return open_run(*resolve_config(changed), 1)


def attempt(run: Run) -> None:
    run.begin({})
    run.begin_attempt(["here"])


def save(run: Run, step: int) -> None:
    """A checkpoint, as far as opening a run looks at it."""
    made = step_folder(run.folder.checkpoints, step)
    made.mkdir(parents=True)
    (made / "params.json").write_text(json.dumps(portable_config(run.config, run.tokenizer)))
    (made / COMPLETE).touch()
    run.folder.append_event("checkpoint", step=step)


def test_an_attempt_under_other_data_that_saved_nothing_does_not_count(
    config: TrainConfig,
) -> None:
    run = opened(config)
    attempt(run)
    save(run, 10)
    attempt(opened(config, seed=7, allow_change=True))
    assert opened(config).data_changes == ()
    with pytest.raises(DataError, match=r"data\.seed: 42 -> 7"):
        opened(config, seed=7)


def test_an_attempt_under_other_data_counts_once_it_saved(config: TrainConfig) -> None:
    run = opened(config)
    attempt(run)
    save(run, 10)
    attempt(opened(config, seed=7, allow_change=True))
    save(run, 20)
    assert opened(config, seed=7).data_changes == ()
    with pytest.raises(DataError, match=r"data\.seed: 7 -> 42"):
        opened(config)


def test_steps_are_counted_again_by_one_attempt_only(config: TrainConfig) -> None:
    run = opened(config)
    attempt(run)
    save(run, 10)
    run.folder.last_step.write(17)
    for _ in range(2):
        attempt(opened(config))
    again = [e["steps_again"] for e in run.folder.events() if e["event"] == "attempt"]
    assert again == [0, 7, 0]

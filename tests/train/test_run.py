"""What a run folder that is opened again accepts: the data under which its checkpoint was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.errors import ConfigError, DataError
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.run import Run, open_run, resolve_config
from modular_lm.train.saving import portable_config
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


def test_a_multiplier_of_no_parameter_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    def with_pattern(pattern: str) -> TrainConfig:
        optim = dataclasses.replace(config.optim, lr_multipliers={pattern: 0.5})
        return dataclasses.replace(config, optim=optim)

    resolve_config(with_pattern("layers.1.*"))
    with pytest.raises(ConfigError, match=r"optim\.lr_multipliers\.layers\.2\.\*=0\.5: matches no"):
        resolve_config(with_pattern("layers.2.*"))
    assert not (tmp_path / "run").exists()

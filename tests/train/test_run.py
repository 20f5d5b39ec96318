"""What a run folder that is opened again accepts, and the lines of its attempts."""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.errors import ConfigError, DataError
from modular_lm.train.attempts import end_attempt
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation_checkpointing": "selective", "activation_checkpointing_save": ["aten.x"]},
            r"activation_checkpointing_save: aten\.x is no operator",
        ),
        ({"float8_recipe": "rowwise", "float8_filter": "nothing"}, "float8_filter=nothing: finds"),
    ],
)
def test_names_of_what_is_not_there_are_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    distributed = dataclasses.replace(config.distributed, **changes)
    with pytest.raises(ConfigError, match=message):
        resolve_config(dataclasses.replace(config, distributed=distributed))
    assert not (tmp_path / "run").exists()


def test_every_attempt_gets_one_end(config: TrainConfig) -> None:
    run = opened(config)
    attempt(run)
    run.folder.last_step.write(7)
    end_attempt(run.folder, "failed", "a worker died")
    end_attempt(run.folder, "failed", "said twice")
    save(run, 10)
    run.begin_attempt(["here", "there"])
    run.folder.last_step.write(15)
    run.folder.stuck_file(0).parent.mkdir()
    run.folder.stuck_file(0).write_text("{}")
    end_attempt(run.folder, "done", None)
    assert not run.folder.stuck()
    ends = [event for event in run.folder.events() if event["event"] == "attempt_end"]
    shown = ("attempt", "outcome", "reason", "step", "steps", "world_size", "hosts")
    assert [[end[name] for name in shown] for end in ends] == [
        [1, "failed", "a worker died", 7, 7, 1, ["here"]],
        [2, "done", None, 15, 5, 2, ["here", "there"]],
    ]
    assert all(0 <= end["seconds"] < 60 for end in ends)


def test_an_attempt_whose_driver_was_killed_is_ended_by_the_next(config: TrainConfig) -> None:
    run = opened(config)
    attempt(run)
    run.folder.last_step.write(3)
    began = datetime.fromisoformat(run.folder.last_event("attempt")["time"])  # type: ignore[index]
    alive = began.timestamp() + 2.5
    for file in (run.folder.ray / "last_step", run.folder.metrics.path, run.folder.events_file):
        if file.exists():
            os.utime(file, (alive, alive))
    attempt(opened(config))
    kinds = [event["event"] for event in run.folder.events()]
    assert kinds == ["created", "attempt", "attempt_end", "attempt"]
    end = run.folder.last_event("attempt_end")
    assert end is not None
    assert (end["outcome"], end["steps"]) == ("lost", 3)
    assert end["seconds"] == pytest.approx(2.5, abs=0.01), "until its last sign of life"

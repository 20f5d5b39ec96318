from __future__ import annotations

import re
from dataclasses import fields

import pytest

from cluster.options import LaunchConfig, check_options, duration_s, split_arguments
from modular_lm.config import JOBS, load_config
from modular_lm.errors import ConfigError

NOT_THE_JOBS = {"dry_run"}


def test_own_keys_and_those_of_the_job_are_told_apart() -> None:
    args = ["config=a.yaml", "nodes=2", "steps=4", "--time=30", "data.seq_len=8", "--help"]
    mine, job = split_arguments(args)
    assert mine == ["nodes=2", "--time=30", "--help"]
    assert job == ["config=a.yaml", "steps=4", "data.seq_len=8"]


@pytest.mark.parametrize("script", JOBS)
def test_no_key_of_a_job_is_taken_by_the_launcher(script: str) -> None:
    own = {f.name for f in fields(LaunchConfig)} - NOT_THE_JOBS
    assert own & {f.metadata.get("name") or f.name for f in fields(JOBS[script])} == set()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:02:03", 3723),
        ("2-3", 183600),
        ("2-3:10", 184200),
        ("1-0:0:1", 86401),
    ],
)
def test_durations_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["time=2h"], "time=2h: expected minutes, H:MM:SS"),
        (["time=5", "signal_s=280"], "time=5, which is 5 minutes, leaves nothing to train in"),
        (["time=1:00"], "time=1:00, which is 1 minute, leaves nothing"),
        (["time=1:10"], "time=1:10, which is 1 minute and 10 s, leaves nothing"),
        (["time=0"], "time=0: is no limit at all for SLURM"),
        (["mem=16"], "mem=16: is 16 MB for SLURM; give the unit, e.g. 16G"),
        (["venv=a", "conda=b"], "venv=a and conda=b: use one"),
        (["launcher=bash", "configs=[a.yaml]"], "configs: a job array needs launcher=sbatch"),
        (["account=a b"], "account='a b': expected a word"),
        (["partition="], "partition='': expected a word"),
        (["sbatch_options=[reservation=x]"], "sbatch_options='reservation=x': expected --name"),
        (["sbatch_options=[--array=0-3]"], "is set by the launcher; use configs=[...]"),
        (["sbatch_options=[-a 0-3]"], "is set by the launcher; use configs=[...]"),
        (["sbatch_options=[--nodes=1]"], "is set by the launcher; use nodes="),
        (["sbatch_options=[-N1]"], "is set by the launcher; use nodes="),
        (["sbatch_options=[--part=x]"], "is set by the launcher; use partition="),
        (["sbatch_options=[--no-requeue]"], "is set by the launcher; use requeue=false"),
        (["sbatch_options=[-v]"], "sbatch_options='-v': expected --name"),
        (["launcher=sbach"], "did you mean sbatch?"),
        (["nodes=0"], "nodes=0: expected a number >= 1"),
    ],
)
def test_impossible_options_are_named(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_options(load_config(LaunchConfig, args)[0])


@pytest.mark.parametrize(
    "arg",
    [
        "mem=64G",
        "mem=0",
        "time=30",
        "sbatch_options=[--time-min=5,--nodelist=n1,--gres=gpu:a100:4]",
    ],
)
def test_options_that_are_fine(arg: str) -> None:
    check_options(load_config(LaunchConfig, [arg])[0])

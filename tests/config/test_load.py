"""Loading a config: precedence, types, and one clear message for each mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from modular_lm.config import (
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
    format_help,
    load_config,
    to_dict,
    to_yaml,
)
from modular_lm.config.load import from_dict
from modular_lm.errors import ConfigError


def load(*args: str) -> TrainConfig:
    return load_config(TrainConfig, args)[0]


def test_command_line_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\nmodel: {dim: 96, n_layers: 3}\n")
    config = load(f"config={file}", "model.dim=32", "model.dim=64")
    assert (config.steps, config.model.n_layers, config.model.dim) == (7, 3, 64)
    assert config.model.norm_eps == TrainConfig().model.norm_eps


def test_values_as_given_are_returned_for_base_config(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\n")
    _, given = load_config(TrainConfig, [f"config={file}", "model.dim=32"])
    assert given == {"steps": 7, "model": {"dim": 32}}


@pytest.mark.parametrize("text", ["a,b", "[a,b]", "[a, b]", "a, b,"])
def test_lists_may_be_written_with_commas_alone(text: str, tmp_path: Path) -> None:
    assert load(f"model.module_names={text}").model.module_names == ["a", "b"]
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{module_names: {text}}}" if "[" in text else f'modules: "{text}"')
    if "[" in text:
        assert load(f"config={file}").model.module_names == ["a", "b"]
    else:
        assert load_config(GenerateConfig, [f"config={file}"])[0].modules == ["a", "b"]


def test_a_list_of_one_and_of_none() -> None:
    assert load("model.module_names=a").model.module_names == ["a"]
    assert load("model.module_names=[]").model.module_names == []
    with pytest.raises(ConfigError, match="expected"):
        load("model.module_names={a: 1}")


def test_yaml_interpolation_and_scientific_numbers(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 1e3\nname: a\ndump_dir: runs/${name}\noptim: {lr: 3e-4}\n")
    config = load(f"config={file}")
    assert (config.steps, config.dump_dir, config.optim.lr) == (1000, "runs/a", 3e-4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("modle.dim=64", "unknown key modle: did you mean model?"),
        ("model.dmi=64", "unknown key model.dmi: did you mean model.dim?"),
        ("dim=64", "unknown key dim: did you mean model.dim?"),
        ("model.dim=wide", "model.dim='wide': expected a whole number"),
        ("model.dim=1.5", "model.dim=1.5: expected a whole number"),
        ("model.dim=true", "model.dim=True: expected a whole number"),
        ("model.dim=0", "model.dim=0: expected a number >= 1"),
        ("optim.lr=nan", "optim.lr=nan: expected a number"),
        ("optim.beta2=1.0", "optim.beta2=1.0: expected a number >= 0 and < 1"),
        ("model.module_agg=averge", "did you mean avg?"),
        ("distributed.compile=perhaps", "distributed.compile='perhaps': expected true or false"),
        ("model=3", "model=3: expected a group of keys"),
        ("data.sources.web=much", "data.sources.web='much': expected a number"),
        ("model.dim", "argument 'model.dim': expected key=value"),
        ("config=nowhere.yaml", "config=nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argument)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "a: ${nothing}\n", "\x00"])
def test_a_broken_yaml_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as caught:
        load(f"config={file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["Once: [a", "1e3", "{x}", "a=b", "null and void", "${x}", "yes"]
)
def test_text_keys_take_the_command_line_as_it_is(prompt: str) -> None:
    assert load_config(GenerateConfig, [f"prompt={prompt}"])[0].prompt == prompt


def test_names_with_dots_may_be_written_as_keys() -> None:
    optim = load("optim.lr_multipliers.aggs.*=2", "optim.lr_multipliers.*.wq.weight=0.5").optim
    assert optim.lr_multipliers == {"aggs.*": 2.0, "*.wq.weight": 0.5}


def test_null_resets_an_optional_key() -> None:
    assert load("model.n_heads=4", "model.n_heads=null").model.n_heads is None
    assert load("data.root_dir=x", "data.root_dir=null").data.root_dir is None


def test_yaml_round_trip_gives_the_same_config() -> None:
    config = load("data.sources={web: 0.3, wiki: 0.7}", "model.module_seq_len=64", "name=x: y")
    assert from_dict(TrainConfig, yaml.safe_load(to_yaml(to_dict(config)))) == config


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, GenerateConfig])
def test_help_lists_every_key_with_type_and_meaning(cls: type) -> None:
    text = format_help(cls, "What.", "usage")
    lines = text.splitlines()

    def check(part: type, path: str) -> None:
        for f in dataclasses.fields(part):
            factory = f.default_factory
            if isinstance(factory, type) and dataclasses.is_dataclass(factory):
                check(factory, f"{path}{f.name}.")
                continue
            (line,) = [x for x in lines if x.strip().startswith(f"{path}{f.name}=")]
            assert line.endswith(f.metadata["help"])

    check(cls, "")

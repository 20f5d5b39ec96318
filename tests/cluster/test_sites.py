from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.options import LaunchConfig
from cluster.sites import FOLDER, NodeSetup, apply_site, load_site
from modular_lm.config import load_config
from modular_lm.errors import ConfigError

SITES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def at(site: str, *args: str, **environment: str) -> tuple[LaunchConfig, NodeSetup]:
    options, _ = load_config(LaunchConfig, [f"site={site}", *args])
    return apply_site(options, load_site(site), environment)


@pytest.mark.parametrize("name", SITES)
def test_every_profile_is_readable_and_described(name: str) -> None:
    assert load_site(name).description


def test_every_fact_of_jean_zay_says_where_it_is_from() -> None:
    """A page of the documentation, or that it is not verified."""
    facts = (FOLDER / "jean_zay.yaml").read_text().partition("kinds:")[2].splitlines()
    for line in facts:
        if re.search(r":\s+[^\s#]", line) and not line.lstrip().startswith("#"):
            assert re.search(r"# .*\[(gpu|cpu|disks|\?)\]", line), line


def test_the_generic_site_adds_nothing() -> None:
    options, setup = at("generic", "nodes=3", "account=me")
    assert options == LaunchConfig(site="generic", nodes=3, account="me", gpus_per_node=0)
    assert setup == NodeSetup()


def test_a_kind_brings_its_nodes() -> None:
    options, setup = at("jean_zay", "kind=h100", "account=xyz", "module_load=[pytorch-gpu]")
    assert (options.constraint, options.account) == ("h100", "xyz@h100")
    assert (options.gpus_per_node, options.cpus_per_node) == (4, 96)
    assert options.sbatch_options == ["--hint=nomultithread"]
    assert (setup.modules, setup.module_purge) == (("arch/h100",), True)
    assert options.module_load == ["pytorch-gpu"]
    assert setup.environment["HF_HUB_OFFLINE"] == "1"


def test_what_the_user_gives_wins() -> None:
    options, _ = at(
        *("jean_zay", "kind=v100", "gpus_per_node=1", "constraint=v100-16g"),
        *("account=abc@v100", "sbatch_options=[--hint=multithread]"),
        IDRPROJ="xyz",
    )
    assert (options.gpus_per_node, options.cpus_per_node) == (1, 10)
    assert (options.constraint, options.account) == ("v100-16g", "abc@v100")
    assert options.sbatch_options == ["--hint=multithread"]


def test_the_account_is_that_of_the_project_in_use() -> None:
    assert at("jean_zay", "kind=a100", IDRPROJ="xyz")[0].account == "xyz@a100"
    assert at("jean_zay", "kind=a100")[0].account is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "several kinds of nodes: kind=v100|a100|h100"),
        (["kind=h10"], "kind=h10: did you mean h100?"),
        (["kind=h100", "qos=qos_gpu-t3"], "qos=qos_gpu-t3: did you mean qos_gpu_h100-t3?"),
        (["kind=v100", "time=30:00:00"], "allows 20:00:00; use qos=qos_gpu-t4"),
        (["kind=v100", "time=3:00:00", "qos=qos_gpu-dev"], "allows 2:00:00; use qos=qos_gpu-t3"),
        (["kind=a100", "time=21:00:00"], "use at most 20:00:00"),
        (["kind=prepost", "time=21:00:00"], "allows 20:00:00; use at most 20:00:00"),
        (["kind=a100", "account=x@h100"], "an account that ends with @a100, e.g. x@a100"),
        (["kind=a100", "gpus_per_node=9"], "gpus_per_node=9: nodes of kind=a100 have 8"),
    ],
)
def test_what_jean_zay_would_refuse_is_refused_here(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        at("jean_zay", *args)


def test_an_unknown_site_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("site=jeanzay: did you mean jean_zay?")):
        load_site("jeanzay")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("descriptio: x", "unknown key descriptio: did you mean description?"),
        ("kinds: {big: {gpu_per_node: 4}}", "kinds.big: unknown key gpu_per_node"),
        ("kinds: {big: {qos: {long: 2 days}}}", "kinds.big.long=2 days: expected minutes"),
        ("kinds: {big: {longest: 20:00:00}}", "kinds.big: longest=72000: put it in quotes"),
        ("kinds: {big: {qos: {long: 100:00:00}}}", "kinds.big: qos.long=360000: put it in"),
        ('kinds: {big: {partition: "a\\nb"}}', "kinds.big.partition='a\\nb': expected a word"),
        ('sbatch_options: ["--a\\nrm"]', "sbatch_options='--a\\nrm': expected --name"),
        ("kinds: [big]", "kinds: expected a mapping"),
        ("environment: {A-B: x}", "environment.A-B: not a name of a variable"),
        ("port_range: [30000, 20000]", "port_range=[30000, 20000]: expected [first, end]"),
        ("port_range: [20000]", "port_range=[20000]: expected [first, end]"),
        ("temp_root: scratch", "temp_root=scratch: expected an absolute path"),
        ("sbatch_options: [--nodes=1]", "is set by the launcher; use nodes="),
        ("start_timeout_s: 0", "start_timeout_s=0: expected seconds"),
        ("a: [", "site="),
    ],
)
def test_a_profile_with_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_site(str(file))
    assert str(file) in str(raised.value)


def profile(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


def test_the_variable_names_the_account_also_where_no_suffix_does(tmp_path: Path) -> None:
    mine = profile(tmp_path, "account_variable: PROJECT")
    assert at(mine, PROJECT="xyz")[0].account == "xyz"
    assert at(mine, "account=abc", PROJECT="xyz")[0].account == "abc"
    assert at(mine)[0].account is None
    # What is not charged gets no account.
    assert at("jean_zay", "kind=prepost", IDRPROJ="xyz")[0].account is None


def test_the_only_kind_need_not_be_named(tmp_path: Path) -> None:
    mine = profile(tmp_path, "kinds: {big: {partition: gpu, gpus_per_node: 8}}")
    options, _ = at(mine)
    assert (options.kind, options.partition, options.gpus_per_node) == ("big", "gpu", 8)
    with pytest.raises(ConfigError, match="kind=bg: did you mean big"):
        at(mine, "kind=bg")
    with pytest.raises(ConfigError, match="kind=big: there are none"):
        at("generic", "kind=big")


def test_options_of_a_site_give_way_to_the_users(tmp_path: Path) -> None:
    mine = profile(tmp_path, "sbatch_options: [--mem=0, --exclude=n7]")
    assert at(mine, "mem=64G")[0].sbatch_options == ["--exclude=n7"]


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    big = "kinds: {big: {partition: big, gpus_per_node: 8, cpus_per_gpu: 12}}"
    file.write_text(f"port_range: [40000, 50000]\nstart_timeout_s: 60\n{big}\n")
    options, setup = at(str(file), "kind=big")
    assert (options.partition, options.cpus_per_node) == ("big", 96)
    assert (setup.port_range, setup.start_timeout_s) == ((40000, 50000), 60)

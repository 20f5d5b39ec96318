"""What Optuna's TPE sampler suggests, given what is known of earlier suggestions.

The only file that knows Optuna, an optional extra. Nothing lives longer than a call: a study is
made of the results it is given, so that the same ones give the same suggestion, after a kill, too.
Which results those are is decided in `search`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modular_lm.config.sweep import SweptConfig
from modular_lm.errors import ConfigError, reason
from modular_lm.sweep.space import Draw, Study, is_whole, rounded

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_INSTALL = "pip install 'modular-lm[optuna]'"


@dataclass(frozen=True)
class Result:
    """What became of a suggestion.

    values: full key -> value, as suggested
    loss: nats per token, inf where it diverged; None of what failed or runs
    step: the last one of a trial that was stopped early
    """

    values: dict[str, Any]
    state: Literal["done", "stopped", "failed", "running"]
    loss: float | None = None
    step: int | None = None


def check_installed() -> None:
    """Raise ConfigError where Optuna is not."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"sweep.searcher=optuna: needs Optuna ({reason(error)}); {_INSTALL}"
        ) from None


def suggestion(study: Study, results: Sequence[Result], seed: int, at_random: int) -> Draw:
    """The next suggestion of a study, as what gives each of its keys a value.

    results: of all earlier ones, in order; what runs counts as bad, so that others are tried
    at_random: while fewer are done or were stopped, values are drawn without a look at them
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # Groups are how TPE takes keys together of which some act only under a condition.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=at_random, seed=seed, multivariate=True, group=True, constant_liar=True
        )
        made = optuna.create_study(sampler=sampler, direction="minimize")
        for result in results:
            made.add_trial(_told(study, result))
        trial = made.ask()

    def draw(key: str, swept: SweptConfig) -> Any:
        if swept.kind == "choice":
            return swept.values[trial.suggest_categorical(key, range(len(swept.values)))]
        low, high = swept.values
        log = swept.kind == "loguniform"
        if is_whole(key):
            value = trial.suggest_int(key, round(low), round(high), log=log)
        else:
            value = trial.suggest_float(key, low, high, log=log)
        return rounded(key, value, swept)

    return draw


def is_possible(key: str, swept: SweptConfig, value: Any) -> bool:
    """Whether a value of a key could be suggested."""
    if swept.kind == "choice":
        return _same(value) in map(_same, swept.values)
    low, high = swept.values
    kinds = int if is_whole(key) else int | float
    return isinstance(value, kinds) and low <= value <= high


def _told(study: Study, result: Result) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {
        "done": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "running": TrialState.RUNNING,
    }
    early = {} if result.step is None or result.loss is None else {result.step: result.loss}
    return create_trial(
        state=states[result.state],
        value=result.loss if result.state == "done" else None,
        params={key: _param(study.swept[key], value) for key, value in result.values.items()},
        distributions={key: _distribution(key, study.swept[key]) for key in result.values},
        intermediate_values=early,
    )


def _distribution(key: str, swept: SweptConfig) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if swept.kind == "choice":
        return CategoricalDistribution(range(len(swept.values)))
    low, high = swept.values
    log = swept.kind == "loguniform"
    if is_whole(key):
        return IntDistribution(round(low), round(high), log=log)
    return FloatDistribution(low, high, log=log)


def _param(swept: SweptConfig, value: Any) -> Any:
    """A choice by its place: Optuna takes no lists, and True for 1."""
    return [*map(_same, swept.values)].index(_same(value)) if swept.kind == "choice" else value


def _same(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

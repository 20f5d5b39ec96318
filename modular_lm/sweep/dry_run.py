"""What `dry_run=true` prints of a sweep: its trials, with steps, cost and memory."""

from __future__ import annotations

import sys
from dataclasses import replace

from modular_lm.config.checks import warnings_of, world_sizes
from modular_lm.model.memory import memory_estimate
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.pilots import PILOT_STEPS, unmeasured
from modular_lm.sweep.search import ROUND
from modular_lm.sweep.tables import UNITS, amount, number
from modular_lm.sweep.trials import Arm, Plan

_MIB = 2**20


def describe(plan: Plan) -> str:
    """A line for each variant, then what the sweep takes in all.

    Raises ConfigError where its folder holds a sweep that it cannot continue.
    """
    settings, seeds = plan.settings, plan.settings.seeds
    width = max(len(arm.name) for arm in plan.arms)
    head = (
        f"{'variant':<{width}}  {'steps':>8}  {'tokens/step':>11}  {'tokens':>9}  "
        f"{'parameters':>12}  {'FLOPs/token':>11}  {'FLOPs':>9}  {'MiB/worker':>10}"
    )
    lines = [head, *(_line(arm, width) for arm in plan.arms), ""]
    runs = [arm for arm in plan.arms if arm.cost]
    flops = sum(arm.cost.flops_per_step * arm.steps for arm in runs if arm.cost and arm.steps)
    rows = {
        "folder": str(plan.folder),
        "baseline": plan.baseline,
        "each may spend": f"{amount(plan.amount)} {UNITS[settings.budget]}",
        "seeds": ", ".join(map(str, seeds)),
        "trials": f"{len(runs) * len(seeds):,}{_so_far(plan)}",
    }
    if pilots := len(unmeasured(plan)):
        rows["steps"] = f"follow from pilots of {PILOT_STEPS} steps; {pilots:,} are to come"
    else:
        rows["FLOPs in all"] = f"{flops * len(seeds):.4g}"
    if plan.unsuggested:
        made = [suggestion for arm in plan.arms for suggestion in arm.suggestions]
        each = len(made) // len({suggestion.study for suggestion in made})
        after = plan.unsuggested * len(seeds)
        rows["search"] = (
            f"these are the first {each} of {settings.num_samples} suggestions of each study; up "
            f"to {after:,} trials follow from their losses, {ROUND} suggestions at a time"
        )
    lines += [f"{name:<18} {value}" for name, value in rows.items()]
    lines += [f"warning: {text}" for text in plan.warnings]
    lines += [f"warning: {', '.join(names)}: {text}" for text, names in _of_variants(plan).items()]
    return "\n".join(lines)


def _so_far(plan: Plan) -> str:
    """How many are done. Raises ConfigError where the folder holds others of the same names."""
    wanted, known = SweepFolder(plan.folder).check(plan)
    done = sum(known[name]["status"] == "done" for name in wanted if name in known)
    return f", {done:,} of them done" if known else ""


def _of_variants(plan: Plan) -> dict[str, list[str]]:
    """What their runs would warn of -> the variants that do."""
    found: dict[str, list[str]] = {}
    for arm in plan.arms:
        if arm.config:
            # Before a pilot nothing can be said of what does not fit into the steps.
            for text in warnings_of(replace(arm.config, steps=arm.steps or sys.maxsize)):
                found.setdefault(text, []).append(arm.name)
    return found


def _line(arm: Arm, width: int) -> str:
    if arm.config is None or arm.cost is None:
        return f"{arm.name:<{width}}  cannot be trained: {arm.why}"
    cost, steps = arm.cost, arm.steps
    # Of the fewest workers, each of which has the most to hold.
    memory = memory_estimate(arm.config, world_sizes(arm.config.ray)[0]).total
    return (
        f"{arm.name:<{width}}  {number(steps, '{:,}') or '?':>8}  {cost.tokens_per_step:>11,}  "
        f"{number(steps and steps * cost.tokens_per_step, '{:.4g}') or '?':>9}  "
        f"{cost.parameters:>12,}  {cost.flops_per_token:>11.4g}  "
        f"{number(steps and steps * cost.flops_per_step, '{:.4g}') or '?':>9}  "
        f"{memory / _MIB:>10,.0f}"
    )

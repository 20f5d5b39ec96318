"""What `dry_run=true` prints of a sweep: its trials, with steps and cost."""

from __future__ import annotations

from modular_lm.config.sweep import sweep_warnings
from modular_lm.sweep.search import ROUND
from modular_lm.sweep.space import drawn_at_random
from modular_lm.sweep.tables import number
from modular_lm.sweep.trials import Arm, Plan


def describe(plan: Plan) -> str:
    """A line for each variant, then what the sweep takes in all."""
    settings, seeds = plan.settings, plan.settings.seeds
    width = max(len(arm.name) for arm in plan.arms)
    head = f"{'variant':<{width}}  {'steps':>8}  {'tokens':>9}  {'parameters':>12}  {'FLOPs':>9}"
    lines = [head, *(_line(arm, width) for arm in plan.arms), ""]
    runs = [arm for arm in plan.arms if arm.cost and arm.steps]
    flops = sum(arm.cost.flops_per_step * arm.steps for arm in runs if arm.cost and arm.steps)
    rows = {
        "folder": str(plan.folder),
        "baseline": plan.baseline,
        "each may spend": f"{number(plan.amount, '{:.4g}')} {settings.budget}",
        "seeds": ", ".join(map(str, seeds)),
        "trials": f"{len(runs) * len(seeds):,}",
        "FLOPs in all": f"{flops * len(seeds):.4g}",
    }
    if plan.unsuggested:
        first, after = drawn_at_random(settings), plan.unsuggested * len(seeds)
        rows["search"] = (
            f"these are the first {first} of {settings.num_samples} suggestions of each study; up "
            f"to {after:,} trials follow from their losses, {ROUND} suggestions at a time"
        )
    lines += [f"{name:<18} {value}" for name, value in rows.items()]
    lines += [f"warning: {text}" for text in sweep_warnings(settings)]
    return "\n".join(lines)


def _line(arm: Arm, width: int) -> str:
    if arm.cost is None or arm.steps is None:
        return f"{arm.name:<{width}}  cannot be trained: {arm.why}"
    tokens = arm.steps * arm.cost.tokens_per_step
    return (
        f"{arm.name:<{width}}  {arm.steps:>8,}  {tokens:>9.4g}  {arm.cost.parameters:>12,}  "
        f"{arm.steps * arm.cost.flops_per_step:>9.4g}"
    )

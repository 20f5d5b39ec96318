"""Seeds from which on a paired t-test (5 %, two-sided) finds a difference with 80 % power.

python docs/results/ablation/power.py DIFFERENCE STANDARD_DEVIATION...
"""

from __future__ import annotations

import sys

from scipy import stats


def power(seeds: int, effect: float) -> float:
    """effect: the mean of the paired differences over their standard deviation."""
    limit, shift = stats.t.ppf(0.975, seeds - 1), effect * seeds**0.5
    return stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)


difference, *deviations = map(float, sys.argv[1:])
for deviation in deviations:
    seeds = next(n for n in range(2, 1000) if power(n, difference / deviation) >= 0.8)
    print(f"{deviation}: {seeds} seeds")

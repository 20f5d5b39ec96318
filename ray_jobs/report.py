"""Compare the trials of a sweep: a page, a Markdown table, data and pictures in its folder.

dir=         the sweep's folder, into which report.html, .md, .json and pictures/ are written
baseline=    compare with this variant instead of the sweep's own baseline, in against/<baseline>

Also of a sweep that runs or was interrupted: only trials that are done are compared, the others
are listed with the reason. One process, without Ray.
"""

from __future__ import annotations

from typing import Any

from modular_lm.cli import run_job
from modular_lm.config import ReportConfig
from modular_lm.errors import EXIT_DONE, ConfigError
from modular_lm.sweep.folder import SweepFolder

USAGE = "python -m ray_jobs.report dir=runs/ablation"


def main(config: ReportConfig, given: dict[str, Any]) -> int:
    """The job; returns the exit code."""
    if not config.dir:
        raise ConfigError("dir=: expected the folder of a sweep")
    folder = SweepFolder(config.dir)
    folder.read_definition()  # before SciPy and Matplotlib are loaded
    from modular_lm.sweep.report import write_report
    from modular_lm.sweep.tables import headline

    print(headline(write_report(folder, config.baseline)))
    where = folder if config.baseline is None else folder.against(config.baseline)
    for kind in ("html", "md", "json"):
        print(f"  {where.report(kind)}")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(ReportConfig, main, what=__doc__ or "", usage=USAGE)

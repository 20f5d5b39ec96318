"""Write a sweep's report: page, Markdown, data and pictures, from what its folder holds now.

May be called at any time and again; trials that are not done are listed as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modular_lm.files import write_text_atomic, writing
from modular_lm.sweep import tables
from modular_lm.sweep.figures import draw_all
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.page import page
from modular_lm.sweep.style import svg
from modular_lm.sweep.summary import summarise


def write_report(folder: SweepFolder, baseline: str | None = None) -> dict[str, Any]:
    """Write all files of the report; returns its summary.

    baseline: compare with this variant instead of the sweep's own, in `folder.against(baseline)`.
    Raises DataError where no sweep is, ConfigError where it has no such variant, RunFailedError
    where the files cannot be written.
    """
    summary = summarise(folder, baseline)
    if baseline is not None:
        folder = folder.against(baseline)
    pictures = {name: (title, svg(f, name)) for name, (title, f) in draw_all(summary).items()}
    titles = {name: title for name, (title, _) in pictures.items()}
    data = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    texts = {"json": data, "md": markdown(summary, titles), "html": page(summary, pictures)}
    with writing(folder.pictures):
        folder.pictures.mkdir(parents=True, exist_ok=True)
        for name, (_, picture) in pictures.items():
            write_text_atomic(folder.pictures / f"{name}.svg", picture)
        # What an earlier report drew and this one does not; another process may report, too.
        for file in folder.pictures.glob("*.svg"):
            if file.stem not in pictures:
                file.unlink(missing_ok=True)
    with writing(folder.path):
        for kind in ("json", "md", "html"):
            write_text_atomic(folder.report(kind), texts[kind])
    return summary


def markdown(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown. pictures: name -> what it shows."""
    parts = [f"# Sweep {summary['name']}", tables.headline(summary)]
    results = tables.arms_table(summary)
    parts.append(tables.markdown(results) if results.rows else "No trial is done yet.")
    parts.append("\n".join(f"- {line}" for line in tables.how_to_read(summary)))
    parts += [f"![{title}](pictures/{name}.svg)" for name, title in pictures.items()]
    more = {
        "Trials that are not in the statistics": tables.excluded_table(summary),
        "Within each seed, over validation documents": tables.documents_table(summary),
        "What each variant sets": tables.values_table(summary),
    }
    for title, table in more.items():
        if table is not None:
            parts += [f"## {title}", tables.markdown(table)]
    return "\n\n".join(parts) + "\n"

"""The report as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from modular_lm.sweep import tables
from modular_lm.sweep.style import inline, variables
from modular_lm.sweep.tables import Table

_CSS = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; }
.note, figcaption, summary { color: var(--muted); }
.note { font-size: .875rem; padding-left: 1.1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--grid); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal;
  min-width: 4.2rem; }
th:first-child, table.text :is(td, th) { text-align: left; }
td small { display: block; color: var(--muted); font-size: .75rem; }
table.text td { white-space: normal; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper);
  width: 10rem; min-width: 7.5rem; white-space: normal; overflow-wrap: break-word; }
tbody tr:last-child > * { border-bottom: 0; }
.better { color: var(--s3); font-weight: 600; } .worse { color: var(--s2); font-weight: 600; }
.figures { columns: 25rem; column-gap: 1.5rem; }
figure { margin: 0 0 1.6rem; break-inside: avoid; }
figcaption { font-size: .875rem; font-weight: 600; margin-bottom: .3rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
details { margin-top: 1rem; } summary { cursor: pointer; margin-bottom: .6rem; }
"""
_MARKS = {"better": "▼ better", "worse": "▲ worse"}


def page(summary: Mapping[str, Any], pictures: Mapping[str, tuple[str, str]]) -> str:
    """The page. pictures: name -> (what it shows, SVG file)."""
    title = f"Sweep {escape(summary['name'])}"
    css = _CSS.replace("LIGHT", variables(0)).replace("DARK", variables(1))
    figures = "".join(_figure(name, *picture) for name, picture in pictures.items())
    notes = "".join(f"<li>{escape(line)}</li>" for line in tables.how_to_read(summary))
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(tables.headline(summary))}</p>",
        _results(summary),
        f"<ul class=note>{notes}</ul>",
        f"<h2>Pictures</h2><div class=figures>{figures}</div>" if figures else "",
        _excluded(summary),
        _folded(
            "The same difference within each seed, over validation documents (95 % by bootstrap)",
            tables.documents_table(summary),
        ),
        _folded("What each variant sets", tables.values_table(summary)),
        f"<p class=note>Written {escape(summary['created_at'])} from the trials' run folders.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{css}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _results(summary: Mapping[str, Any]) -> str:
    table = tables.arms_table(summary)
    if not table.rows:
        return "<h2>Results</h2><p>No trial is done yet.</p>"
    return f"<h2>Results</h2>{_table(table)}"


def _excluded(summary: Mapping[str, Any]) -> str:
    table = tables.excluded_table(summary)
    if table is None:
        return ""
    return f"<h2>Trials that are not in the statistics</h2>{_table(table, 'text')}"


def _folded(title: str, table: Table | None) -> str:
    if table is None:
        return ""
    return f"<details><summary>{escape(title)}</summary>{_table(table)}</details>"


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(
        f"<tr><th scope=row>{_name(first)}</th>{''.join(_cell(c, kind) for c in cells)}</tr>"
        for first, *cells in table.rows
    )
    return (
        f'<div class=scroll tabindex=0><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _name(text: str) -> str:
    """A name that may go on in the next line after an underscore."""
    return escape(text).replace("_", "_<wbr>")


def _cell(text: str, kind: str) -> str:
    if kind == "text":
        return f"<td>{escape(text)}</td>"
    if text in _MARKS:
        return f'<td class="{text}">{_MARKS[text]}</td>'
    mean, bracket, ends = text.partition(" [")
    below = f"<small>[{escape(ends)}</small>" if bracket else ""
    return f"<td>{escape(mean)}{below}</td>"


def _figure(name: str, title: str, picture: str) -> str:
    return (
        f'<figure id="{escape(name)}"><figcaption>{escape(title)}</figcaption>'
        f"{inline(picture, escape(title))}</figure>"
    )

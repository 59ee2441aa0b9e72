"""What the pages of a run share: one look, in the reader's light or dark scheme, and nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #69738a; --line: #d9dee8; --page: #ffffff; --card: #f6f8fb;
  --a: #2563c9; --b: #d9480f; --c: #2b8a3e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #97a1b6; --line: #343c4c; --page: #14181f;
  --card: #1c222c; --a: #74a7ff; --b: #ff9d66; --c: #69db7c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; max-width: 1380px;
  padding: 32px 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 8px; } p { margin: 0 0 16px; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card, section { background: var(--card); border-radius: 10px; padding: 14px 16px; break-inside: avoid; }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; } .card span { color: var(--soft); font-size: 13px; }
.key { font-size: 13px; color: var(--soft); margin: 6px 0 0; } .key i { display: inline-block; width: 10px; height: 10px;
  border-radius: 2px; margin: 0 5px 0 12px; } .key i:first-child { margin-left: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } td { padding: 3px 8px 3px 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; } td:last-child { text-align: right; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def document(title: str, style: str, body: Sequence[str]) -> str:
    """A whole page; `style` is added to what all pages have, `body` is HTML."""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}{style}</style></head><body>",
            *body,
            "</body></html>",
        ]
    )


def cards(figures: Sequence[tuple[str, str]]) -> str:
    """Figures side by side: `(what, value)`."""
    each = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in figures
    )
    return f'<div class="cards">{each}</div>'


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, a row each."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"

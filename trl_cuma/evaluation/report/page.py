# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One HTML page that needs nothing but itself: drawings as data URIs, one style sheet, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .svg import Drawing, in_dark
from .tables import Table
from .text import clean

PHONE = "(max-width: 640px)"
"""Where the narrow drawings are shown; the style sheet's own limit."""


@dataclass(frozen=True)
class Section:
    """
    A part of the page.

    Args:
        title (`str`): Its heading.
        tables (`Sequence[Table]`): Shown first, below each other.
        drawings (`Sequence[Drawing]`): Figures, those of half a page's width beside each other.
        details (`Sequence[Table]`): Tables that are folded up, after the figures.
        text (`str`): A paragraph under the heading.
    """

    title: str
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    details: Sequence[Table] = ()
    text: str = ""


def render_page(title: str, facts: Mapping[str, str], sections: Sequence[Section], footer: str) -> str:
    """
    The page as HTML. Every text is escaped here.

    Args:
        title (`str`): Of the page.
        facts (`Mapping[str, str]`): What was evaluated: name → value.
        sections (`Sequence[Section]`): In order; with more than two, links to them come first.
        footer (`str`): A closing line.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    ids = [f"s{number}-{_slug(section.title)}" for number, section in enumerate(sections, start=1)]
    links = [
        f'<li><a href="#{id_}">{_text(section.title)}</a></li>' for id_, section in zip(ids, sections, strict=True)
    ]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is loaded from anywhere, whatever a name in the data holds.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(title)}</title>",
        '<link rel="icon" href="data:,">',
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        f'<header>\n<h1 dir="auto">{_text(title)}</h1>',
        '<dl class="facts">',
        *(f'<dt>{_text(name)}</dt><dd dir="auto">{_text(value)}</dd>' for name, value in facts.items()),
        "</dl>",
        f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>' if len(links) > 2 else "",
        "</header>",
        "<main>",
        *(_section(id_, section) for id_, section in zip(ids, sections, strict=True)),
        "</main>",
        f"<footer><p>{_text(footer)}</p></footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _section(id_: str, section: Section) -> str:
    parts = [f'<section id="{id_}" aria-labelledby="{id_}-heading">']
    parts.append(f'<h2 id="{id_}-heading" dir="auto">{_text(section.title)}</h2>')
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    if section.tables:
        tables = (_table(table, f"{id_}-t{number}") for number, table in enumerate(section.tables, start=1))
        parts += ['<div class="tables">', *tables, "</div>"]
    if section.drawings:
        parts += ['<div class="figures">', *(_figure(id_, drawing) for drawing in section.drawings), "</div>"]
    for number, table in enumerate(section.details, start=1):
        folded = _table(table, f"{id_}-d{number}")
        parts.append(f"<details><summary>{_text(table.title)}</summary>{folded}</details>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table, id_: str) -> str:
    kinds = [_kind(table, index) for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for name, *cells in table.rows:
        body = "".join(f'<td{kind} dir="auto">{_text(cell)}</td>' for cell, kind in zip(cells, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row" dir="auto">{_text(name)}</th>{body}</tr>')
    # The heading is no `caption`, which would scroll away with the table. Focusable, so that a keyboard scrolls it.
    return (
        f'<div class="table"><h3 id="{id_}">{_text(table.title)}</h3>'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{id_}">'
        f'<table aria-labelledby="{id_}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + (f'<p class="note">{_text(table.note)}</p>' if table.note else "")
        + "</div>"
    )


def _kind(table: Table, index: int) -> str:
    if index == 0 or index not in table.texts:
        return ""
    return ' class="text long"' if any(len(row[index]) > 30 for row in table.rows) else ' class="text"'


def _figure(section: str, drawing: Drawing) -> str:
    dark = "(prefers-color-scheme: dark)"
    sources = [
        (f"{dark} and {PHONE}", in_dark(drawing.narrow)),
        (PHONE, drawing.narrow),
        (dark, in_dark(drawing.wide)),
    ]
    return (
        f'<figure id="{section}-{drawing.name}" class="{"full" if drawing.full else "half"}">'
        f"<h3>{_text(drawing.title)}</h3><picture>"
        + "".join(f'<source media="{media}" srcset="{_uri(svg)}" {_size(svg)}>' for media, svg in sources)
        + f'<img src="{_uri(drawing.wide)}" {_size(drawing.wide)} alt="{_text(drawing.alt)}"></picture>'
        f"<figcaption>{_text(drawing.caption)}</figcaption></figure>"
    )


def _size(svg: str) -> str:
    """The drawing's proportions, so that nothing jumps while it loads."""
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    return f'width="{float(width):.0f}" height="{float(height):.0f}"'


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _text(text: str) -> str:
    return escape(clean(text), quote=True)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"

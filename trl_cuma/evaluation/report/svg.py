# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Drawings as SVG text, in a light and a dark theme.

A figure is drawn once, in the light theme; the dark one is the same text with each colour of `DARK` exchanged. Its
text stays text, in the page's own font. It is laid out by DejaVu Sans, which is among the widest: what fits here
fits.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue and orange, which differ for colour-blind readers (in lightness, too), at least 4.5 : 1 on the background.
PAPER, INK, MUTED, RULE = "#ffffff", "#1c2128", "#57606a", "#d0d7de"
MODEL, MARGINAL = "#0b5cad", "#b34700"
TRUTH, TRUTH_EDGE = "#c3ccd8", "#6e7b8b"
DARK = {
    PAPER: "#161b22",
    INK: "#e6edf3",
    MUTED: "#9ba7b4",
    RULE: "#3d444d",
    MODEL: "#6cb6ff",
    MARGINAL: "#ffa657",
    TRUTH: "#465364",
    TRUTH_EDGE: "#8896a8",
}
COLORMAP = "cividis"  # even steps of lightness, read alike with any colour vision and on either background

WIDE, HALF, NARROW = 9.6, 4.7, 3.6
"""Widths in inches: of the page, of half of it, and of a phone. Text is 9 points in all of them."""

LEGEND = {"handlelength": 1.6, "columnspacing": 1.2, "handletextpad": 0.5, "borderpad": 0.1}

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl_cuma",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a group's name is a "$"
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawing:
    """
    A figure of the page.

    Args:
        name (`str`): Letters, digits and hyphens.
        title (`str`): Its heading.
        caption (`str`): What is drawn, and how to read it.
        alt (`str`): What it shows, in words, for those who don't see it.
        wide (`str`): The SVG for a page, in the light theme.
        narrow (`str`): The SVG for a phone, in the light theme.
        full (`bool`): Whether it takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str
    full: bool = False


def draw(paint: Callable[[Figure, bool], None], height: Callable[[bool], float], full: bool) -> tuple[str, str]:
    """
    Draw a figure for a page and for a phone.

    Args:
        paint (`Callable[[Figure, bool], None]`): Fills a figure; the flag says whether it is the wide one.
        height (`Callable[[bool], float]`): The figure's height in inches, by the same flag.
        full (`bool`): Whether the wide one takes the page's whole width, else half of it.

    Returns:
        `tuple[str, str]`: The wide and the narrow SVG.

    Raises:
        `ImportError`: matplotlib is not there.
    """
    with needs_extra("evaluation", "The report's page"):
        import matplotlib
        from matplotlib.figure import Figure
    drawn = []
    for wide in (True, False):
        width = (WIDE if full else HALF) if wide else NARROW
        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has fonts for it
            figure = Figure(figsize=(width, height(wide)), layout="constrained")
            paint(figure, wide)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        drawn.append(_tidied(stream.getvalue()))
    return drawn[0], drawn[1]


def in_dark(svg: str) -> str:
    """The same drawing in the dark theme."""
    return _in_tags(svg, "|".join(DARK), lambda match: DARK[match.group()])


def color_bar(figure: Figure, image: Any, axis: Any, label: str) -> None:
    """A colour bar above `axis`, with few ticks and no frame."""
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(image, ax=axis, location="top", shrink=0.9, aspect=24, pad=0.02, ticks=MaxNLocator(4))
    bar.outline.set_visible(False)
    bar.set_label(label, labelpad=4)


def _tidied(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = _in_tags(svg, r"\d+\.\d{3,}", lambda match: f"{float(match.group()):.2f}")
    return svg.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, 'Open Sans', sans-serif")


def _in_tags(svg: str, pattern: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replace in tags and their attributes, not in the text between them."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(pattern, replace, tag.group()), svg)

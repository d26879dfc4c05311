# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The figure of a comparison: differences to the first run, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .svg import MODEL, MUTED, RULE, Drawing, draw
from .text import METRICS, clean, estimate, metric_of, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def differences_drawing(name: str, differences: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """
    One panel per metric that has a better direction, one line per run; each panel has a scale of its own. `None` where
    nothing is paired.

    Args:
        name (`str`): The drawing's name.
        differences (`Sequence[Mapping]`): Each with `run` and `metrics`.
    """
    paired = [entry for entry in differences if entry["metrics"]]
    metrics = [
        key
        for key in METRICS
        if metric_of(key).better in ("higher", "lower")
        and any(entry["metrics"].get(key, {}).get("low") is not None for entry in paired)
    ]
    if not metrics:
        return None
    runs = [clean(entry["run"]) for entry in paired]

    def paint(figure: Figure, wide: bool) -> None:
        columns = min(3 if wide else 1, len(metrics))
        axes = figure.subplots(-(-len(metrics) // columns), columns, sharey=True, squeeze=False)
        for axis, key in zip(axes.flat, metrics, strict=False):
            axis.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for place, entry in enumerate(paired):
                found = entry["metrics"].get(key)
                if found and found["low"] is not None:
                    axis.plot([found["low"], found["high"]], [place, place], color=MODEL, linewidth=2)
                    axis.plot(found["value"], place, "o", color=MODEL, ms=6)
            better = metric_of(key).better
            axis.set_title(f"{metric_of(key).title} ({'right' if better == 'higher' else 'left'} is better)")
            axis.set_yticks(range(len(runs)), [shorten(run, 24 if wide else 16) for run in runs])
            axis.set_ylim(len(runs) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x", color=RULE)
            axis.locator_params(axis="x", nbins=4)
        for axis in axes.flat[len(metrics) :]:
            axis.set_axis_off()

    def height(wide: bool) -> float:
        return (0.8 + 0.28 * len(runs)) * -(-len(metrics) // min(3 if wide else 1, len(metrics))) + 0.2

    wide, narrow = draw(paint, height, full=True)
    said = "; ".join(
        f"{run}: " + ", ".join(f"{metric_of(key).title} {estimate(entry['metrics'].get(key))}" for key in metrics)
        for run, entry in zip(runs, paired, strict=True)
    )
    caption = (
        "Each run less the first, with the 95 % interval of the paired difference; an interval that crosses the "
        "dashed line shows no clear difference. Scales differ from panel to panel."
    )
    return Drawing(name, "Differences to the first run", caption, f"Differences. {said}.", wide, narrow, full=True)

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The figures of a split: what was predicted, how certain, and how well calibrated; and the training curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .svg import LEGEND, MARGINAL, MODEL, MUTED, PAPER, TRUTH, TRUTH_EDGE, Drawing, draw
from .text import clean, number, percent, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 400


def distributions(name: str, panels: Sequence[Mapping[str, Any]]) -> Drawing:
    """
    Option distributions, truth, prediction and training marginal; one panel per group and question.

    Args:
        name (`str`): The drawing's name.
        panels (`Sequence[Mapping]`): With `question`, `group`, `options`, `truth`, `predicted` and `marginal`.
    """
    alike = next((i for i, panel in enumerate(panels) if panel["question"] != panels[0]["question"]), len(panels))
    across = alike if 2 <= alike <= 4 else 4  # a line per question, where that fits
    known = any(panel["marginal"] for panel in panels)
    top = max(max(panel[key] or [0]) for panel in panels for key in ("truth", "predicted", "marginal"))

    def paint(figure: Figure, wide: bool) -> None:
        columns, width = (across, 120 // across) if wide else (2, 21)
        lines = -(-len(panels) // columns)
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            place = np.arange(len(panel["truth"]))
            axis.bar(place, panel["truth"], 0.82, color=TRUTH, edgecolor=TRUTH_EDGE, linewidth=0.8, label="truth")
            line = {"linewidth": 1.4, "markersize": 4.5}
            if panel["marginal"]:
                axis.plot(
                    place, panel["marginal"], "D--", color=MARGINAL, **line, mfc=PAPER, label="training marginal"
                )
            axis.plot(place, panel["predicted"], "o-", color=MODEL, **line, label="prediction")
            axis.set_xticks(place, [str(option + 1) for option in place])
            axis.tick_params(axis="x", length=0)
            axis.set_ylim(0, 1.08 * top)
            question = textwrap.wrap(clean(panel["question"]), width, max_lines=2, placeholder=" …")
            axis.set_title("\n".join([shorten(panel["group"], width), *question]), fontsize=8.5, linespacing=1.25)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[:, 0]:
            axis.set_ylabel("share")
        handles = {}
        for axis in axes.flat:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        order = [label for label in ("truth", "prediction", "training marginal") if label in handles]
        figure.legend([handles[label] for label in order], order, loc="outside upper left", ncols=3, **LEGEND)

    def height(wide: bool) -> float:
        return 0.4 + (2.05 * -(-len(panels) // across) if wide else 1.95 * -(-len(panels) // 2))

    wide, narrow = draw(paint, height, full=True)
    shown = [
        f"{clean(panel['group'])}, {shorten(panel['question'], 60)}: the truth's most frequent option is "
        f"{_peak(panel['truth'])}, the prediction's {_peak(panel['predicted'])}, the marginal's "
        f"{_peak(panel['marginal']) if panel['marginal'] else 'n/a'}."
        for panel in panels
    ]
    caption = "Share of each answer option, in the order of the scale. A prediction that lies on the bars is right" + (
        "; one that lies on the dashed line has only learned how everybody answers." if known else "."
    )
    alt = f"{len(panels)} panels of answer distributions. " + " ".join(shown)
    return Drawing(name, "Distributions of answers", caption, alt, wide, narrow, full=True)


def collapse(name: str, points: Mapping[str, Sequence[float]], cells: Mapping[str, Any] | None = None) -> Drawing:
    """
    Predicted against true entropy of each cell, with the training marginal's.

    Args:
        name (`str`): The drawing's name.
        points (`Mapping`): `predicted_entropy`, `true_entropy` and `marginal_entropy`, one number per cell, nats; the
            last may be `None`.
        cells (`Mapping`, *optional*): What a cell is: `by`, what it is of beside its question, and `min_people`,
            where it holds the answers of so many, or `None`, where its truth is known.
    """
    predicted, true = (np.asarray(points[f"{key}_entropy"], dtype=float) for key in ("predicted", "true"))
    marginal = np.asarray(points["marginal_entropy"] or np.full(len(true), np.nan), dtype=float)
    shown = np.unique(np.linspace(0, len(true) - 1, min(len(true), MAX_POINTS)).astype(int))
    top = 1.05 * np.nanmax([predicted, true, marginal])

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        axis.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if points["marginal_entropy"]:
            axis.plot(true[shown], marginal[shown], "x", color=MARGINAL, ms=3.5, mew=0.8, label="training marginal")
        axis.plot(true[shown], predicted[shown], "o", color=MODEL, ms=3.2, mew=0, label="prediction")
        axis.set(xlim=(0, top), ylim=(0, top), xlabel="true entropy, nats", ylabel="predicted entropy, nats")
        axis.set_aspect("equal")
        figure.legend(loc="outside upper left", ncols=2, reverse=True, markerscale=1.5, **LEGEND)

    wide, narrow = draw(paint, lambda wide: 4.6 if wide else 3.7, full=False)
    means = f"{number(true.mean())} true, {number(predicted.mean())} predicted, {number(marginal.mean())} marginal"
    caption = (
        f"One point per {_cell(cells)}. On the diagonal: as certain as the group is of one mind. "
        + ("On the crosses: collapsed to how everybody answers. " if points["marginal_entropy"] else "")
        + f"Below the diagonal: over-confident. Mean entropy in nats: {means}."
        + (f" {len(shown):,} of {len(true):,} cells are drawn." if len(shown) < len(true) else "")
    )
    above, below = np.mean(predicted > true), np.mean(predicted < true)
    alt = (
        f"Scatter of predicted against true entropy of {len(true):,} cells. Mean entropy in nats: {means}. The "
        f"prediction is above the truth in {percent(above)} of the cells and below it in {percent(below)}."
    )
    return Drawing(name, "Certainty of each cell", caption, alt, wide, narrow)


def calibration(name: str, reliability: Mapping[str, Any]) -> Drawing:
    """
    Observed share against predicted probability, and how many predictions each bin holds.

    Args:
        name (`str`): The drawing's name.
        reliability (`Mapping`): `bins`, each with `mean_predicted`, `observed` and `n`; and `ece`.
    """
    bins = [entry for entry in reliability["bins"] if entry["n"]]
    predicted, observed, count = (np.array([entry[key] for entry in bins]) for key in _BIN)

    def paint(figure: Figure, wide: bool) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        upper.plot(predicted, observed, "o-", color=MODEL, ms=5, lw=1.4)
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="observed share")
        lower.bar(predicted, count / count.sum(), 0.05, color=TRUTH, edgecolor=TRUTH_EDGE, linewidth=0.8)
        lower.set(xlabel="predicted probability of an option", ylabel="share of\noptions", ylim=(0, None))

    wide, narrow = draw(paint, lambda wide: 4.6 if wide else 3.9, full=False)
    ece = number(reliability.get("ece"))
    caption = (
        "Options binned by their predicted probability. On the diagonal: an option predicted with 30 % has 30 % of "
        f"the answers. Expected calibration error: {ece}. Below, how the options fall on the bins."
    )
    pairs = ", ".join(f"{p:.2f} predicted and {o:.2f} observed" for p, o in zip(predicted, observed, strict=True))
    alt = f"Reliability diagram, expected calibration error {ece}. By bin: {pairs}."
    return Drawing(name, "Calibration", caption, alt, wide, narrow)


def training(name: str, log_history: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """
    Loss by step, in training and in evaluation; `None` where the log has no loss.

    Args:
        name (`str`): The drawing's name.
        log_history (`Sequence[Mapping]`): The trainer's, with `step`, `loss` and `eval_loss`.
    """
    curves = {}
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        logged = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
        logged = [(step, value) for step, value in logged if value is not None and np.isfinite(value)]
        if logged:
            curves[label] = tuple(np.array(column, dtype=float) for column in zip(*logged, strict=True))
    if not curves:
        return None

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        for (label, (steps, values)), color, mark in zip(curves.items(), (MODEL, MARGINAL), ("-", "o-"), strict=False):
            axis.plot(steps, values, mark, color=color, lw=1.4, ms=4, label=label)
        axis.grid(axis="y")
        axis.set(xlabel="step", ylabel="loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside upper left", ncols=2, **LEGEND)

    wide, narrow = draw(paint, lambda wide: 3.4 if wide else 3.0, full=False)
    said = "; ".join(
        f"{label} {number(values[0])} at step {steps[0]:.0f}, {number(values[-1])} at step {steps[-1]:.0f}, least "
        f"{number(values.min())} at step {steps[values.argmin()]:.0f}"
        for label, (steps, values) in curves.items()
    )
    said = said[0].upper() + said[1:]
    return Drawing(name, "Loss", f"By step of the training. {said}.", f"Loss by step. {said}.", wide, narrow)


def _cell(cells: Mapping[str, Any] | None) -> str:
    if not cells:
        return "cell"
    by = clean(cells["by"])
    if cells["min_people"] is None:
        return f"question and {by}"
    who = "all people" if by == "profile" else f"the people of one {by}"
    return f"question and group: {who} who answered it, {number(cells['min_people'])} or more"


_BIN = ("mean_predicted", "observed", "n")


def _peak(shares: Sequence[float]) -> str:
    place = int(np.argmax(shares))
    return f"{place + 1} ({shares[place]:.2f})"

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The figures of the topology: which experts serve whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .svg import COLORMAP, INK, LEGEND, MARGINAL, MODEL, MUTED, PAPER, RULE, Drawing, color_bar, draw
from .text import clean, number, percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SCALE = 0.01
"""Nats that the scale of the mutual information reaches at least: noise is not to look like structure."""

MAX_LABELS = 60
"""Names on the map; beyond, and where there is no room, points go without."""


def topology_drawings(topology: Mapping[str, Any]) -> list[Drawing]:
    """
    Every figure of [`~trl_cuma.evaluation.topology.Topology`]'s document.

    Args:
        topology (`Mapping`): `evaluation.json`'s "topology".
    """
    drawings = [_heat_map(topology), _group_map(topology), _expert_load(topology)]
    if any(topology["mutual_information"].values()):
        drawings.append(_information(topology))
    reference = topology.get("reference")
    if reference and reference.get("model_map"):
        drawings.append(_reference(reference))
    return drawings


def _heat_map(topology: Mapping[str, Any]) -> Drawing:
    order = list(topology["order"])
    names = [clean(topology["groups"][index]["group"]) for index in order]
    similarity = np.array(topology["similarity"])[np.ix_(order, order)]
    apart = ~np.eye(len(order), dtype=bool)
    low, high = similarity[apart].min(), similarity[apart].max()

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        image = _heat(axis, similarity, low, high)
        places = np.arange(len(names))
        axis.set_yticks(places, [shorten(name, 30 if wide else 18) for name in names])
        axis.set_xticks([])
        if wide and len(names) <= 30:
            axis.set_xticks(places, [shorten(name, 22) for name in names], rotation=90, va="top", ha="right")
            for label in axis.get_xticklabels():
                label.set(rotation_mode="anchor", va="center")
        color_bar(figure, image, axis, "similarity")

    wide, narrow = draw(
        paint,
        lambda wide: (2.2 if wide and len(names) <= 30 else 0.8) + max(2.4, 0.17 * len(names)),
        full=len(names) > 9,
    )
    pairs = sorted(((similarity[i, j], i, j) for i, j in zip(*np.triu_indices(len(names), 1), strict=True)))
    said = ", ".join(f"{names[i]} and {names[j]} ({value:.2f})" for value, i, j in reversed(pairs[-3:]))
    other = ", ".join(f"{names[i]} and {names[j]} ({value:.2f})" for value, i, j in pairs[:3])
    caption = (
        "How alike two groups are routed: 1 by the same experts, 0 by none in common (1 - the Jensen-Shannon distance "
        f"of the {clean(topology['measure'])} over experts). Groups in the order of a hierarchical clustering; the "
        "columns are in the order of the rows."
    )
    alt = f"Heat map of the similarity of {len(names)} groups. Most alike: {said}. Least alike: {other}."
    return Drawing("topology-similarity", "Similarity of groups", caption, alt, wide, narrow, full=len(names) > 9)


def _group_map(topology: Mapping[str, Any]) -> Drawing:
    names = [clean(entry["group"]) for entry in topology["groups"]]
    people = np.array([entry["people"] for entry in topology["groups"]])
    points = np.array(topology["map"])
    full = len(names) > 9

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        axis.scatter(*points.T, s=12 + 60 * np.sqrt(people / people.max()), color=MODEL, linewidth=0.8, ec=PAPER)
        _bare_plane(axis)
        short = [shorten(name, 24 if wide else 16) for name in names]
        _label_points(figure, axis, points, short, np.argsort(-people, kind="stable"), points)

    wide, narrow = draw(paint, lambda wide: (6.4 if full else 4.2) if wide else 3.8, full=full)
    caption = (
        "The groups in the plane: the nearer, the more alike they are routed (classical scaling of the distances). "
        f"The plane shows {percent(topology['map_share'])} of the squared distances. Larger points: more "
        f"{topology.get('unit', 'people')}. Names without room are left out."
    )
    ends = [f"from {names[points[:, axis].argmin()]} to {names[points[:, axis].argmax()]}" for axis in (0, 1)]
    alt = f"Map of {len(names)} groups: left to right {ends[0]}, bottom to top {ends[1]}."
    return Drawing("topology-map", "Map of groups", caption, alt, wide, narrow, full=full)


def _expert_load(topology: Mapping[str, Any]) -> Drawing:
    people = np.array([entry["people"] for entry in topology["groups"]], dtype=float)
    names = [clean(entry["group"]) for entry in topology["groups"]]
    load = np.array(topology["load"])  # (groups, routers, experts)
    routers = [clean(name) for name in topology["routers"]]
    panels = {
        "load of each expert": np.average(load, axis=0, weights=people),
        "difference between groups": np.ptp(load, axis=0),
    }

    def paint(figure: Figure, wide: bool) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            image = _heat(axis, values, 0)
            experts = values.shape[1]
            step = -(-experts // (16 if wide else 8))
            axis.set_xticks(np.arange(0, experts, step), [str(i + 1) for i in range(0, experts, step)])
            axis.set_xlabel("expert")
            color_bar(figure, image, axis, title if wide else title.replace(" ", "\n", 1))
        step = -(-len(routers) // 24)
        axes[0].set_yticks(np.arange(0, len(routers), step), [shorten(name, 14) for name in routers[::step]])

    wide, narrow = draw(paint, lambda wide: 1.7 + 0.19 * min(max(len(routers), 8), 24), full=False)
    spread = panels["difference between groups"]
    most = [np.unravel_index(flat, spread.shape) for flat in np.argsort(-spread, axis=None, kind="stable")[:3]]
    said = "; ".join(
        f"{routers[router]} expert {expert + 1}, from {load[:, router, expert].min():.2f} "
        f"({names[load[:, router, expert].argmin()]}) to {load[:, router, expert].max():.2f} "
        f"({names[load[:, router, expert].argmax()]})"
        for router, expert in most
    )
    caption = (
        "Left: the share of the assignments that each expert of each router gets. Right: its range over groups, 0 "
        f"where all groups use an expert alike. Largest differences: {said}."
    )
    alt = f"Two heat maps, {len(routers)} routers by {spread.shape[1]} experts. Largest differences: {said}."
    return Drawing("topology-load", "Expert load", caption, alt, wide, narrow)


def _information(topology: Mapping[str, Any]) -> Drawing:
    unit = topology.get("unit", "people")
    found = {field: entries for field, entries in topology["mutual_information"].items() if entries}
    routers = [clean(name) for name in topology["routers"]]
    values = np.array([[entry["value"] for entry in entries] for entries in found.values()]).T  # (routers, fields)

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        image = _heat(axis, values, 0, max(values.max(), LEAST_SCALE))
        step = -(-len(routers) // 24)
        axis.set_yticks(np.arange(0, len(routers), step), [shorten(name, 14) for name in routers[::step]])
        labels = axis.set_xticks(np.arange(len(found)), [shorten(field, 18) for field in found], rotation=90)
        for label in labels:
            label.label1.set(rotation_mode="anchor", ha="right", va="center")
        color_bar(figure, image, axis, "nats above chance")

    wide, narrow = draw(paint, lambda wide: 1.7 + 0.19 * min(max(len(routers), 8), 24), full=False)
    means = topology["mutual_information_mean"]
    said = ", ".join(
        f"{clean(field)} {number(means[field]['value'])}"
        for field in sorted(found, key=lambda field: -means[field]["value"])
    )
    caption = (
        f"What an expert tells of a field: mutual information, less what a random assignment of the {unit} gives. "
        f"Mean over routers, in nats: {said}."
    )
    alt = f"Heat map of mutual information, {len(routers)} routers by {len(found)} fields. Means in nats: {said}."
    return Drawing("topology-information", f"What routing tells of {unit}", caption, alt, wide, narrow)


def _reference(reference: Mapping[str, Any]) -> Drawing:
    names = [clean(name) for name in reference["matched"]]
    ours, theirs = np.array(reference["model_map"]), np.array(reference["reference_map"])

    def paint(figure: Figure, wide: bool) -> None:
        axis = figure.subplots()
        for start, end in zip(theirs, ours, strict=True):
            axis.plot(*zip(start, end, strict=True), color=MUTED, lw=0.8, zorder=1)
        axis.plot(*theirs.T, "D", color=MARGINAL, mfc=PAPER, ms=5, label="reference map")
        axis.plot(*ours.T, "o", color=MODEL, ms=5, label="routers' map")
        _bare_plane(axis)
        figure.legend(loc="outside upper left", ncols=2, **LEGEND)
        short = [shorten(name, 24 if wide else 16) for name in names]
        _label_points(figure, axis, ours, short, range(len(names)), np.concatenate([ours, theirs]))

    full = len(names) > 9
    wide, narrow = draw(paint, lambda wide: (6.6 if full else 4.4) if wide else 4.0, full=full)
    apart = np.linalg.norm(ours - theirs, axis=1)
    far = ", ".join(names[index] for index in np.argsort(-apart, kind="stable")[:3])
    caption = (
        "The routers' map laid onto the reference map (shifted, scaled, rotated and mirrored); a line joins the two "
        f"places of a group. Procrustes disparity {number(reference['disparity'])} (p = "
        f"{number(reference['disparity_p'])}), Mantel r {number(reference['mantel_r'])} (p = "
        f"{number(reference['mantel_p'])}), {len(names)} groups."
    )
    alt = f"Two maps of {len(names)} groups, laid onto each other. Farthest apart: {far}."
    return Drawing("topology-reference", "Against the reference map", caption, alt, wide, narrow, full)


def _heat(axis: Axes, values: np.ndarray, low: float, high: float | None = None) -> Any:
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    # Embedded as it is, a pixel per value: one vector path per value would make a large file.
    return axis.imshow(values, cmap=COLORMAP, vmin=low, vmax=high, aspect="auto", interpolation="none")


def _bare_plane(axis: Axes) -> None:
    """Distances count, coordinates don't."""
    axis.set_aspect("equal", adjustable="datalim")
    axis.margins(0.12)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=RULE)


def _label_points(
    figure: Figure, axis: Axes, points: np.ndarray, names: Sequence[str], order: Sequence[int], marks: np.ndarray
) -> None:
    """Write names beside points, the first in `order` first, where there is room; `marks`: all that is drawn."""
    figure.draw_without_rendering()  # now the layout is known
    figure.set_layout_engine("none")
    frame = axis.get_window_extent()
    drawn = axis.transData.transform(marks)
    taken: list[Any] = []
    for index in list(order)[:MAX_LABELS]:
        for ha, va, dx, dy in _SIDES:
            label = axis.annotate(
                names[index],
                points[index],
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=INK,
                fontsize=8.5,
            )
            box = label.get_window_extent().padded(4)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_contains(drawn) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


_SIDES = (
    ("left", "center", 6, 0),
    ("right", "center", -6, 0),
    ("center", "bottom", 0, 5),
    ("center", "top", 0, -5),
    ("left", "bottom", 4, 4),
    ("left", "top", 4, -4),
    ("right", "bottom", -4, 4),
    ("right", "top", -4, -4),
)

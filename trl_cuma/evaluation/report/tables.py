# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The report's tables, once for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .text import HEADLINE, METRICS, MISSING, clean, estimate, metric_of, number, percent

INTERVALS = "In brackets: 95 % intervals."


@dataclass(frozen=True)
class Table:
    """
    A table of texts.

    Args:
        title (`str`): Its caption.
        columns (`Sequence[str]`): Headings; the first column names the rows.
        rows (`Sequence[Sequence[str]]`): As many texts as columns.
        texts (`frozenset[int]`): Columns of words, beside the first; the others are of numbers, aligned to the right.
        note (`str`): What to know for reading it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()
    note: str = ""

    def markdown(self) -> str:
        """As a table of GitHub's Markdown, under its title."""
        sides = [":---" if i == 0 or i in self.texts else "---:" for i in range(len(self.columns))]
        lines = [" | ".join(escaped(cell) for cell in row) for row in (self.columns, *self.rows)]
        lines.insert(1, " | ".join(sides))
        note = f"\n\n{escaped(self.note)}" if self.note else ""
        return f"**{escaped(self.title)}**\n\n" + "\n".join(f"| {line} |" for line in lines) + note


def summary_table(splits: Mapping[str, Any]) -> Table:
    """One row per split, with the metrics that the report ranks by."""
    names = [name for name in HEADLINE if any(name in split.get("metrics", {}) for split in splits.values())]
    rows = [
        [clean(split), *(estimate(entry.get("metrics", {}).get(name), metric_of(name).digits) for name in names)]
        for split, entry in splits.items()
    ]
    return Table("All splits", ["Split", *map(heading, names)], rows, note=INTERVALS)


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every metric of a split, with its interval, the units behind it, and why a value is missing."""
    rows = []
    for name in [*(name for name in METRICS if name in metrics), *(name for name in metrics if name not in METRICS)]:
        entry, metric = metrics[name], metric_of(name)
        about = "; ".join(filter(None, [clean(entry.get("note") or ""), metric.meaning]))
        marginal = number(entry["marginal"], metric.digits) if "marginal" in entry else ""
        row = [heading(name), estimate(entry, metric.digits), marginal, number(entry.get("n"))]
        rows.append([*row, clean(entry.get("unit", "")), about])
    columns = ["Metric", "Value", "Marginal", "n", "Unit", "About"]
    note = (
        f"{INTERVALS} Marginal: what the training answers to each question give, whoever is asked. n: independent "
        "units behind the interval. ↑ higher is better, ↓ lower is better, → what is calibrated."
    )
    return Table("Metrics", columns, rows, frozenset({4, 5}), note)


def counts_table(counts: Mapping[str, Any]) -> Table:
    """What the split holds."""
    names = [name for name in counts if name != "bad_rows"]
    return Table("Data", [name.capitalize() for name in names], [[number(counts[name]) for name in names]])


def bad_rows_table(bad_rows: Mapping[str, int], rows: int | None) -> Table:
    """Rows that could not be used, by reason; shown also where there are none."""
    total = sum(bad_rows.values())
    of = f" of {rows:,}" if rows else ""
    body = [[clean(reason), number(count)] for reason, count in bad_rows.items()]
    return Table("Rows left out", ["Reason", "Rows"], [*body, ["all", f"{total:,}{of}"]])


def group_tables(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    """For each field, its groups, the worst first where they have an accuracy."""
    tables = []
    for field, entries in groups.items():
        keys = [key for key in ("accuracy", "emd") if any(key in entry for entry in entries)]
        rows = [
            [clean(entry["group"]), number(entry.get("people")), number(entry.get("n"))]
            + [estimate(entry.get(key), metric_of(key).digits) for key in keys]
            for entry in entries
        ]
        rows = rows or [["no group is large enough to be shown", MISSING, MISSING]]
        columns = [clean(field).capitalize(), "People", "n", *map(heading, keys)]
        tables.append(Table(f"By {clean(field)}", columns, rows, note=INTERVALS))
    return tables


def inequity_table(inequity: Mapping[str, Mapping[str, Any]]) -> Table:
    """How unequal the groups' accuracies are, for each field and for two fields together."""
    rows = []
    for field, entry in inequity.items():
        sigma = {"value": entry.get("sigma"), "low": entry.get("low"), "high": entry.get("high")}
        worst = f"{clean(entry['worst'])}: {number(entry.get('worst_value'))}" if entry.get("worst") else MISSING
        row = [clean(field), estimate(sigma), number(entry.get("sigma_raw")), number(entry.get("groups")), worst]
        rows.append([*row, clean(entry.get("note") or "")])
    note = (
        "σ: standard deviation of the groups' accuracies, without what sampling alone would give; 0 is equal. Raw: "
        "with it, as usually published. Groups under the minimum size are not named."
    )
    return Table(
        "Inequity", ["Field", "σ ↓", "σ, raw", "Groups", "Worst group", "Note"], rows, frozenset({4, 5}), note
    )


def stereotyping_table(title: str, entries: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """Differences between profiles and within a profile, predicted against true; one row per set of cells."""
    rows = []
    for name, entry in entries.items():
        if entry is not None:
            found = [estimate(entry.get(key)) for key in ("spread_ratio", "entropy_ratio", "between", "true_between")]
            rows.append([clean(name), *found, number(entry.get("cells")), number(entry.get("questions"))])
    columns = ["Over", "Spread ratio → 1", "Entropy ratio → 1", "Between, nats", "True, nats", "Cells", "Questions"]
    note = (
        "A spread ratio above 1 exaggerates the differences between profiles; an entropy ratio below 1 flattens those "
        "within a profile. Between: how much profiles change the answer, predicted and true. On consensus questions "
        f"the truth has no differences to speak of. {INTERVALS}"
    )
    return Table(title, columns, rows, note=note)


def topology_tables(topology: Mapping[str, Any]) -> list[Table]:
    """Groups, what routing tells of the fields, experts without work, and the reference map."""
    groups = [
        [clean(entry["group"]), number(entry["people"]), percent(entry["told_apart"])] for entry in topology["groups"]
    ]
    note = (
        "Told apart: share of a group's people whose profile's vector nobody of another group has. At 0 % the routers "
        "can't know the group."
    )
    fields = " × ".join(clean(field) for field in topology["fields"])
    tables = [Table(f"Groups by {fields}", ["Group", "People", "Told apart"], groups, note=note)]
    means = topology["mutual_information_mean"]
    rows = [
        [clean(field), *(number((found or {}).get(key)) for key in ("value", "expected_under_null", "p"))]
        for field, found in means.items()
    ]
    note = "In nats, mean over routers. By chance: what a random assignment of the people gives; it is subtracted."
    tables.append(Table("What routing tells of people", ["Field", "Above chance", "By chance", "p"], rows, note=note))
    dead = {router: experts for router, experts in topology["dead_experts"].items() if experts}
    rows = [[clean(router), ", ".join(str(expert + 1) for expert in experts)] for router, experts in dead.items()]
    rows = rows or [["none", ""]]
    note = "Experts with less than 1 % of an even load in every group."
    tables.append(Table("Dead experts", ["Router", "Experts"], rows, frozenset({1}), note))
    reference = topology.get("reference")
    if reference:
        values = [number(reference.get(key)) for key in ("disparity", "disparity_p", "mantel_r", "mantel_p")]
        lacking = [number(reference["unmatched_groups"]), number(len(reference["unmatched_reference"]))]
        columns = ["Groups in both", "Disparity ↓", "p", "Mantel r ↑", "p", "Only here", "Only in the reference"]
        rows = [[number(len(reference["matched"])), *values, *lacking]]
        tables.append(Table("Against the reference map", columns, rows, note=clean(reference.get("note") or "")))
    return tables


def distribution_table(panels: Sequence[Mapping[str, Any]]) -> Table:
    """The numbers behind the figure of the distributions."""
    rows = []
    for panel in panels:
        options = panel.get("options") or [str(place + 1) for place in range(len(panel["truth"]))]
        for place, option in enumerate(options):
            shares = [
                number(float(panel[key][place]), 2) if panel[key] else MISSING
                for key in ("truth", "predicted", "marginal")
            ]
            rows.append([clean(panel["group"]), clean(panel["question"]), f"{place + 1}: {clean(option)}", *shares])
    columns = ["Group", "Question", "Option", "Truth", "Prediction", "Training marginal"]
    return Table("The figure's numbers", columns, rows, frozenset({1, 2}))


def document_table(title: str, document: Mapping[str, Any]) -> Table:
    """A nested document, one row per number: `win rate, ties | 12`."""
    rows: list[list[str]] = []

    def add(names: list[str], entry: Any) -> None:
        if isinstance(entry, Mapping) and "value" in entry and not isinstance(entry["value"], Mapping):
            rows.append([", ".join(names), estimate(entry), clean(entry.get("note") or "")])
        elif isinstance(entry, Mapping):
            for key, part in entry.items():
                add([*names, clean(key).replace("_", " ")], part)
        elif isinstance(entry, str):
            rows.append([", ".join(names), "", clean(entry)])
        elif entry is None or isinstance(entry, int | float):
            said = {True: "yes", False: "no"}[entry] if isinstance(entry, bool) else ""
            rows.append([", ".join(names), said or number(entry), ""])

    add([], document)
    return Table(title, ["What", "Value", "Note"], rows, frozenset({2}), INTERVALS)


def heading(name: str) -> str:
    """A metric's name and what is better: `EMD ↓`, `Spread ratio → 1`."""
    metric = metric_of(name)
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}.get(metric.better, f" → {metric.better}")
    return metric.title + arrow


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table, too."""
    text = clean(text)
    for char in "\\`*_<>|~":
        text = text.replace(char, "\\" + char)
    return text.replace("](", "]\\(")

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The report's tables, once for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .text import HEADLINE, METRICS, MISSING, clean, estimate, metric_of, number, other_note, people_known, percent

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

    def without_empty(self) -> Table:
        """Without the last column, where nothing is in it."""
        if any(row[-1] for row in self.rows):
            return self
        return replace(self, columns=self.columns[:-1], rows=[row[:-1] for row in self.rows])

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


def neutral_table(found: Mapping[str, Any]) -> Table:
    """How far the profiles' answers to neutral prompts are from each other."""
    row = ["all prompts", estimate(found["divergence"], 4), number(found["prompts"]), number(found["profiles"])]
    columns = ["Over", "Divergence between profiles, nats → 0", "Prompts", "Profiles"]
    note = clean(found["divergence"].get("note") or "")
    left_out = sum(found["bad_rows"].values())
    note += f" {left_out:,} questions of a profile could not be asked." if left_out else ""
    return Table("Answers by profile", columns, [row], note=f"{INTERVALS} {note}".strip())


def counts_table(counts: Mapping[str, Any]) -> Table:
    """What the split holds; no number of people where nobody is known."""
    hidden = ("bad_rows", "unknown_values") if people_known(counts) else ("bad_rows", "unknown_values", "people")
    names = [name for name in counts if name not in hidden]
    columns, row = [name.capitalize() for name in names], [number(counts[name]) for name in names]
    unknown = counts.get("unknown_values")
    if not unknown:
        return Table("Data", columns, [row])
    said = ", ".join(f"{clean(field)} {profiles:,}" for field, profiles in unknown.items())
    note = (
        "Values unknown to the encoder: of a field, how many profiles have one that it never saw in training. They "
        "are answered as if the field were missing."
    )
    texts = frozenset({len(columns)})
    return Table("Data", [*columns, "Values unknown to the encoder"], [[*row, said]], texts, note)


def bad_rows_table(bad_rows: Mapping[str, int], rows: int | None) -> Table:
    """Rows that could not be used, by reason; shown also where there are none."""
    total = sum(bad_rows.values())
    of = f" of {rows:,}" if rows else ""
    body = [[clean(reason), number(count)] for reason, count in bad_rows.items()]
    return Table("Rows left out", ["Reason", "Rows"], [*body, ["in total" if body else "none", f"{total:,}{of}"]])


def group_tables(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], unit: str = "people", min_people: int | None = None
) -> list[Table]:
    """For each field, its groups, the worst first where they have an accuracy; `unit`: what they are groups of."""
    tables = []
    for field, entries in groups.items():
        keys = [key for key in ("accuracy", "emd") if any(key in entry for entry in entries)]
        sizes = [key for key in ("people", "n") if not entries or any(key in entry for entry in entries)]
        rows = [
            [clean(entry["group"]), *(number(entry.get(size)) for size in sizes)]
            + [estimate(entry.get(key), metric_of(key).digits) for key in keys]
            for entry in entries
        ]
        rows = rows or [["no group is large enough to be shown", MISSING, MISSING]]
        titles = [unit.capitalize() if size == "people" else size for size in sizes]
        columns = [clean(field).capitalize(), *titles, *map(heading, keys)]
        note = other_note([entry["group"] for entry in entries], min_people)
        tables.append(Table(f"By {clean(field)}", columns, rows, note=INTERVALS + note))
    return tables


def inequity_table(inequity: Mapping[str, Mapping[str, Any]], min_people: int | None = None) -> Table:
    """How unequal the groups' accuracies are, for each field and for two fields together."""
    rows = []
    for field, entry in inequity.items():
        sigma = {"value": entry.get("sigma"), "low": entry.get("low"), "high": entry.get("high")}
        worst = f"{clean(entry['worst'])}: {number(entry.get('worst_value'))}" if entry.get("worst") else MISSING
        if entry.get("worst_n") is not None:
            raw = {
                key: entry.get(f"worst_{name}") for key, name in (("value", "raw"), ("low", "low"), ("high", "high"))
            }
            worst += f"; raw {estimate(raw)}, n = {number(entry['worst_n'])}"
        row = [clean(field), estimate(sigma), number(entry.get("sigma_raw")), number(entry.get("groups")), worst]
        rows.append([*row, clean(entry.get("note") or "")])
    note = (
        "σ: standard deviation of the groups' accuracies, without what sampling alone would give; 0 is equal. Raw: "
        "with it. Groups under the minimum size are not named. The worst group's accuracy is shrunken towards the "
        "mean, for the lowest of many is lower than any truth; beside it the raw one of its n people, with an "
        "interval that holds for all groups at once."
    ) + other_note([entry.get("worst") for entry in inequity.values()], min_people)
    return Table(
        "Inequity", ["Field", "σ ↓", "σ, raw", "Groups", "Worst group", "Note"], rows, frozenset({4, 5}), note
    )


def stereotyping_table(
    title: str, entries: Mapping[str, Mapping[str, Any] | None], min_people: int | None = None
) -> Table:
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
        f"the truth has no differences to speak of. {INTERVALS}{other_note(entries, min_people)}"
    )
    return Table(title, columns, rows, note=note)


def topology_tables(topology: Mapping[str, Any], min_people: int | None = None) -> list[Table]:
    """Groups, what routing tells of the fields, experts without work, and the reference map."""
    unit = topology.get("unit", "people")
    groups = [
        [clean(entry["group"]), number(entry["people"]), percent(entry["told_apart"])] for entry in topology["groups"]
    ]
    note = (
        f"Told apart: share of a group's {unit} whose vector no other group has. At 0 % the routers can't know the "
        "group."
    ) + other_note([entry["group"] for entry in topology["groups"]], min_people if unit == "people" else 1)
    fields = " × ".join(clean(field) for field in topology["fields"])
    tables = [Table(f"Groups by {fields}", ["Group", unit.capitalize(), "Told apart"], groups, note=note)]
    means = topology["mutual_information_mean"]
    keys = ("value", "expected_under_null", "p")
    rows = [
        [clean(field), *(number(found.get(key)) for key in keys), clean(found.get("note") or "")]
        for field, found in means.items()
    ]
    note = f"In nats, mean over routers. By chance: what a random assignment of the {unit} gives; it is subtracted."
    columns = ["Field", "Above chance", "By chance", "p", "Note"]
    tables.append(Table(f"What routing tells of {unit}", columns, rows, frozenset({4}), note).without_empty())
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


def distribution_table(panels: Sequence[Mapping[str, Any]], min_people: int | None = None) -> Table:
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
    note = other_note([panel["group"] for panel in panels], min_people).strip()
    return Table("The figure's numbers", columns, rows, frozenset({1, 2}), note)


def own_choices_summary(splits: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per split: whether the model finds likelier what people chose."""
    rows = []
    for split, entry in splits.items():
        found = entry["metrics"]
        pairs = estimate(found["pair_accuracy"])
        choices, chance = estimate(found["choice_accuracy"]), number(found["choice_chance"]["value"])
        people = [number(entry["counts"][name]) for name in ("choices", "people")]
        rows.append([clean(split), pairs, "0.500", choices, chance, *people])
    columns = ["Split", heading("pair_accuracy"), "Chance", heading("choice_accuracy"), "Chance", "Choices", "People"]
    return Table("People's own choices", columns, rows, note=INTERVALS)


def own_choices_tables(split: str, entry: Mapping[str, Any]) -> list[Table]:
    """What a model makes of people's choices in a split, beside what takes no model; and what rows there were."""
    found, rows = entry["metrics"], []
    for name, chance in (("pair_accuracy", 0.5), ("choice_accuracy", found["choice_chance"]["value"])):
        own, per_token = found[name], found[f"{name}_per_token"]
        longer = estimate(found.get(f"{name}_longer")) if f"{name}_longer" in found else ""
        row = [heading(name), estimate(own), estimate(per_token), longer, number(chance), number(own["n"])]
        rows.append([*row, clean(own["unit"]), clean(own.get("note") or "")])
    columns = ["Measure", "Model", "Model, per token", "Longer answer", "Chance", "n", "Unit", "Note"]
    note = (
        "Pair: the share of the other answers that the model finds less likely than the one the person chose; a tie "
        "is a half. Choice: the chosen answer is the likeliest of all. A whole answer's likelihood is drawn to the "
        "short one, that per token to the fluent one: read both, beside the rule that people choose the longer "
        f"answer. n: independent units behind the interval. {INTERVALS}"
    )
    counts = entry["counts"]
    return [
        Table(f"Own choices: {clean(split)}", columns, rows, frozenset({6, 7}), note).without_empty(),
        counts_table(counts),
        bad_rows_table(counts.get("bad_rows") or {}, counts.get("rows")),
    ]


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

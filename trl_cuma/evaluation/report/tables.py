# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The report's tables, once for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        "with it. Groups under the minimum size are not named."
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
    keys = ("value", "expected_under_null", "p")
    rows = [
        [clean(field), *(number(found.get(key)) for key in keys), clean(found.get("note") or "")]
        for field, found in means.items()
    ]
    note = "In nats, mean over routers. By chance: what a random assignment of the people gives; it is subtracted."
    columns = ["Field", "Above chance", "By chance", "p", "Note"]
    tables.append(Table("What routing tells of people", columns, rows, frozenset({4}), note).without_empty())
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


def answers_tables(entry: Mapping[str, Any]) -> list[Table]:
    """The answers of two models, the judge's verdicts and what they are worth, and variety between profiles."""
    models = {
        f"{which}: {clean(entry[key].get('adapter') or entry[key]['name'])}": entry[key]
        for key, which in (("model", "This model"), ("other", "The other"))
        if entry.get(key)
    }
    tables = []
    if entry.get("win_rate"):
        tables += [_win_rate_table(entry["win_rate"])]
        if entry.get("agreement"):
            tables.append(_agreement_table(entry["agreement"]))
        asked = {"the answers of both": entry["win_rate"], "what people chose": entry.get("agreement")}
        tables.append(_verdicts_table({name: found["counts"] for name, found in asked.items() if found}))
    keys = ("rows", "answers", "mean_tokens", "cut_off", "empty")
    rows = [
        [f"{name}{purpose}", *(number(counts[key], 1) for key in keys)]
        for name, model in models.items()
        for purpose, counts in (("", model.get("answers")), (", several profiles", model.get("spread_answers")))
        if counts
    ]
    if rows:
        note = "Cut off: by the limit on new tokens, rather than ended by the model."
        columns = ["Model", "Rows", "Answers", "Mean tokens", "Cut off", "Empty"]
        tables.append(Table("Answers written", columns, rows, note=note))
    rows = []
    for name, model in models.items():
        found = model["diversity"]
        rows.append([name, estimate(found), number(found["n"]), clean(found.get("note") or "")])
    note = (
        "Different word pairs in the answers to a prompt for different profiles, over those in as many answers for "
        "one profile. 1: profiles change no more than drawing again does. Higher is more variety, not better "
        f"answers. n: prompts. {INTERVALS}"
    )
    columns = ["Model", "Between over within", "n", "Note"]
    return [*tables, Table("Variety between profiles", columns, rows, frozenset({3}), note).without_empty()]


def _win_rate_table(found: Mapping[str, Any]) -> Table:
    length = found["length"]
    effect = found["length_controlled"].get("length_effect")
    about = {
        "win_rate": ("Win-rate ↑, a tie is half a win", "Wilson's interval: as if the rows were independent"),
        "win_rate_decided": ("Without the ties ↑", "Wilson's interval"),
        "win_rate_resampled": (
            "Win-rate ↑, resampled",
            "prompts and profiles resampled, where several rows share them",
        ),
        "length_controlled": (
            "At equal length ↑",
            f"what a logistic regression expects where both answers are equally long; its effect of length is "
            f"{number(effect, 2)}",
        ),
    }
    rows = []
    for name, (title, meaning) in about.items():
        entry = found[name]
        said = "; ".join(filter(None, [clean(entry.get("note") or ""), meaning]))
        rows.append([title, estimate(entry), number(entry["n"]), clean(entry["unit"]), said])
    note = f"By the judge, 0.5 is as good as the other. {INTERVALS}"
    if length["mean"] is not None:
        note += (
            f" Characters of an answer: {length['mean']:,.0f}, of the other's {length['mean_other']:,.0f}; the longer "
            f"one in {percent(length['longer'])} of the rows."
        )
    return Table("Win-rate", ["Measure", "Value", "n", "Unit", "About"], rows, frozenset({3, 4}), note)


def _agreement_table(found: Mapping[str, Any]) -> Table:
    titles = {
        "agreement": "The judge ↑, a tie is half a hit",
        "agreement_decided": "The judge ↑, without ties",
        "longer": "The rule “the longer answer”",
        "people": "Another person, where one chose as well",
        "agreement_shared": "The judge ↑, on these rows",
    }
    rows = [
        [title, estimate(found[name]), number(found[name]["n"]), clean(found[name].get("note") or "")]
        for name, title in titles.items()
    ]
    rows.insert(2, ["Chance", number(found["chance"]), "", ""])
    note = (
        "How often the judge, told a person's profile, prefers what this person chose: a judge near chance, or no "
        f"better than the rule of length, says little of the win-rate. n: independent people or prompts. {INTERVALS}"
    )
    table = Table("Does the judge agree with people?", ["Who", "Agreement", "n", "Note"], rows, frozenset({3}), note)
    return table.without_empty()


def _verdicts_table(counts: Mapping[str, Mapping[str, Any]]) -> Table:
    keys = ("rows", "wins", "losses", "ties", "order_disagreements", "unscored", "requests", "cached_verdicts")
    rows = []
    for name, entry in counts.items():
        failures = ", ".join(f"{clean(kind)} {count:,}" for kind, count in entry["failures"].items())
        rows.append([name, *(number(entry[key]) for key in keys), failures or "none"])
    columns = ["Judged", "Rows", "Wins", "Losses", "Ties", "By the order", "Unscored", "Requests", "From the cache"]
    note = (
        "Each row is asked in both orders; where the two verdicts differ, it is a tie, by the order. A row is "
        "unscored, and in no rate, where a request failed. A win over what a person rejected is a verdict for their "
        "choice."
    )
    return Table("Verdicts", [*columns, "Failures"], rows, frozenset({9}), note)


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

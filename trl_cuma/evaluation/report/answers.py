# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The report's tables on answers that models wrote: how they compare, and what the judge is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import INTERVALS, Table
from .text import clean, estimate, number, percent


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

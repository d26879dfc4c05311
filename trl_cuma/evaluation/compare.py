# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Evaluations side by side, with paired differences where they are of the same cells and answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cell_scores import CHOICES, FORMULAS, Scores, measure
from .report import VERSION, plain
from .report.forest import differences_drawing
from .report.output import write_folder
from .report.page import Section, render_page
from .report.tables import INTERVALS, Table, escaped, heading
from .report.text import METRICS, clean, estimate, metric_of
from .resampling import metric

TITLE = "Comparison of evaluations"

NOT_PAIRED = {
    "cells": "distributions not paired: the runs group people by other fields or sizes",
    "answers": "answers not paired: the runs tell people apart in different ways",
    "own_choices": "choices not paired: the runs tell people or prompts apart in different ways",
}
"""Table of scores → what it means that its rows are not of the same clusters and weights."""


@dataclass(frozen=True)
class Run:
    """A folder that `trl-cuma evaluate` wrote."""

    name: str
    evaluation: dict[str, Any]
    cells: dict[str, np.ndarray]

    def tables(self, split: str) -> dict[str, Scores]:
        names = ("answers", "cells", "own_choices")
        found = {table: Scores.from_arrays(self.cells, f"{split}/{table}") for table in names}
        return {table: scores for table, scores in found.items() if scores is not None}

    def key(self, split: str) -> str | None:
        """Equal where the cells and the answers are."""
        key = self.cells.get(f"{split}/key")
        return None if key is None else str(key)


def compare_runs(runs: Sequence[str | os.PathLike[str]], *, num_samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """
    Compare evaluations of the same splits.

    Where a run is of the same cells and answers as the first one, each metric's difference is resampled with both
    runs' scores together: its interval is narrower than the two intervals suggest. Else nothing is subtracted: with
    other people or questions, a difference says as much of these.

    Args:
        runs (sequence of paths): Folders that `trl-cuma evaluate` wrote, the first is held against.
        num_samples (`int`), seed (`int`): Of the bootstrap.

    Returns:
        `dict`: `runs`, each with `name` and `model`; and `splits`, each with `metrics` (one mapping per run,
        `None` for a run without the split) and `differences` (per further run: `run`, `paired`, `note`, `metrics`).

    Raises:
        `ValueError`: There are fewer than two runs, one is no evaluation, or they have no split in common.
        `FileNotFoundError`: A folder or its `evaluation.json` is missing.
    """
    if len(runs) < 2:
        raise ValueError(f"A comparison takes two or more runs, got {len(runs)}. Name their folders.")
    paths = [Path(run) for run in runs]
    short = len({path.resolve().name for path in paths}) == len(paths)
    loaded = [load_run(path, path.resolve().name if short else str(path)) for path in paths]
    first, *others = loaded
    splits = [name for name in first.evaluation["splits"] if any(name in run.evaluation["splits"] for run in others)]
    if not splits:
        raise ValueError(
            f"The runs have no split in common with the first: {first.name} has {list(first.evaluation['splits'])}. "
            "Compare evaluations of the same split."
        )
    return {
        "version": VERSION,
        "runs": [{"name": run.name, "model": run.evaluation["model"]} for run in loaded],
        "splits": {
            split: {
                "metrics": [(run.evaluation["splits"].get(split) or {}).get("metrics") for run in loaded],
                "differences": [
                    difference(first, run, split, num_samples=num_samples, seed=seed)
                    for run in others
                    if split in run.evaluation["splits"]
                ],
            }
            for split in splits
        },
    }


def write_comparison(comparison: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> Path:
    """
    Write a comparison as `comparison.json`, `comparison.md` and `comparison.html`, all or none, readable by the owner
    alone.

    Args:
        comparison (`Mapping`): What [`compare_runs`] gave.
        output_dir (`str` or `PathLike`): A folder that is not there yet, or is empty.

    Returns:
        `Path`: The folder.

    Raises:
        `FileExistsError`: Something is in `output_dir`.
    """
    comparison = plain(comparison)
    facts = {f"Run {number}": run["name"] for number, run in enumerate(comparison["runs"], start=1)}
    files = {
        "comparison.json": json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "comparison.md": comparison_markdown(comparison),
        "comparison.html": render_page(TITLE, facts, _sections(comparison), _footer()),
    }
    return write_folder({name: text.encode() for name, text in files.items()}, output_dir)


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """A comparison's tables as Markdown."""
    names = [f"{number}. {escaped(run['name'])}" for number, run in enumerate(comparison["runs"], start=1)]
    lines = [f"# {TITLE}", "\n".join(names)]
    for split in comparison["splits"]:
        lines += [f"## Split: {escaped(split)}", *(table.markdown() for table in _tables(comparison, split))]
    return "\n\n".join([*lines, _footer()]) + "\n"


def load_run(folder: Path, name: str) -> Run:
    """
    Read a folder that `trl-cuma evaluate` wrote.

    Raises:
        `ValueError`: It holds something else, or an evaluation of another version.
        `FileNotFoundError`: It holds no evaluation.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no evaluation.json. Name folders that `trl-cuma evaluate` wrote.")
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        version = evaluation["version"], evaluation["splits"], evaluation["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no evaluation. Name folders that `trl-cuma evaluate` wrote.") from None
    if version[0] != VERSION:
        raise ValueError(f"{path} is of version {version[0]!r}, expected {VERSION}. Evaluate again.")
    for split, own in ((evaluation.get("generation") or {}).get("own_choices") or {}).items():
        evaluation["splits"][split] = {"metrics": {metric: own["metrics"][metric] for metric in CHOICES}}
    cells: dict[str, np.ndarray] = {}
    if (folder / "cells.npz").is_file():
        with np.load(folder / "cells.npz", allow_pickle=False) as arrays:
            cells = dict(arrays)
    return Run(name, evaluation, cells)


def same_rows(one: Scores, other: Scores) -> bool:
    """
    Whether all rows are of the same clusters and weights. Of the same answers, cells differ where people were grouped
    by other fields or sizes.
    """
    if one.units != other.units:
        return False
    pairs = zip((*one.clusters, one.weights), (*other.clusters, other.weights), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _same_marginal(tables: Mapping[str, Scores], against: Mapping[str, Scores]) -> bool:
    """Whether what both runs were held against comes from the same training answers."""
    return all(
        np.allclose(scores.columns[name], against[table].columns[name], equal_nan=True)
        for table, scores in tables.items()
        for name in scores.columns.keys() & against[table].columns.keys()
        if name.endswith("_marginal")
    )


def difference(first: Run, run: Run, split: str, *, num_samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """A run's metrics less those of the first: an entry of `differences`, see [`compare_runs`]."""
    keys = [each.key(split) for each in (first, run)]
    notes = []
    if None in keys:
        notes.append("not paired: a run has no cells.npz for this split")
    elif keys[0] != keys[1]:
        notes.append(
            "not paired: measured on other cells or answers than the first run, so that a difference may be theirs"
        )
    metrics = {}
    if not notes:
        against = first.tables(split)
        tables = {name: scores for name, scores in run.tables(split).items() if name in against}
        for table, why in NOT_PAIRED.items():
            if table in tables and not same_rows(tables[table], against[table]):
                del tables[table]
                notes.append(why)
        same_marginal = _same_marginal(tables, against)
        if not same_marginal:
            notes.append(
                "nothing that is held against the training marginal is compared: the runs' training answers differ"
            )
        for name, formula in (FORMULAS | CHOICES).items():
            if not same_marginal and any(column.endswith("_marginal") for column in formula.columns):
                continue
            values = [each.evaluation["splits"][split]["metrics"].get(name, {}).get("value") for each in (first, run)]
            # A metric that is n/a in one of the runs has no difference, such as an index without a denominator.
            if None not in values and (found := measure(name, tables, against, num_samples=num_samples, seed=seed)):
                metrics[name] = metric(*found)
    return {
        "run": run.name,
        "paired": not notes or bool(metrics),
        "note": "; ".join(notes) or None,
        "metrics": metrics,
    }


def _sections(comparison: Mapping[str, Any]) -> list[Section]:
    sections = []
    for split, found in comparison["splits"].items():
        drawing = differences_drawing("differences", found["differences"])
        drawings = [drawing] if drawing else []
        sections.append(Section(f"Split: {clean(split)}", _tables(comparison, split), drawings))
    return sections


def _tables(comparison: Mapping[str, Any], split: str) -> list[Table]:
    names = [clean(run["name"]) for run in comparison["runs"]]
    found = comparison["splits"][split]
    there = {name for metrics in found["metrics"] for name in metrics or {}}
    ordered = [*(name for name in METRICS if name in there), *sorted(there - set(METRICS))]
    rows = [
        [heading(name), *(estimate((metrics or {}).get(name), metric_of(name).digits) for metrics in found["metrics"])]
        for name in ordered
    ]
    tables = [Table("Metrics", ["Metric", *names], rows, note=INTERVALS)]
    for difference in found["differences"]:
        title = f"{clean(difference['run'])} less {names[0]}"
        rows = [
            [heading(name), estimate(entry, metric_of(name).digits), verdict(name, entry), clean(entry["unit"])]
            for name, entry in difference["metrics"].items()
        ]
        note = clean(difference["note"] or "")
        note = f"{note[:1].upper()}{note[1:]}. " if note else ""
        note += "Paired: both runs' scores are resampled together. " + INTERVALS if rows else ""
        columns = ["Metric", "Difference", "Reading", "Unit"]
        tables.append(Table(title, columns, rows or [["none", "n/a", "", ""]], frozenset({2, 3}), note.strip()))
    return tables


def verdict(name: str, entry: Mapping[str, Any]) -> str:
    """What the interval says, for metrics that have a better direction."""
    better = metric_of(name).better
    if entry["low"] is None or better not in ("higher", "lower"):
        return ""
    if entry["low"] <= 0 <= entry["high"]:
        return "no clear difference"
    return "better" if (entry["low"] > 0) == (better == "higher") else "worse"


def _footer() -> str:
    return (
        "Intervals are 95 % each, not corrected for the number of metrics: of twenty without a difference, one looks "
        "clear. Written by trl_cuma."
    )

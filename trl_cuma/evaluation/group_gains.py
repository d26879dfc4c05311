# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What each group gains from one evaluation to another, in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cell_scores import GROUP, measure
from .compare import Run, same_rows
from .resampling import metric

GAINS = {"answers": ("accuracy", "nll"), "cells": ("emd",)}
"""Table of scores → metrics of a group. Of people's answers the distributions have no interval by group."""


def group_gains(
    first: Run, run: Run, split: str, *, num_samples: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    A run's metrics less those of the first, by group, where both are of the same cells and answers.

    Args:
        first (`Run`): What the run is held against.
        run (`Run`): Whose groups.
        split (`str`): In both.
        num_samples (`int`), seed (`int`): Of the bootstrap, which resamples both runs' rows of a group together.

    Returns:
        `dict`: Field → group → metric → the difference with its interval; nothing where the runs can't be paired.
    """
    if run.key(split) is None or run.key(split) != first.key(split):
        return {}
    tables, against = run.tables(split), first.tables(split)
    table = next((name for name in GAINS if name in tables and name in against), None)
    if table is None or not same_rows(tables[table], against[table]):
        return {}
    own, other = tables[table], against[table]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for field, entries in (run.evaluation["splits"][split].get("groups") or {}).items():
        numbers, others = (scores.columns.get(f"{GROUP}{field}") for scores in (own, other))
        if numbers is None or others is None or not np.array_equal(numbers, others, equal_nan=True):
            continue  # grouped by other sizes
        for entry in entries:
            rows = numbers == entry["number"]
            parts = {table: own.of_rows(rows)}, {table: other.of_rows(rows)}
            metrics = {name: measure(name, *parts, num_samples=num_samples, seed=seed) for name in GAINS[table]}
            found.setdefault(field, {})[entry["group"]] = {
                name: metric(*estimate) for name, estimate in metrics.items() if estimate is not None
            }
    return found

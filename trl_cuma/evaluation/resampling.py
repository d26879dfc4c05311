# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Means with intervals for the evaluation's document: which clusters to resample, and how a metric is written."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .metrics.intervals import Estimate, bootstrap_interval


def number_labels(values: Iterable[Hashable]) -> np.ndarray:
    """A number for each different value, in the order of their first row, `(rows,)`."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def crossed_clusters(clusters: Sequence[np.ndarray]) -> list[np.ndarray]:
    """
    Of two columns of labels, those to resample: both where they are crossed.

    Where one is nested in the other (each prompt was asked by one person), the coarser alone: draws of whole people
    hold the prompts' noise already, and resampling both would count it twice. A single label has nothing to resample.

    Args:
        clusters (sequence of two `np.ndarray` of shape `(rows,)`): Numbers of clusters.
    """
    first, second = clusters
    sizes = [len(np.unique(column)) for column in clusters]
    if 1 in sizes:
        return [clusters[int(np.argmax(sizes))]]
    pairs = len(np.unique(np.stack([first, second], 1), axis=0))
    if pairs in sizes:
        return [clusters[int(np.argmin(sizes))]]
    return [first, second]


def resampled_mean(
    values: np.ndarray, clusters: Sequence[np.ndarray], *, num_samples: int = 2000, seed: int = 0
) -> Estimate:
    """
    The mean of rows, with [`bootstrap_interval`] over their [`crossed_clusters`]. No value without rows.
    """
    if not len(values):
        return Estimate(None, None, None, 0, "no rows")
    return bootstrap_interval(values, crossed_clusters(clusters), num_samples=num_samples, seed=seed)


def metric(estimate: Estimate, unit: str) -> dict[str, Any]:
    """An estimate as the evaluation's document holds it; `n` counts `unit`."""
    entry = asdict(estimate) | {"unit": unit}
    if entry["note"] is None:
        del entry["note"]
    return entry

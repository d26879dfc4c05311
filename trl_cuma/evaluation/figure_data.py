# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the report's figures show of a split, few enough numbers to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .group_cells import DistributionCells
from .metrics.cells import entropy
from .metrics.pooled import calibration
from .prediction import SurveyPrediction

MAX_POINTS = 2000
QUESTIONS, GROUPS = 3, 4


def distribution_panels(
    cells: DistributionCells, questions: Mapping[str, tuple[str, Sequence[str]]]
) -> list[dict[str, Any]]:
    """
    Mean distributions of groups: the two questions on which they differ most and the one on which they differ least,
    of those with the most groups; for each of these the four groups with the most cells. At most 12 panels.

    Args:
        cells (`DistributionCells`): With the groups' names.
        questions (`Mapping`): Question → text and options; where one is missing, its id and the options' numbers.
    """
    named = np.array([name is not None for name in cells.group], dtype=bool)
    if not named.any():
        return []
    groups, count = np.unique(cells.group[named].astype(str), return_counts=True)
    shown = groups[np.argsort(-count, kind="stable")[:GROUPS]].tolist()
    rows: dict[str, dict[str, np.ndarray]] = {}
    for row in np.flatnonzero(named):
        if cells.group[row] in shown:
            members = rows.setdefault(str(cells.question[row]), {})
            members[cells.group[row]] = np.append(members.get(cells.group[row], np.zeros(0, int)), row)
    most = sorted(map(len, rows.values()), reverse=True)[:QUESTIONS][-1]
    truths = {
        question: np.stack([cells.truth[own].mean(0) for own in members.values()])
        for question, members in rows.items()
        if len(members) >= most
    }
    ranked = sorted(truths, key=lambda question: -truths[question].std(0).sum())
    chosen = dict.fromkeys([*ranked[: QUESTIONS - 1], ranked[-1]])
    panels = []
    for question in chosen:
        for group in (group for group in shown if group in rows[question]):
            own = rows[question][group]
            options = int(cells.num_options[own[0]])
            text, names = questions.get(question, (question, [str(place + 1) for place in range(options)]))
            means = {
                name: getattr(cells, name)[own].mean(0)[:options].round(6).tolist()
                for name in ("truth", "predicted", "marginal")
            }
            known = np.isfinite(cells.marginal[own]).all()
            panels.append(
                {"question": text, "group": group, "options": list(names)}
                | means
                | {"marginal": means["marginal"] if known else None}
            )
    return panels


def collapse_points(cells: DistributionCells) -> dict[str, Any]:
    """
    Entropies per cell, in nats, of at most 2000 cells; `None` for the marginal's where it is not known. To the true
    ones is added by how much few answers make them too low.
    """
    rows = np.unique(np.linspace(0, len(cells) - 1, min(len(cells), MAX_POINTS)).astype(int))
    true = np.minimum(entropy(cells.truth[rows]) + cells.noise[rows], np.log(cells.num_options[rows]))
    points = {
        "predicted_entropy": entropy(cells.predicted[rows]).round(6).tolist(),
        "true_entropy": true.round(6).tolist(),
    }
    known = np.isfinite(cells.marginal).all()
    return points | {"marginal_entropy": entropy(cells.marginal[rows]).round(6).tolist() if known else None}


def calibration_bins(prediction: SurveyPrediction) -> dict[str, Any]:
    """Reliability of the option probabilities, by answers where there are any, else by cells."""
    observed = prediction.observed()
    weight = np.bincount(prediction.answer_cell, prediction.answer_weight, minlength=len(observed))
    if prediction.truth is not None:
        weight = np.ones(len(observed))
    rows = np.isfinite(observed).all(1) & (weight > 0)
    return calibration(observed[rows], prediction.predicted[rows], prediction.num_options[rows], weights=weight[rows])

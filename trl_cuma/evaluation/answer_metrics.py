# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Scores and metrics of people's single answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .cell_scores import Scores, add_note
from .group_cells import value_or_nan
from .metrics.cells import nll
from .metrics.choices import country_accuracies, macro_f1, wvb_emd
from .metrics.intervals import Estimate, bootstrap_interval
from .prediction import SurveyPrediction
from .resampling import metric, number_labels, resampled_mean


def answer_scores(prediction: SurveyPrediction, marginal: Mapping[str, np.ndarray], person: np.ndarray) -> Scores:
    """Scores of each answer, and the training marginal's; `person` as of [`number_people`]."""
    cell, choice = prediction.answer_cell, prediction.answer_choice
    columns = {
        "accuracy": (prediction.predicted.argmax(1)[cell] == choice).astype(float),
        "nll": nll(choice, prediction.predicted[cell], prediction.num_options[cell]),
        "outside": prediction.outside[cell],
        "position_bias": value_or_nan(prediction.position_bias, len(prediction.profile))[cell],
    }
    question = prediction.question_id[cell]
    for name in ("accuracy", "nll"):
        columns[f"{name}_marginal"] = np.full(len(cell), np.nan)
    for name in set(question.tolist()) & set(marginal):
        rows = np.flatnonzero(question == name)
        probs = marginal[name]
        columns["accuracy_marginal"][rows] = choice[rows] == probs.argmax()
        columns["nll_marginal"][rows] = -np.log(probs[choice[rows]])
    clusters = (person, number_labels(question.tolist()))
    return Scores(columns, clusters, ("person", "question"), prediction.answer_weight)


def answer_metrics(prediction: SurveyPrediction, person: np.ndarray, options: Mapping[str, int]) -> dict[str, Any]:
    """Metrics that are no mean over answers."""
    cell, truth, weight = prediction.answer_cell, prediction.answer_choice, prediction.answer_weight
    predicted = prediction.predicted.argmax(1)[cell]
    order = np.argsort(prediction.question_id[cell], kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(number_labels(prediction.question_id[cell][order].tolist())) != 0])
    by_question = {"macro_f1_question": [], "wvb_emd": []}
    for rows in np.split(order, starts[1:]):
        top = prediction.num_options[cell[rows[0]]] - 1
        by_question["macro_f1_question"].append(macro_f1(truth[rows], predicted[rows], weights=weight[rows]))
        by_question["wvb_emd"].append(wvb_emd(truth[rows], predicted[rows], 0, top))
    note = "no interval: it would have to resample people and questions"
    metrics = {
        name: metric(Estimate(float(np.mean(values)), None, None, len(values), note), "question")
        for name, values in by_question.items()
    }
    add_note(metrics["wvb_emd"], "above 0 for a perfect sampler too: each person's likeliest answer is counted")
    # F1 = 2 hits / (chosen + predicted) of each option, from every person's sums.
    kinds = [(truth == predicted) & (truth == option) for option in range(prediction.predicted.shape[1])]
    counts = [(truth == option).astype(float) + (predicted == option) for option in range(len(kinds))]
    sums = np.stack([np.bincount(person, weight * column) for column in (*kinds, *counts)], 1)

    def pooled(*means: Any) -> Any:
        hits, either = np.array(means[: len(kinds)]), np.array(means[len(kinds) :])
        return np.nanmean(np.where(either > 0, 2 * hits / np.where(either > 0, either, 1), np.nan), axis=0)

    estimate = bootstrap_interval(sums, [np.arange(len(sums))], pooled, **options)
    metrics["macro_f1_pooled"] = metric(estimate, "person")
    add_note(metrics["macro_f1_pooled"], "people are resampled, the questions are taken as they are")
    return metrics


def macro_accuracy(
    prediction: SurveyPrediction, country: Sequence[str | None], options: Mapping[str, int]
) -> dict[str, Any]:
    """Mean over countries of the accuracy in each; `country` is that of each cell."""
    cell = prediction.answer_cell
    values = country_accuracies(
        prediction.answer_choice,
        prediction.predicted.argmax(1)[cell],
        np.array(country, dtype=object)[cell],
        prediction.answer_weight,
    )
    label = np.arange(len(values))
    return metric(resampled_mean(values, [label, label], **options), "country")

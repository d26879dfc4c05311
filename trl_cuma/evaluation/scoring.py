# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From predictions to the evaluation's document: metrics with intervals, groups, and what the figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.people import MIN_COUNT
from .cell_scores import FORMULAS, Scores, measure
from .figure_data import calibration_bins, collapse_points, distribution_panels
from .group_cells import DistributionCells, cells_of_answers, cells_of_truth, group_names, number_people, value_or_nan
from .metrics.cells import emd, entropy, expected_accuracy, kl, nll
from .metrics.choices import macro_f1, wvb_emd
from .metrics.groups import inequity_table, scores_by_group
from .metrics.intervals import Estimate, bootstrap_interval
from .metrics.pooled import collapse_index, profile_information
from .metrics.stereotypes import stereotyping_table
from .prediction import SurveyPrediction
from .resampling import crossed_clusters, metric, number_labels, resampled_mean

MIN_INEQUITY_PEOPLE = 100
MAX_STEREOTYPE_GROUPS = 30
NO_MARGINAL = "no training answers to these questions"


def score_prediction(
    prediction: SurveyPrediction,
    marginal: Mapping[str, np.ndarray],
    *,
    group_by: Sequence[str] | None = None,
    questions: Mapping[str, tuple[str, Sequence[str]]] | None = None,
    min_group_size: int = MIN_COUNT,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Scores]]:
    """
    Score the predictions of a split.

    Where the truth of the cells is known, metrics of distributions are over these (question, profile) cells. Where
    people's answers are all that there is, a cell has an answer or a few. Then they are over (question, group) cells
    of at least `min_group_size` people, with the groups of the first field of `group_by`. Accuracy and log-loss are
    those of the answers where there are any.

    Args:
        prediction (`SurveyPrediction`): What a model predicts.
        marginal (`Mapping[str, np.ndarray]`): Question → the distribution of the training answers to it, over its
            options. Metrics against the marginal leave out the cells of questions that it lacks.
        group_by (`Sequence[str]`, *optional*): Fields of the profiles; by default all, "country" first.
        questions (`Mapping`, *optional*): Question → text and options, for the figures. Must not hold profiles.
        min_group_size (`int`, defaults to 30): People. Smaller groups are "Other" in all that is written.
        num_samples (`int`), seed (`int`): Of the bootstrap.

    Returns:
        The split's part of `evaluation.json`, and the scores by table (`"cells"`, `"answers"`) for `trl-cuma compare`.

    Raises:
        `ValueError`: `group_by` names a field that no profile has.
    """
    options = {"num_samples": num_samples, "seed": seed}
    fields = grouping_fields(prediction, group_by)
    person = number_people(prediction)
    groups = {}
    for field in fields:
        values = [prediction.demographic[index].get(field) for index in prediction.profile.tolist()]
        groups[field] = group_names(values, prediction, person, min_group_size)

    def cells_by(field: str | None) -> DistributionCells:
        names = groups[field] if field else np.full(len(prediction.profile), "all", dtype=object)
        if prediction.truth is not None:
            return cells_of_truth(prediction, marginal, names)
        return cells_of_answers(prediction, marginal, names, person, min_group_size)

    cells = cells_by(fields[0] if fields else None)
    of_answers = prediction.truth is None
    tables = {}
    if len(cells):
        who = fields[0] if fields and (of_answers or len(fields) == 1) else "profile"
        tables["cells"] = _cell_scores(cells, who)
    if len(prediction.answer_cell):
        tables["answers"] = _answer_scores(prediction, marginal, person)

    document: dict[str, Any] = {"counts": _counts(prediction, person)}
    document["metrics"] = _metrics(cells, tables, of_answers, min_group_size, options)
    if "answers" in tables:
        document["metrics"] |= _answer_metrics(prediction, person, options)
        if "country" in fields:
            country = [prediction.demographic[index].get("country") for index in prediction.profile.tolist()]
            document["metrics"]["country_macro_accuracy"] = _macro_accuracy(
                tables["answers"], prediction, country, options
            )
    document["groups"] = {
        field: _groups(
            groups[field], cells_by(field), tables.get("answers"), prediction, person, min_group_size, options
        )
        for field in fields
    }
    if "answers" in tables and fields:
        document["inequity"] = inequity_table(
            tables["answers"].columns["accuracy"],
            {field: names[prediction.answer_cell].tolist() for field, names in groups.items()},
            # Who changed a value between two answers would be in two groups.
            number_labels(zip(person.tolist(), prediction.profile[prediction.answer_cell].tolist(), strict=True)),
            weights=tables["answers"].weights,
            min_people=max(min_group_size, MIN_INEQUITY_PEOPLE),
            num_samples=min(num_samples, 1000),
            seed=seed,
        )
    if len(cells):
        document["stereotyping"] = _stereotyping(cells, options)
        document["distributions"] = distribution_panels(cells, questions or {})
        document["collapse"] = collapse_points(cells)
    document["calibration"] = calibration_bins(prediction)
    return document, tables


def grouping_fields(prediction: SurveyPrediction, group_by: Sequence[str] | None) -> list[str]:
    """
    The fields to group by: those asked for, or all that some profile has, "country" first.

    Raises:
        `ValueError`: No profile has a field that was asked for.
    """
    there = {field for profile in prediction.demographic for field, value in profile.items() if value is not None}
    if group_by is None:
        return sorted(there, key=lambda field: (field != "country", field))
    missing = [field for field in group_by if field not in there]
    if missing:
        raise ValueError(f"`group_by` names {missing[0]!r}, which no profile has. Name some of {sorted(there)}.")
    return list(dict.fromkeys(group_by))


def _counts(prediction: SurveyPrediction, person: np.ndarray) -> dict[str, Any]:
    return {
        "rows": prediction.num_rows,
        "cells": len(prediction.profile),
        "answers": len(prediction.answer_cell),
        "people": len(np.unique(person)),
        "profiles": len(prediction.demographic),
        "questions": len(np.unique(prediction.question_id)),
        "bad_rows": {reason: len(rows) for reason, rows in prediction.bad_rows.items()},
    }


def _cell_scores(cells: DistributionCells, who: str) -> Scores:
    known = np.isfinite(cells.marginal).all(1)
    part = (cells.truth[known], cells.marginal[known], cells.num_options[known])

    def of_marginal(values: np.ndarray) -> np.ndarray:
        column = np.full(len(cells), np.nan)
        column[known] = values
        return column

    columns = {
        "emd": emd(cells.truth, cells.predicted, cells.num_options),
        "emd_marginal": of_marginal(emd(*part)),
        "kl": kl(cells.truth, cells.predicted, cells.num_options),
        "kl_marginal": of_marginal(kl(*part)),
        "nll": nll(cells.truth, cells.predicted, cells.num_options),
        "nll_marginal": of_marginal(nll(*part)),
        "accuracy": expected_accuracy(cells.truth, cells.predicted),
        "accuracy_marginal": of_marginal(expected_accuracy(*part[:2])),
        "entropy": entropy(cells.predicted),
        "entropy_true": entropy(cells.truth),
        "entropy_marginal": of_marginal(entropy(part[1])),
        "between": profile_information(cells.predicted, cells.num_options, cells.question),
        "between_true": profile_information(cells.truth, cells.num_options, cells.question),
        "outside": cells.outside,
        "position_bias": cells.position_bias,
    }
    clusters = (number_labels(cells.cluster.tolist()), number_labels(cells.question.tolist()))
    return Scores(columns, clusters, (who, "question"), cells.weight)


def _answer_scores(prediction: SurveyPrediction, marginal: Mapping[str, np.ndarray], person: np.ndarray) -> Scores:
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


def _metrics(
    cells: DistributionCells,
    tables: Mapping[str, Scores],
    of_answers: bool,
    min_group_size: int,
    options: Mapping[str, int],
) -> dict[str, Any]:
    noisy = f"against the answers of at least {min_group_size} people per cell, whose sampling noise counts as error"
    metrics = {}
    for name, formula in FORMULAS.items():
        if name == "emd_population" and "answers" not in tables:
            continue  # cells without people
        table = next((table for table in formula.tables if table in tables), None)
        found = measure(name, tables, **options)
        if found is None:
            if name != "position_bias":
                note = NO_MARGINAL if any("marginal" in column for column in formula.columns) else "no cells"
                note = note if table else f"no question was answered by {min_group_size} people of one group"
                note = "every question has an option of several tokens" if name == "outside" and table else note
                metrics[name] = metric(Estimate(None, None, None, 0, note), "")
            continue
        estimate, unit = found
        if name == "collapse_index":
            estimate = _collapse_index(cells, options)
        entry = metric(estimate, unit)
        if table == "cells" and of_answers and name in ("emd", "kl", "kl_explained", "spread_ratio"):
            entry["note"] = "; ".join(filter(None, [entry.get("note"), noisy]))
        known = [np.isfinite(tables[table].columns[each]) for each in formula.columns if each.endswith("_marginal")]
        if known and not known[0].all():
            entry["note"] = f"over the {known[0].sum():,} of {len(known[0]):,} cells with training answers"
        if f"{name}_marginal" in tables[table].columns and formula.function is None:
            entry["marginal"] = _marginal_value(tables[table], name, weighted=table == "answers" or formula.weighted)
        metrics[name] = entry
    return metrics


def _marginal_value(scores: Scores, name: str, weighted: bool) -> float | None:
    values = scores.columns[f"{name}_marginal"]
    rows = np.isfinite(values)
    weights = scores.weights[rows] if weighted else None
    # Of other rows than the model's value it would be no comparison.
    return float(np.average(values[rows], weights=weights)) if rows.all() else None


def _collapse_index(cells: DistributionCells, options: Mapping[str, int]) -> Estimate:
    known = np.isfinite(cells.marginal).all(1)
    clusters = crossed_clusters([cells.cluster[known], number_labels(cells.question[known].tolist())])
    parts = (cells.truth[known], cells.predicted[known], cells.marginal[known], cells.num_options[known])
    return collapse_index(*parts, clusters, **options)


def _answer_metrics(prediction: SurveyPrediction, person: np.ndarray, options: Mapping[str, int]) -> dict[str, Any]:
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
    question = np.arange(len(starts))
    metrics = {
        name: metric(resampled_mean(np.array(values), [question, question], **options), "question")
        for name, values in by_question.items()
    }
    # F1 = 2 hits / (chosen + predicted) of each option, from every person's sums.
    kinds = [(truth == predicted) & (truth == option) for option in range(prediction.predicted.shape[1])]
    counts = [(truth == option).astype(float) + (predicted == option) for option in range(len(kinds))]
    sums = np.stack([np.bincount(person, weight * column) for column in (*kinds, *counts)], 1)

    def pooled(*means: Any) -> Any:
        hits, either = np.array(means[: len(kinds)]), np.array(means[len(kinds) :])
        return np.nanmean(np.where(either > 0, 2 * hits / np.where(either > 0, either, 1), np.nan), axis=0)

    estimate = bootstrap_interval(sums, [np.arange(len(sums))], pooled, **options)
    return metrics | {"macro_f1_pooled": metric(estimate, "person")}


def _macro_accuracy(
    answers: Scores, prediction: SurveyPrediction, country: Sequence[str | None], options: Mapping[str, int]
) -> dict[str, Any]:
    names = [country[cell] for cell in prediction.answer_cell.tolist()]
    code = np.array([-1 if name is None else number for name, number in zip(names, number_labels(names), strict=True)])
    totals = np.bincount(code + 1, answers.weights)[1:]
    right = np.bincount(code + 1, answers.weights * answers.columns["accuracy"])[1:]
    values = right[totals > 0] / totals[totals > 0]
    label = np.arange(len(values))
    return metric(resampled_mean(values, [label, label], **options), "country")


def _groups(
    names: np.ndarray,
    cells: DistributionCells,
    answers: Scores | None,
    prediction: SurveyPrediction,
    person: np.ndarray,
    min_group_size: int,
    options: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A field's groups, the worst first."""
    asked = number_labels(cells.question.tolist())
    distance = emd(cells.truth, cells.predicted, cells.num_options) if len(cells) else np.zeros(0)
    right = expected_accuracy(cells.truth, cells.predicted) if len(cells) else np.zeros(0)
    accuracies = {}
    of_answers = names[prediction.answer_cell]
    if answers is not None:
        accuracies = scores_by_group(
            answers.columns["accuracy"],
            of_answers.tolist(),
            person,
            weights=answers.weights,
            min_people=min_group_size,
            **options,
        )
    entries = []
    for name in sorted({name for name in names if name is not None}):
        rows = np.flatnonzero(cells.group == name)
        entry: dict[str, Any] = {"group": name, "n": len(rows)}
        if answers is not None:
            own = np.flatnonzero(of_answers == name)
            entry |= {"n": len(own), "people": len(np.unique(person[own]))}
        if name in accuracies:
            entry["accuracy"] = metric(accuracies[name], "person")
        elif answers is None:
            entry["accuracy"] = metric(resampled_mean(right[rows], [asked[rows]] * 2, **options), "question")
        entry["emd"] = metric(resampled_mean(distance[rows], [asked[rows]] * 2, **options), "question")
        entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.get("accuracy") or {}).get("value") or 0.0)


def _stereotyping(cells: DistributionCells, options: Mapping[str, int]) -> dict[str, Any]:
    question = number_labels(cells.question.tolist())
    names, count = np.unique(cells.group[cells.group != None].astype(str), return_counts=True)  # noqa: E711
    largest = set(names[np.argsort(-count, kind="stable")[:MAX_STEREOTYPE_GROUPS]].tolist())
    table = stereotyping_table(
        cells.truth,
        cells.predicted,
        cells.num_options,
        question,
        crossed_clusters([cells.cluster, question]),
        group=[name if name in largest else None for name in cells.group.tolist()],
        **options,
    )
    groups = {name: _written(row) for name, row in table.pop("groups").items()}
    return {name: row and _written(row) for name, row in table.items()} | {"groups": groups}


def _written(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: vars(value) if isinstance(value, Estimate) else value for key, value in row.items()}

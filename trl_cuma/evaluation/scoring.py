# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From predictions to the evaluation's document: metrics with intervals, groups, and what the figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.people import MIN_COUNT, OTHER
from .answer_metrics import answer_metrics, answer_scores, macro_accuracy
from .cell_scores import FORMULAS, GROUP, Scores, add_note, measure
from .checked_prediction import same_options, weighted_answers
from .figure_data import calibration_bins, collapse_points, distribution_panels
from .group_cells import (
    DistributionCells,
    cells_of_answers,
    cells_of_truth,
    group_names,
    number_people,
    shown_groups,
)
from .metrics.cells import emd, entropy, expected_accuracy, kl, nll
from .metrics.groups import inequity_table, scores_by_group
from .metrics.intervals import Estimate
from .metrics.pooled import profile_information, true_information
from .metrics.stereotypes import stereotyping_table
from .prediction import SurveyPrediction
from .resampling import crossed_clusters, metric, number_labels, resampled_mean

MIN_INEQUITY_PEOPLE = 100
MAX_STEREOTYPE_GROUPS = 30
MIN_SAMPLED_GROUPS = 10
"""Groups of people that are resampled; fewer are taken as they are."""
NO_INTERVAL = "no interval: it would have to resample the people behind the cells"
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
    of at least `min_group_size` people, with the groups of the first field of `group_by` that has two with a cell.
    Accuracy and log-loss are those of the answers where there are any.

    Answers of weight 0 are left out. Shares of few answers have too little entropy and differ too much: divergences
    and entropies of (question, group) cells are less the noise to be expected, EMD isn't.

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
        `ValueError`: `group_by` names a field that no profile has, or no answer has a weight above 0.
    """
    options = {"num_samples": num_samples, "seed": seed}
    prediction, unweighted = weighted_answers(prediction)
    prediction, marginal, changed = same_options(prediction, marginal)
    fields = grouping_fields(prediction, group_by)
    person = number_people(prediction)
    groups = group_names(fields, prediction, person, min_group_size)

    def cells_by(field: str | None) -> DistributionCells:
        names = groups[field] if field else np.full(len(prediction.profile), "all", dtype=object)
        if prediction.truth is not None:
            return cells_of_truth(prediction, marginal, names)
        return cells_of_answers(prediction, marginal, names, person, min_group_size)

    of_answers = prediction.truth is None
    by = fields[0] if fields else None
    cells = cells_by(by)
    if of_answers and len(np.unique(cells.cluster)) < 2:
        # A single group, as where no country has enough people, differs from nobody.
        for field in fields[1:]:
            other = cells_by(field)
            if len(np.unique(other.cluster)) > 1:
                by, cells = field, other
                break
    # Both sexes, say, are all that there are: no sample of groups.
    fixed = of_answers and len(np.unique(cells.cluster)) < MIN_SAMPLED_GROUPS
    tables = {}
    if len(cells):
        own = [by] if of_answers else grouping_fields(prediction, None)
        tables["cells"] = _cell_scores(cells, own[0] if len(own) == 1 and own[0] else "profile", fixed)
    if len(prediction.answer_cell):
        tables["answers"] = answer_scores(prediction, marginal, person)

    document: dict[str, Any] = {"counts": _counts(prediction, person)}
    without = int((prediction.answer_person == "").sum())
    noted = {"answers without a person": without, "answers of weight 0": unweighted}
    document["counts"] |= {name: number for name, number in noted.items() if number}
    document["metrics"] = _metrics(cells, tables, of_answers, fixed, min_group_size, options)
    if changed:
        note = f"{changed} questions have other options in the training answers: no marginal"
        for name, entry in document["metrics"].items():
            if name == "kl_explained" or "marginal" in entry:
                add_note(entry, note)
    if "answers" in tables:
        if without:
            note = f"{without:,} answers without a person: those of one profile count as one person's"
            for name in ("accuracy", "nll"):
                add_note(document["metrics"][name], note)
        document["metrics"] |= answer_metrics(prediction, person, options)
        if "country" in fields:
            country = [prediction.demographic[index].get("country") for index in prediction.profile.tolist()]
            document["metrics"]["country_macro_accuracy"] = macro_accuracy(prediction, country, options)
    document["groups"] = {
        field: _groups(
            groups[field], cells_by(field), tables.get("answers"), prediction, person, min_group_size, options
        )
        for field in fields
    }
    if "answers" in tables:
        _number_groups(tables["answers"], {field: names[prediction.answer_cell] for field, names in groups.items()})
    elif "cells" in tables:
        _number_groups(tables["cells"], groups)
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
        for field, names in groups.items():
            if OTHER in names:
                add_note(document["inequity"][field], "raw: small groups count as one, unlike in published values")
    if len(cells):
        document["stereotyping"] = _stereotyping(cells, tables["cells"].clusters, options)
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
        **({"unknown_values": prediction.unknown_values} if prediction.unknown_values else {}),
    }


def _cell_scores(cells: DistributionCells, who: str, fixed: bool) -> Scores:
    question = number_labels(cells.question.tolist())
    known = np.isfinite(cells.marginal).all(1)
    part = (cells.truth[known], cells.marginal[known], cells.num_options[known])

    def of_marginal(values: np.ndarray) -> np.ndarray:
        column = np.full(len(cells), np.nan)
        column[known] = values
        return column

    columns = {
        "emd": emd(cells.truth, cells.predicted, cells.num_options),
        "emd_marginal": of_marginal(emd(*part)),
        "kl": kl(cells.truth, cells.predicted, cells.num_options) - cells.noise,
        "kl_marginal": of_marginal(kl(*part) - cells.noise[known]),
        "nll": nll(cells.truth, cells.predicted, cells.num_options),
        "nll_marginal": of_marginal(nll(*part)),
        "accuracy": expected_accuracy(cells.truth, cells.predicted),
        "accuracy_marginal": of_marginal(expected_accuracy(*part[:2])),
        "entropy": entropy(cells.predicted),
        "entropy_true": entropy(cells.truth) + cells.noise,
        "entropy_marginal": of_marginal(entropy(part[1])),
        "between": profile_information(cells.predicted, cells.num_options, cells.question),
        "between_true": true_information(cells.truth, cells.num_options, cells.question, cells.noise),
        "noise": cells.noise,
        "outside": cells.outside,
        "position_bias": cells.position_bias,
    }
    # Of a few groups only the people are a sample, and no cell is a person's: there is nothing to resample.
    cluster = np.zeros_like(question)
    clusters = (cluster, cluster) if fixed else (number_labels(cells.cluster.tolist()), question)
    return Scores(columns, clusters, (who, "question"), cells.weight)


def _number_groups(scores: Scores, groups: Mapping[str, np.ndarray]) -> None:
    """Put in each row's group of each field, as its place among the names in order; `nan` for none."""
    for field, names in groups.items():
        shown = shown_groups(names)
        place = {name: float(number) for number, name in enumerate(shown)}
        scores.columns[f"{GROUP}{field}"] = np.array([place.get(name, np.nan) for name in names])


def _metrics(
    cells: DistributionCells,
    tables: Mapping[str, Scores],
    of_answers: bool,
    fixed: bool,
    min_group_size: int,
    options: Mapping[str, int],
) -> dict[str, Any]:
    noisy = f"against the answers of at least {min_group_size} people per cell, whose sampling noise counts as error"
    less_noise = f"against the answers of at least {min_group_size} people per cell, less the expected noise of these"
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
        if table == "cells" and fixed:
            estimate = replace(estimate, n=len(cells), note=estimate.note if estimate.value is None else None)
            unit = "cell"
        entry = metric(estimate, unit)
        if table == "cells" and of_answers:
            if name in ("emd", "emd_population"):
                add_note(entry, noisy)
            if name in ("kl", "kl_explained", "spread_ratio", "collapse_index"):
                add_note(entry, less_noise)
            if name == "kl" and estimate.value is not None and estimate.value < 0:
                add_note(entry, "below 0 is as near as the noise can tell")
            if fixed:
                groups = f"{len(np.unique(cells.cluster))} groups of {tables[table].units[0]}"
                add_note(entry, f"for these {groups}; {NO_INTERVAL}, unlike that of accuracy and log-loss")
        known = [np.isfinite(tables[table].columns[each]) for each in formula.columns if each.endswith("_marginal")]
        if known and not known[0].all():
            add_note(entry, f"over the {known[0].sum():,} of {len(known[0]):,} cells with training answers")
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
    for number, name in enumerate(shown_groups(names)):
        rows = np.flatnonzero(cells.group == name)
        entry: dict[str, Any] = {"group": name, "number": number, "n": len(rows)}
        if answers is not None:
            own = np.flatnonzero(of_answers == name)
            if not len(own):
                continue
            entry |= {"n": len(own), "people": len(np.unique(person[own]))}
        if name in accuracies:
            entry["accuracy"] = metric(accuracies[name], "person")
        elif answers is None:
            entry["accuracy"] = metric(resampled_mean(right[rows], [asked[rows]] * 2, **options), "question")
        found = resampled_mean(distance[rows], [asked[rows]] * 2, **options)
        if answers is not None and found.value is not None:
            found = Estimate(found.value, None, None, found.n, NO_INTERVAL)
        entry["emd"] = metric(found, "question")
        entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.get("accuracy") or {}).get("value") or 0.0)


def _stereotyping(
    cells: DistributionCells, clusters: tuple[np.ndarray, np.ndarray], options: Mapping[str, int]
) -> dict[str, Any]:
    names, count = np.unique(cells.group[cells.group != None].astype(str), return_counts=True)  # noqa: E711
    largest = set(names[np.argsort(-count, kind="stable")[:MAX_STEREOTYPE_GROUPS]].tolist())
    table = stereotyping_table(
        cells.truth,
        cells.predicted,
        cells.num_options,
        cells.question,
        crossed_clusters(clusters),
        group=[name if name in largest else None for name in cells.group.tolist()],
        noise=cells.noise,
        **options,
    )
    groups = {name: _written(row, cells.noise.any()) for name, row in table.pop("groups").items()}
    return {name: row and _written(row) for name, row in table.items()} | {"groups": groups}


def _written(row: Mapping[str, Any], of_people: bool = False) -> dict[str, Any]:
    """A row of the table; of one group's people without intervals, which would resample the questions alone."""
    hidden = dict.fromkeys(("low", "high")) if of_people else {}
    return {key: vars(value) | hidden if isinstance(value, Estimate) else value for key, value in row.items()}

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Cells with a distribution to be held against: as they are known, or of the answers of a whole group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapter.routing import reportable_groups
from ..data.people import OTHER
from .metrics.pooled import entropy_bias
from .prediction import SurveyPrediction
from .resampling import number_labels


@dataclass(frozen=True, eq=False)
class DistributionCells:
    """
    Predicted and observed distributions, in the order of the scale.

    Args:
        question (`np.ndarray` of shape `(cells,)`): Ids.
        cluster (`np.ndarray` of shape `(cells,)`): Number of each cell's profile or group.
        group (`np.ndarray` of shape `(cells,)`): Name of the group that a cell is shown under, or `None`.
        num_options (`np.ndarray` of shape `(cells,)`): Options of each cell's question.
        truth, predicted, marginal (`np.ndarray` of shape `(cells, max_options)`): Distributions; `marginal` is `nan`
            where there are no training answers to the question.
        weight (`np.ndarray` of shape `(cells,)`): Answers of each cell, by survey weights; 1 where there are none.
        outside, position_bias (`np.ndarray` of shape `(cells,)`): See [`SurveyPrediction`]; `nan` where not known.
        noise (`np.ndarray` of shape `(cells,)`): Nats by which the entropy of `truth` is too low as it is the shares
            of few answers, see [`entropy_bias`]; 0 where the truth is known.
    """

    question: np.ndarray
    cluster: np.ndarray
    group: np.ndarray
    num_options: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    marginal: np.ndarray
    weight: np.ndarray
    outside: np.ndarray
    position_bias: np.ndarray
    noise: np.ndarray

    def __len__(self) -> int:
        return len(self.question)


def number_people(prediction: SurveyPrediction) -> np.ndarray:
    """
    A number for each answer's person, `(answers,)`. Answers of unknown people with the same profile count as one
    person's, and as a known person's where there is one of that profile: as ten answers may be of one person, counting
    them as ten would name a group of one.
    """
    names, profiles = prediction.answer_person.tolist(), prediction.profile[prediction.answer_cell].tolist()
    known: dict[int, str] = {}
    for name, profile in zip(names, profiles, strict=True):
        if name:
            known.setdefault(profile, name)
    return number_labels(
        name or known.get(profile, -1 - profile) for name, profile in zip(names, profiles, strict=True)
    )


def group_names(
    fields: Sequence[str], prediction: SurveyPrediction, person: np.ndarray, min_size: int
) -> dict[str, np.ndarray]:
    """
    The groups under which each cell is shown. Cells that nobody in particular answered (of countries, or simulated)
    are shown by their values. Else a value needs `min_size` people; what has fewer is "Other" together with the
    unknown, and nothing is shown that tells of fewer by subtraction: not from everybody, nor of the groups of another
    field (a continent less its only large country). The fields that come first keep more of their groups.

    Args:
        fields (`Sequence[str]`): Of the profiles.
        prediction (`SurveyPrediction`): Whose cells and answers.
        person (`np.ndarray` of shape `(answers,)`): Each answer's person.
        min_size (`int`): People.

    Returns:
        `dict[str, np.ndarray]`: By field the names, of shape `(cells,)`; `None` for the unknown where nobody is asked,
        and for everybody where no value has enough people.
    """
    result, shown_before = {}, []
    everybody = set(person.tolist())
    for field in fields:
        values = [prediction.demographic[index].get(field) for index in prediction.profile.tolist()]
        if not len(prediction.answer_cell):
            result[field] = np.array(values, dtype=object)
            continue
        members: dict[str, set[int]] = {}
        for cell, who in zip(prediction.answer_cell.tolist(), person.tolist(), strict=True):
            if values[cell] is not None:
                members.setdefault(values[cell], set()).add(who)
        members.pop(OTHER, None)
        while True:
            shown = reportable_groups(members, everybody, min_size)
            groups = {name: members[name] for name in shown}
            if shown and (rest := everybody.difference(*groups.values())):
                groups[OTHER] = rest
            told = next((name for before in shown_before for name in _telling(groups, before, min_size)), None)
            if told is None:
                break
            members.pop(told if told != OTHER else min(shown, key=lambda name: (len(members[name]), name)))
        shown_before.append(groups)
        result[field] = np.array([(value if value in shown else OTHER) if shown else None for value in values], object)
    return result


def shown_groups(names: np.ndarray) -> list[str]:
    """The groups of one field of [`group_names`], in the order in which they are numbered."""
    return sorted({name for name in names if name is not None})


def _telling(groups: Mapping[str, set[int]], before: Mapping[str, set[int]], min_size: int) -> list[str]:
    """Those of `groups` that tell of fewer than `min_size` people by subtraction from, or of, another field's."""
    found = []
    for whole in before.values():
        inside = [name for name, people in groups.items() if people <= whole]
        if inside and 0 < len(whole.difference(*(groups[name] for name in inside))) < min_size:
            found.append(min(inside, key=lambda name: (len(groups[name]), name)))
    for name, whole in groups.items():
        inside = [people for people in before.values() if people <= whole]
        if inside and 0 < len(whole.difference(*inside)) < min_size:
            found.append(name)
    return found


def cells_of_truth(
    prediction: SurveyPrediction, marginal: Mapping[str, np.ndarray], group: np.ndarray
) -> DistributionCells:
    """The cells as they are, each with its known truth."""
    assert prediction.truth is not None
    answered = np.bincount(prediction.answer_cell, prediction.answer_weight, minlength=len(prediction.profile))
    return DistributionCells(
        question=prediction.question_id,
        cluster=prediction.profile,
        group=group,
        num_options=prediction.num_options,
        truth=prediction.truth,
        predicted=prediction.predicted,
        marginal=_marginals(prediction.question_id, marginal, prediction.predicted.shape[1]),
        weight=answered if answered.any() else np.ones(len(answered)),
        outside=prediction.outside,
        position_bias=value_or_nan(prediction.position_bias, len(answered)),
        noise=np.zeros(len(answered)),
    )


def cells_of_answers(
    prediction: SurveyPrediction,
    marginal: Mapping[str, np.ndarray],
    group: np.ndarray,
    person: np.ndarray,
    min_size: int,
) -> DistributionCells:
    """
    (question, group) cells: the weighted shares of the group's answers, and the mean prediction for who gave them.

    Args:
        prediction (`SurveyPrediction`): Predictions for single profiles.
        marginal (`Mapping[str, np.ndarray]`): Question → distribution of the training answers.
        group (`np.ndarray` of shape `(cells,)`): Each cell's group, or `None`: left out.
        person (`np.ndarray` of shape `(answers,)`): Each answer's person.
        min_size (`int`): Cells of fewer people are left out: their shares are mostly chance.
    """
    of_answer = prediction.answer_cell
    known = np.array([name is not None for name in group], dtype=bool)[of_answer]
    rows, of_answer = np.flatnonzero(known), of_answer[known]
    names, code = np.unique(group[of_answer].astype(str), return_inverse=True)
    questions, asked = np.unique(prediction.question_id[of_answer], return_inverse=True)
    pairs, cell = np.unique(np.stack([asked.reshape(-1), code.reshape(-1)], 1), axis=0, return_inverse=True)
    cell, weight = cell.reshape(-1), prediction.answer_weight[rows]
    people = np.unique(np.stack([cell, person[rows]], 1), axis=0)[:, 0]
    kept = np.bincount(people, minlength=len(pairs)) >= min_size
    total = np.bincount(cell, weight, minlength=len(pairs))

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(pairs), *values.shape[1:]))
        np.add.at(sums, cell, values * weight.reshape(-1, *[1] * (values.ndim - 1)))
        return (sums / total.reshape(-1, *[1] * (values.ndim - 1)))[kept]

    num_options = np.zeros(len(pairs), dtype=np.int64)
    num_options[cell] = prediction.num_options[of_answer]
    width = prediction.predicted.shape[1]
    bias = value_or_nan(prediction.position_bias, len(prediction.profile))
    question = questions[pairs[kept, 0]]
    # As many answers of equal weight would have the same noise.
    effective = (total**2 / np.bincount(cell, weight**2, minlength=len(pairs)))[kept]
    truth = mean(np.eye(width)[prediction.answer_choice[rows]])
    return DistributionCells(
        question=question,
        cluster=pairs[kept, 1],
        group=names[pairs[kept, 1]].astype(object),
        num_options=num_options[kept],
        truth=truth,
        predicted=mean(prediction.predicted[of_answer]),
        marginal=_marginals(question, marginal, width),
        weight=total[kept],
        outside=mean(prediction.outside[of_answer]),
        position_bias=mean(bias[of_answer]),
        noise=entropy_bias(truth, effective),
    )


def _marginals(question: np.ndarray, marginal: Mapping[str, np.ndarray], width: int) -> np.ndarray:
    unknown = np.full(width, np.nan)
    padded = {name: np.pad(probs, (0, width - len(probs))) for name, probs in marginal.items() if len(probs) <= width}
    return np.array([padded.get(name, unknown) for name in question.tolist()]).reshape(-1, width)


def value_or_nan(values: np.ndarray | None, length: int) -> np.ndarray:
    """The values, or as many `nan`."""
    return np.full(length, np.nan) if values is None else values

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Predictions as they can be scored: every answer counts, and every question has its own number of options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .prediction import SurveyPrediction


def weighted_answers(prediction: SurveyPrediction) -> tuple[SurveyPrediction, int]:
    """Without the answers of weight 0, which stand for nobody; and how many those were."""
    kept = prediction.answer_weight > 0
    if len(kept) and not kept.any():
        raise ValueError("`weight` is 0 in all rows: give some answer a weight above 0, or leave the column out.")
    names = ("answer_cell", "answer_choice", "answer_person", "answer_weight")
    return replace(prediction, **{name: getattr(prediction, name)[kept] for name in names}), int((~kept).sum())


def same_options(
    prediction: SurveyPrediction, marginal: Mapping[str, np.ndarray]
) -> tuple[SurveyPrediction, dict[str, np.ndarray], int]:
    """
    Questions that have a number of options each: an id that is used for several becomes one question per number. And
    the marginals with the options of their question; and for how many questions there is one with other options.
    """
    pairs = list(zip(prediction.question_id.tolist(), prediction.num_options.tolist(), strict=True))
    different = set(pairs)
    times = Counter(question for question, _ in different)
    names = {(q, count): q if times[q] == 1 else f"{q} ({count} options)" for q, count in different}
    there = {(q, count) for q, count in different if q in marginal}
    fitting = {names[q, count]: marginal[q] for q, count in there if len(marginal[q]) == count}
    if any(number > 1 for number in times.values()):
        prediction = replace(prediction, question_id=np.array([names[pair] for pair in pairs], dtype=str))
    return prediction, fitting, len(there) - len(fitting)

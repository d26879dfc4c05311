# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Prompts that no profile has a bearing on: a model that answers them by profile has learnt a stereotype."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.prompts import TEMPLATES, PromptFormat
from ..data.survey import OPTION_LETTERS, Question
from .metrics.stereotypes import neutral_divergence
from .prediction import SurveyPrediction
from .preference_rows import with_opening, without_opening
from .resampling import metric

MAX_PROFILES = 32
LOOKED_AT = 50  # rows, to see how their prompts are worded


def read_neutral_questions(path: str | os.PathLike[str]) -> list[Question]:
    """
    Read neutral prompts.

    Args:
        path (`str` or `PathLike`): A file of JSON lines with `question` and `options`.

    Raises:
        `ValueError`: A line is no such object, options are fewer than 2, repeated or too many, or there are none.
    """
    questions = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
            text, options = (row.get("question"), row.get("options")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}, line {number}: `question` must be a text.")
            if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
                raise ValueError(f"{path}, line {number}: `options` must be a list of texts.")
            if not 2 <= len(options) <= len(OPTION_LETTERS) or len(set(options)) < len(options):
                raise ValueError(
                    f"{path}, line {number}: `options` has {len(options)}, expected 2 to {len(OPTION_LETTERS)}, all "
                    "different."
                )
            questions.append(Question(f"neutral-{number}", text, tuple(options)))
    if not questions:
        raise ValueError(f"{path} holds no prompts. Give a JSON object with `question` and `options` on each line.")
    return questions


def neutral_rows(questions: list[Question], rows: Dataset, demographic_column: str, seed: int) -> Dataset:
    """
    Every question for the same profiles, worded as the evaluated rows are.

    Args:
        questions (`list[Question]`): What to ask.
        rows (`Dataset`): The evaluated rows, prompts worded as `trl-cuma prepare` words them; up to 32 of their
            different profiles are drawn.
        demographic_column (`str`): Their profiles: mappings of fields.
        seed (`int`): Of the draw.

    Raises:
        `ValueError`: The rows' profiles are no mappings, fewer than two differ, or prompts are worded in another way.
    """
    profiles: dict[str, dict[str, Any]] = {}
    for value in rows[demographic_column][:] if demographic_column in rows.column_names else ():
        if not isinstance(value, Mapping):
            raise ValueError(f"`--neutral` needs profiles of fields, and {demographic_column!r} holds something else.")
        if any(each is not None for each in value.values()):
            profiles.setdefault(json.dumps(value, sort_keys=True), dict(value))
    if len(profiles) < 2:
        raise ValueError("`--neutral` compares answers between profiles, and the rows hold fewer than two.")
    names = sorted(profiles)
    drawn = np.random.default_rng(seed).permutation(len(names))[:MAX_PROFILES]
    wording = _wording(rows, demographic_column)
    records = []
    for question in questions:
        for index in drawn:
            profile = profiles[names[index]]
            asked = [{"role": "user", "content": wording.question(question)}]
            options = list(question.options)
            records.append(
                {
                    "prompt": with_opening(asked, profile, wording, "survey"),
                    "options": options,
                    # What is right is not asked.
                    "distribution": [1 / len(options)] * len(options),
                    "demographic": profile,
                    "question_id": question.question_id,
                }
            )
    return Dataset.from_list(records)


def neutral_document(prediction: SurveyPrediction, *, num_samples: int, seed: int) -> dict[str, Any]:
    """The divergence between profiles with its interval over prompts, see [`neutral_divergence`]; and counts."""
    found = neutral_divergence(
        prediction.predicted, prediction.num_options, prediction.question_id, num_samples=num_samples, seed=seed
    )
    return {
        "divergence": metric(found, "prompt"),
        "prompts": len(np.unique(prediction.question_id)),
        "profiles": len(prediction.demographic),
        "bad_rows": {reason: len(rows) for reason, rows in prediction.bad_rows.items()},
    }


def _wording(rows: Dataset, demographic_column: str) -> PromptFormat:
    column = "messages" if "messages" in rows.column_names else "prompt"
    looked = rows.select(range(min(len(rows), LOOKED_AT)))
    pairs = list(zip(looked[column][:], looked[demographic_column][:], strict=True))
    for template in TEMPLATES:
        for place in ("system", "user", "none"):
            wording = PromptFormat(demographics=place, template=template)
            if all(without_opening(prompt, profile, wording, "survey") is not None for prompt, profile in pairs):
                return wording
    raise ValueError(
        "`--neutral` words its prompts as the rows do, and these are not worded as `trl-cuma prepare` words them."
    )

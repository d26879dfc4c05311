# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a model answers to a survey: the predicted option distribution of each (question, profile) cell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.survey import Cells, Survey, format_completion, format_prompt
from ..demographics import DemographicProfile, DemographicTable, FieldEncoder, TextEncoder
from ..demographics.profile import is_vector
from ..generation.batches import context_length
from ..generation.vectors import NOT_KNOWN, can_encode, demographic_table
from .option_orders import Order, ask, predict
from .prediction import SurveyPrediction
from .rows import REPEATED, AnswerBy, SurveyRows, read_rows, reordered_prompt

__all__ = ["SurveyPrediction", "predict_rows", "predict_survey"]

logger = logging.getLogger(__name__)

TOO_LONG = "the prompt with its longest option is longer than the model's context"


def predict_survey(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    survey: Survey,
    split: str,
    *,
    cells: Cells | None = None,
    prompt_profile: bool = False,
    encoder: FieldEncoder | TextEncoder | None = None,
    permutations: int = 0,
    max_batch_tokens: int = 8_192,
    show_progress: bool = True,
) -> SurveyPrediction:
    """
    Predict the cells of a survey's split, with its own prompts ([`~trl_cuma.data.survey.format_prompt`]).

    Under `accelerate launch` the work is divided over the processes, which must all call this.

    Args:
        model (`torch.nn.Module`): A causal language model: plain, a `PeftModel`, or with a CuMA adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        survey (`Survey`): Questions, profiles, cells and answers.
        split (`str`): A key of `survey.cells`. The answers are those of the split's people that fall into a cell.
        cells (`Cells`, *optional*): Some of the split's cells, by default all.
        prompt_profile (`bool`, defaults to `False`): Whether the prompt states the profile.
        encoder (*optional*): Makes the profiles' vectors in place of the adapter's own encoder.
        permutations (`int`, defaults to 0): In how many orders of its options each question is asked, see
            [`~trl_cuma.evaluation.option_orders.option_orders`]. 0: in its own alone.
        max_batch_tokens (`int`, defaults to 8192): Tokens of a batch, with its padding.
        show_progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        [`SurveyPrediction`]: One cell per cell of the survey, in their order.

    Raises:
        `ValueError`: There is no such split, it has no cells, or a profile is missing that the adapter needs.
    """
    show_progress = show_progress and PartialState().is_main_process
    if cells is None:
        if split not in survey.cells:
            raise ValueError(f"`split` is {split!r}, expected one of {list(survey.cells)}.")
        cells = survey.cells[split]
    if not len(cells):
        raise ValueError(f"The split {split!r} has no cells to predict.")
    used, profile = np.unique(cells.profile, return_inverse=True)
    demographic = [{name: survey.profiles[index].get(name) for name in survey.fields} for index in used]
    table = demographic_table(model, encoder)
    asked_of = np.stack([cells.question, profile.reshape(-1) if prompt_profile else np.zeros_like(cells.question)], 1)
    unique, prompt = np.unique(asked_of, axis=0, return_inverse=True)

    def words(number: int, order: Order) -> str:
        question = survey.questions[unique[number, 0]]
        question = replace(question, options=tuple(question.options[place] for place in order))
        return format_prompt(question, survey.profiles[used[unique[number, 1]]] if prompt_profile else None)

    asked = ask(
        tokenizer,
        [[format_completion(option) for option in range(survey.num_options[question])] for question in unique[:, 0]],
        words,
        permutations=permutations,
        by_letter=True,
        show_progress=show_progress,
    )
    predicted, outside, bias = predict(
        model,
        asked,
        prompt.reshape(-1),
        None if table is None else profile.reshape(-1),
        demographic_embeds=None if table is None else table(demographic),
        max_batch_tokens=max_batch_tokens,
        description="Predicting answers" if show_progress else None,
    )
    number = {
        pair: cell for cell, pair in enumerate(zip(cells.question.tolist(), cells.profile.tolist(), strict=True))
    }
    answers = survey.answers.get(split)
    pairs = [] if answers is None else list(zip(answers.question.tolist(), answers.profile.tolist(), strict=True))
    within = np.array([row for row, pair in enumerate(pairs) if pair in number], dtype=np.int64)
    return SurveyPrediction(
        question_id=np.array([survey.questions[question].question_id for question in cells.question]),
        num_options=survey.num_options[cells.question],
        demographic=demographic,
        profile=profile.reshape(-1),
        predicted=_padded(predicted, cells.truth.shape[1]),
        outside=outside,
        truth=cells.truth,
        answer_cell=np.array([number[pairs[row]] for row in within], dtype=np.int64),
        answer_choice=answers.choice[within] if len(within) else within,
        answer_person=np.array([f"person-{answers.person[row]}" for row in within], dtype=str),
        answer_weight=np.ones(len(within)),
        position_bias=bias,
        unknown_values=_unknown_values(table, demographic),
    )


def predict_rows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    encoder: FieldEncoder | TextEncoder | None = None,
    answer_by: AnswerBy = "letter",
    demographic_column: str = "demographic",
    person_column: str = "person_id",
    permutations: int = 0,
    max_bad_share: float = 0.01,
    max_batch_tokens: int = 8_192,
    show_progress: bool = True,
) -> SurveyPrediction:
    """
    Predict the cells of a prepared data set: all rows of one question and one profile are a cell.

    Rows that can't be evaluated are left out, counted by reason, and reported with their numbers: in the result, and
    as a warning. Under `accelerate launch` the work is divided over the processes, which must all call this.

    Args:
        model, tokenizer, encoder, max_batch_tokens, show_progress: See [`predict_survey`].
        dataset (`Dataset`): What `trl-cuma prepare` wrote, or rows like it, see
            [`~trl_cuma.evaluation.rows.read_rows`]: people's answers to a survey, choices among candidates, or cells
            with a `distribution`.
        answer_by, demographic_column, person_column: See [`~trl_cuma.evaluation.rows.read_rows`].
        permutations (`int`, defaults to 0): In how many orders of its options each question is asked, see
            [`~trl_cuma.evaluation.option_orders.option_orders`]. The prompts must be worded as
            [`~trl_cuma.data.prompts.TEMPLATES`] word them. 0: in its own order alone.
        max_bad_share (`float`, defaults to 0.01): The share of bad rows from which on this is an error.

    Returns:
        [`SurveyPrediction`]: Cells in the order of their first rows. `truth` where rows hold distributions, else
        answers.

    Raises:
        `ValueError`: Columns are missing, too many rows are bad, none is left, or a prompt can't be asked in another
            order; the message names rows and reasons.
    """
    show_progress = show_progress and PartialState().is_main_process
    rows = read_rows(
        dataset,
        answer_by=answer_by,
        demographic_column=demographic_column,
        person_column=person_column,
        show_progress=show_progress,
    )
    table = demographic_table(model, encoder)
    if table is not None:
        if demographic_column not in dataset.column_names and table.missing == "error":
            raise ValueError(
                f"The adapter routes by profile, and the data set has no column {demographic_column!r}; it has "
                f"{dataset.column_names}. Name the column with `demographic_column`."
            )
        rows.drop(~can_encode(table, rows.profiles)[rows.profile], NOT_KNOWN)
    if rows.distribution:
        rows.drop(_seen_before(rows), REPEATED)
    _check_bad(rows, max_bad_share)

    def words(number: int, order: Order) -> Any:
        try:
            return reordered_prompt(rows.prompts[number], len(order), order)
        except ValueError as error:
            row = rows.row[np.flatnonzero(rows.prompt == number)[0]]
            raise ValueError(f"Row {row}: {error} Set `permutations=0` to ask in the given order.") from None

    used = np.unique(rows.prompt)  # not those of bad rows
    asked = ask(
        tokenizer,
        [rows.options[number] for number in used],
        lambda number, order: words(used[number], order),
        permutations=permutations,
        by_letter=answer_by == "letter",
        show_progress=show_progress,
    )
    limit = context_length(model)
    if limit is not None:
        rows.drop(asked.longest()[np.searchsorted(used, rows.prompt)] > limit, TOO_LONG)
    _check_bad(rows, max_bad_share)
    if rows.bad and PartialState().is_main_process:
        logger.warning(
            "%s of %s rows can't be evaluated:\n%s",
            f"{sum(map(len, rows.bad.values())):,}",
            f"{rows.num_rows:,}",
            rows.describe_bad(),
        )
    first, cell = _cells(rows)
    profiles, profile = np.unique(rows.profile[first], return_inverse=True)
    embeds = None if table is None else table([rows.profiles[index] for index in profiles])
    prompt = np.searchsorted(used, rows.prompt[first])
    predicted, outside, bias = predict(
        model,
        asked,
        prompt,
        None if embeds is None else profile.reshape(-1),
        demographic_embeds=embeds,
        max_batch_tokens=max_batch_tokens,
        description="Predicting answers" if show_progress else None,
    )
    truth = None
    if rows.distribution:
        truth = np.zeros_like(predicted)
        for number, row in enumerate(first):
            truth[number, : len(rows.distribution[row])] = rows.distribution[row]
    answered = np.flatnonzero(rows.choice >= 0)
    return SurveyPrediction(
        question_id=rows.question_id[first],
        num_options=asked.num_options[prompt],
        demographic=[_fields(rows.profiles[index]) for index in profiles],
        profile=profile.reshape(-1),
        predicted=predicted,
        outside=outside,
        truth=truth,
        answer_cell=cell[answered],
        answer_choice=rows.choice[answered],
        answer_person=rows.person_id[answered],
        answer_weight=rows.weight[answered],
        position_bias=bias,
        num_rows=rows.num_rows,
        bad_rows=rows.bad,
        unknown_values=_unknown_values(table, [rows.profiles[index] for index in profiles]),
    )


def _unknown_values(table: DemographicTable | None, profiles: Sequence[Any]) -> dict[str, int]:
    """See [`SurveyPrediction`]; also as a warning, for nobody trains on an unknown country on purpose."""
    if table is None or not isinstance(table.encoder, FieldEncoder):
        return {}
    found = table.encoder.count_unknown([profile for profile in profiles if not is_vector(profile)])
    if found and PartialState().is_main_process:
        logger.warning(
            "Profiles with a value that the adapter's encoder doesn't know, of %s: %s. They are answered as if the "
            "field were missing.",
            f"{len(profiles):,}",
            ", ".join(f"{name} {number:,}" for name, number in found.items()),
        )
    return found


def _cell_keys(rows: SurveyRows) -> np.ndarray:
    """`(rows, 3)`: question, profile and prompt of each row. A question worded in two ways is two cells."""
    question = np.unique(rows.question_id, return_inverse=True)[1].reshape(-1)
    return np.stack([question, rows.profile, rows.prompt], 1)


def _cells(rows: SurveyRows) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each cell, in the order of the rows, and the cell of each row."""
    _, first, cell = np.unique(_cell_keys(rows), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[cell.reshape(-1)]


def _seen_before(rows: SurveyRows) -> np.ndarray:
    first, _ = _cells(rows)
    return ~np.isin(np.arange(len(rows.row)), first)


def _check_bad(rows: SurveyRows, max_share: float) -> None:
    count = sum(map(len, rows.bad.values()))
    if not rows.num_rows:
        raise ValueError("The data set has no rows to evaluate.")
    if count > max_share * rows.num_rows or count == rows.num_rows:
        raise ValueError(
            f"{count:,} of {rows.num_rows:,} rows can't be evaluated, which is more than `max_bad_share={max_share}` "
            f"allows, or all of them:\n{rows.describe_bad()}"
        )


def _fields(profile: Any) -> dict[str, str | None]:
    if is_vector(profile):
        return {}
    assert isinstance(profile, DemographicProfile)
    if profile.text and not profile.fields:
        return {"demographic": profile.text}
    return dict.fromkeys(sorted(profile.names)) | dict(profile.fields)


def _padded(probs: np.ndarray, width: int) -> np.ndarray:
    return np.pad(probs, ((0, 0), (0, width - probs.shape[1])))

# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The rows of a prepared data set, read for evaluation: what is asked of whom, and what they chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.conversations import NUM_CHOICES
from ..data.prompts import read_letters
from ..data.survey import OPTION_LETTERS
from ..demographics import DemographicProfile
from ..demographics.encoder_state import name_rows
from ..demographics.profile import is_vector
from .option_orders import Order
from .option_tokens import Prompt, prompt_key

ROWS_PER_BATCH = 1000
SUM_TOLERANCE = 1e-3  # how far from 1 a distribution may sum: shares that were rounded

# Why a row can't be evaluated. None of it holds anything of the row.
NO_PROMPT = "the prompt is neither a text nor a conversation that ends before the answer"
NO_QUESTION = "no question_id"
NUM_OPTIONS = f"num_options is not 2 to {len(OPTION_LETTERS)}, or not the number of options"
NO_OPTION = "the completion is none of the options"
DISTRIBUTION = "the distribution is no distribution over the options"
REPEATED = "a second distribution of the same question and profile"
PROFILE = "the profile can't be read: it is no mapping of fields, text or vector"
WEIGHT = "the weight is not a number of at least 0"

SAME_OPTIONS = "an option has no text, or two have the same"

ARRAYS = {"prompt": np.int64, "profile": np.int64, "choice": np.int64, "weight": float}
ARRAYS |= {"question_id": str, "person_id": str}

AnswerBy = Literal["letter", "text"]


@dataclass
class SurveyRows:
    """
    Rows of a data set, and the reasons why others can't be evaluated.

    Attributes:
        prompts (`list`), options (`list[tuple[str, ...]]`): Unique prompts, and the completions of each.
        profiles (`list`): Unique profiles as [`DemographicProfile`], or vectors.
        row (`np.ndarray`): Number of each row in the data set.
        prompt, profile (`np.ndarray`): Index of each row into `prompts` and `profiles`.
        question_id, person_id (`np.ndarray` of texts): `""` for a person who is not known.
        choice (`np.ndarray`): Option that was chosen, -1 for a row with a distribution.
        weight (`np.ndarray`): Survey weight, 1 where there is none.
        distribution (`list`): Of each row; empty where rows are people's answers.
        bad (`dict[str, list[int]]`): Reason → numbers of the rows.
        num_rows (`int`): All rows, the bad ones too.
    """

    prompts: list[Prompt] = field(default_factory=list)
    options: list[tuple[str, ...]] = field(default_factory=list)
    profiles: list[Any] = field(default_factory=list)
    row: np.ndarray = field(init=False)
    prompt: np.ndarray = field(init=False)
    profile: np.ndarray = field(init=False)
    question_id: np.ndarray = field(init=False)
    person_id: np.ndarray = field(init=False)
    choice: np.ndarray = field(init=False)
    weight: np.ndarray = field(init=False)
    distribution: list[list[float]] = field(default_factory=list)
    bad: dict[str, list[int]] = field(default_factory=dict)
    num_rows: int = 0

    def drop(self, wrong: np.ndarray, reason: str) -> None:
        """Count the marked rows, `(rows,)`, as bad for this reason, and take them out."""
        if not wrong.any():
            return
        self.bad.setdefault(reason, []).extend(self.row[wrong].tolist())
        if self.distribution:
            self.distribution = [each for each, gone in zip(self.distribution, wrong, strict=True) if not gone]
        for name in ("row", *ARRAYS):
            setattr(self, name, getattr(self, name)[~wrong])

    def describe_bad(self) -> str:
        """One line per reason: how many rows, and the numbers of the first."""
        counts = sorted(self.bad.items(), key=lambda item: -len(item[1]))
        return "\n".join(f"- {len(rows):,}: {reason} ({name_rows(sorted(rows))})" for reason, rows in counts)


def read_rows(
    dataset: Dataset,
    *,
    answer_by: AnswerBy = "letter",
    demographic_column: str = "demographic",
    person_column: str = "person_id",
    show_progress: bool = False,
) -> SurveyRows:
    """
    Read what `trl-cuma prepare` wrote, or rows like it.

    Args:
        dataset (`Dataset`): Rows with `prompt` and `completion`, or `prompt` and `chosen` (a preference, of which the
            chosen answer is taken), or `messages`, or `prompt` and `distribution`. Beside these `question_id`
            (or `conversation_id` and `turn`) and `num_options` (or `options`; a choice in a conversation has four
            candidates), and where there are any, the columns of profiles and people, and `weight`.
        answer_by (`str`, defaults to `"letter"`): What is answered: the `"letter"` of an option, or its `"text"` in
            the column `options`.
        demographic_column (`str`, defaults to `"demographic"`): Profiles: mappings of fields, texts or vectors.
        person_column (`str`, defaults to `"person_id"`): Who answered.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Raises:
        `ValueError`: Columns are missing.
    """
    columns = set(dataset.column_names)
    answer_column = _answer_column(columns)
    if answer_by not in ("letter", "text"):
        raise ValueError(f"`answer_by` is {answer_by!r}, expected 'letter' or 'text'.")
    if answer_by == "text" and "options" not in columns:
        raise ValueError("With `answer_by='text'` the data set needs a column 'options' with the options' texts.")
    if not columns & {"num_options", "options"} and not {"conversation_id", "turn"} <= columns:
        raise ValueError("The data set says nowhere how many options a question has: add 'num_options'.")
    if "question_id" not in columns and not {"conversation_id", "turn"} <= columns:
        raise ValueError(f"The data set has no 'question_id', which tells what is asked; it has {sorted(columns)}.")
    used = {"prompt", "messages", answer_column, "options", "num_options", "question_id", "conversation_id", "turn"}
    used = [name for name in dataset.column_names if name in used | {demographic_column, person_column, "weight"}]
    reader = _Reader(answer_column, answer_by, demographic_column, person_column)
    batches = dataset.with_format(None).select_columns(used).iter(ROWS_PER_BATCH)
    total = -(-len(dataset) // ROWS_PER_BATCH)
    for batch in tqdm(batches, "Reading rows", total, unit=f"×{ROWS_PER_BATCH} rows", disable=not show_progress):
        for values in zip(*batch.values(), strict=True):
            reader.read(dict(zip(batch, values, strict=True)))
    return reader.finish()


def reordered_prompt(prompt: Prompt, num_options: int, order: Order) -> Prompt:
    """
    A prompt with the options' texts in another order behind the letters.

    Raises:
        `ValueError`: The prompt can't be taken apart, see [`~trl_cuma.data.prompts.read_letters`].
    """
    if order == tuple(range(num_options)):
        return prompt
    if isinstance(prompt, str):
        return read_letters(prompt, num_options).reordered(order)
    *before, last = prompt
    return [*before, {**last, "content": read_letters(last["content"], num_options).reordered(order)}]


def _answer_column(columns: set[str]) -> str:
    """The column of the answers, or of the distributions that stand in their place."""
    if "messages" in columns:
        return "messages"
    answers = [name for name in ("distribution", "completion", "chosen") if name in columns]
    if "prompt" not in columns or not answers:
        raise ValueError(
            "A data set to evaluate has the columns 'prompt' and 'completion' (or 'chosen', or 'distribution'), or "
            f"'messages'; this one has {sorted(columns)}."
        )
    return answers[0]


class _BadRow(Exception):
    """Its text is the reason."""


class _Reader:
    def __init__(self, answer_column: str, answer_by: AnswerBy, demographic_column: str, person_column: str) -> None:
        self.answer_column, self.answer_by = answer_column, answer_by
        self.demographic_column, self.person_column = demographic_column, person_column
        self.rows = SurveyRows()
        self.kept: dict[str, list[Any]] = {name: [] for name in ("row", "distribution", *ARRAYS)}
        self.prompts: dict[Any, int] = {}
        self.profiles: dict[Any, int] = {}
        self.values: dict[Any, int] = {}  # of the column, several of which may read as one profile

    def read(self, row: Mapping[str, Any]) -> None:
        number = self.rows.num_rows
        self.rows.num_rows += 1
        try:
            columns = self._columns(row)
        except _BadRow as reason:
            self.rows.bad.setdefault(str(reason), []).append(number)
            return
        for name, value in columns.items():
            self.kept[name].append(value)
        self.kept["row"].append(number)

    def finish(self) -> SurveyRows:
        for name, kind in ARRAYS.items():
            setattr(self.rows, name, np.array(self.kept[name], dtype=kind))
        self.rows.row = np.array(self.kept["row"], dtype=np.int64)
        if self.answer_column == "distribution":
            self.rows.distribution = self.kept["distribution"]
        return self.rows

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, answer = self._prompt_and_answer(row)
        num_options = _num_options(row)
        options = self._options(row, prompt, answer, num_options)
        choice, distribution = -1, []
        if self.answer_column == "distribution":
            distribution = _distribution(row["distribution"], num_options)
        elif answer in options:
            choice = options.index(answer)
        else:
            raise _BadRow(NO_OPTION)
        person = row.get(self.person_column)
        columns = {
            "choice": choice,
            "distribution": distribution,
            "question_id": _question_id(row),
            "person_id": "" if person is None else str(person),
            "weight": _weight(row.get("weight")),
            "profile": self._profile(row.get(self.demographic_column)),
        }
        return columns | {"prompt": self._prompt(prompt, options)}

    def _prompt_and_answer(self, row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
        if self.answer_column == "messages":
            messages = row["messages"] or [{"role": None}]
            prompt, answer = messages[:-1], messages[-1:]
            if answer[0]["role"] != "assistant":
                raise _BadRow(NO_PROMPT)
        else:
            prompt, answer = row["prompt"], row[self.answer_column]
        if not prompt or (not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"):
            raise _BadRow(NO_PROMPT)
        if self.answer_column == "distribution":
            return prompt, None
        if isinstance(prompt, str):
            return prompt, answer
        return prompt, answer[0]["content"] if answer and len(answer) == 1 else None

    def _options(self, row: Mapping[str, Any], prompt: Prompt, answer: str | None, count: int) -> tuple[str, ...]:
        """The completions, with the blank before them that a text's answer has, or would have."""
        texts = row["options"] if self.answer_by == "text" else OPTION_LETTERS[:count]
        if len(set(texts)) < count or not all(texts):
            raise _BadRow(SAME_OPTIONS)
        blank = ""
        if isinstance(prompt, str) and answer is not None:
            blank = answer[: len(answer) - len(answer.lstrip())]
        elif isinstance(prompt, str):
            blank = "" if prompt[-1].isspace() else " "
        return tuple(blank + text for text in texts)

    def _prompt(self, prompt: Prompt, options: tuple[str, ...]) -> int:
        index = self.prompts.setdefault((prompt_key(prompt), options), len(self.prompts))
        if index == len(self.rows.prompts):
            self.rows.prompts.append(prompt)
            self.rows.options.append(options)
        return index

    def _profile(self, value: Any) -> int:
        try:
            key = tuple(value.items()) if isinstance(value, Mapping) else tuple(value) if is_vector(value) else value
            if key in self.values:
                return self.values[key]
            profile: Any = np.asarray(value, np.float32) if is_vector(value) else DemographicProfile.from_value(value)
        except (TypeError, ValueError):  # nested, or no profile; the message might hold a value
            raise _BadRow(PROFILE) from None
        same: Any = profile
        if is_vector(value):
            if profile.ndim != 1 or not np.isfinite(profile).all():
                raise _BadRow(PROFILE)
            same = profile.tobytes()
        index = self.values[key] = self.profiles.setdefault(same, len(self.profiles))
        if index == len(self.rows.profiles):
            self.rows.profiles.append(profile)
        return index


def _num_options(row: Mapping[str, Any]) -> int:
    counts = {row["num_options"]} if "num_options" in row else set()
    counts |= {len(row["options"] or [])} if "options" in row else set()
    (count, *more) = counts or {NUM_CHOICES}
    if more or type(count) is not int or not 2 <= count <= len(OPTION_LETTERS):
        raise _BadRow(NUM_OPTIONS)
    return count


def _question_id(row: Mapping[str, Any]) -> str:
    names = ("question_id",) if "question_id" in row else ("conversation_id", "turn")
    parts = [row[name] for name in names]
    if None in parts:
        raise _BadRow(NO_QUESTION)
    return "/".join(map(str, parts))


def _weight(value: Any) -> float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return 1.0
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _BadRow(WEIGHT)
    return float(value)


def _distribution(shares: Sequence[float | None] | None, num_options: int) -> list[float]:
    if shares is None or len(shares) != num_options or None in shares:
        raise _BadRow(DISTRIBUTION)
    total = math.fsum(shares)
    if min(shares) < 0 or not abs(total - 1) <= SUM_TOLERANCE:
        raise _BadRow(DISTRIBUTION)
    return [share / total for share in shares]

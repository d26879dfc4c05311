# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""GlobalOpinionQA in TRL's columns: answer shares of countries, or simulated answers drawn from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm.auto import tqdm

from .columns import joined, message_lists, profile_structs
from .conversion import MESSAGES, Conversion, check_task, row_features
from .duplicates import near_duplicate_groups
from .global_opinions_cells import CountryShares, country_shares
from .global_opinions_source import COUNTRY_ALIASES, read_source
from .keyed import keyed_digest
from .licenses import GLOBAL_OPINIONS
from .prompts import PromptFormat
from .report import Report
from .splits import DROPPED, SPLITS, SplitOptions, split_people, split_prompts, split_rows
from .survey import OPTION_LETTERS, draw_options

HUB_ID = "Anthropic/llm_global_opinions"
ROWS_PER_BATCH = 50_000
LAST_UNIT = {"distribution": "cells", "sft": "answers", "dpo": "pairs"}


def convert_global_opinions(
    source: str | os.PathLike[str] | Dataset | DatasetDict = HUB_ID,
    *,
    task: Literal["distribution", "sft", "dpo"] = "distribution",
    prompts: PromptFormat | None = None,
    splits: SplitOptions | None = None,
    answers_per_cell: int = 200,
    min_countries: int = 2,
) -> Conversion:
    """
    GlobalOpinionQA (Durmus et al., 2023; arXiv 2306.16388) in TRL's columns.

    The source holds no people but cells: how the people of one country answered one question, as shares of its
    options. `country` is the only profile field. Published country shares need no `min_count`.

    What is left out or changed, all of it counted in the report:

    - Options that are no answer ("DK/Refused", "No answer", "Missing; Unknown", …) go, and the other shares are
      divided by their sum. A cell of which nothing is left goes.
    - A question goes without a text, with fewer than 2 or more than 11 options left, or with two of the same text.
    - A cell goes whose shares are not one per option, lack a number, or are further from 1 in sum than rounding
      explains (0.05).
    - A "(Non-national sample)" is not how a country's people answered, and goes. An "(Old national sample)" is used
      where the question has no current one of that country. Both, and "(Current national sample)", are not part of a
      country's name.
    - Different names of one country are one name.
    - Questions of the same text and options are one question. Cells that repeat its country are averaged.
    - Questions that are left with fewer than `min_countries` countries go.

    Options keep the source's order. In the JSONL that is the order of the scale. The Hub's data doesn't promise it:
    don't use metrics that need an order (EMD, means) on it without checking.

    Args:
        source (`str`, `PathLike`, `Dataset` or `DatasetDict`, defaults to the id on the Hub): That data set on the
            Hub, a local copy of it (a `.csv` or `.parquet` file, a folder with one, or what `save_to_disk` wrote) or
            the loaded data set; or a `.jsonl` file of one object (`qid`, `question`, `country`, `options`, `dist`) per
            question and country.
        task (`str`, defaults to `"distribution"`): `"distribution"`: one row per cell, for evaluation or a loss on
            distributions. `"sft"`: answers drawn from each cell's distribution. `"dpo"`: these answers, each over
            another option, drawn uniformly.
        prompts (`PromptFormat`, *optional*): The wording.
        splits (`SplitOptions`, *optional*): Which questions and countries are held out; by default
            `split_by=("prompt",)`: questions. Here "person" stands for a cell, as its people are simulated for it
            alone: `split_by=("person",)` holds out cells of questions that other countries answer in training, and
            tests `holdout_countries` on all questions. Countries may have any of their names.
        answers_per_cell (`int`, defaults to `200`): Answers to draw per cell, for `"sft"` and `"dpo"`. They depend on
            `splits.seed`, question and country alone.
        min_countries (`int`, defaults to `2`): Questions of fewer countries are left out.

    Returns:
        [`Conversion`]: For `"distribution"` the columns `prompt`, `options`, `distribution`, `demographic`,
        `question_id`, `num_options`, `prompt_group`. Else the columns of the task, `demographic`, `person_id`,
        `question_id`, `num_options`, `prompt_group`; each answer has a person of its own, who is simulated and says so
        (`"simulated-000123"`).

    Raises:
        `ValueError`: An argument is out of its range; or, when the rows are read, something is malformed: the message
            names file, line or row, and column.
        `FileNotFoundError`: There is no such file.
    """
    prompts, splits = prompts or PromptFormat(), splits or SplitOptions(split_by=("prompt",))
    check_task(task, tuple(LAST_UNIT), prompts.messages)
    if splits.holdout_combinations:
        raise ValueError(
            f"`holdout_combinations` is {splits.holdout_combinations!r}, but GlobalOpinionQA's only field is "
            "`country`. Set `holdout_countries` instead."
        )
    for name, value in (("answers_per_cell", answers_per_cell), ("min_countries", min_countries)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, expected an integer of at least 1.")

    if isinstance(splits.holdout_countries, tuple):
        names = dict.fromkeys(COUNTRY_ALIASES.get(name, name) for name in splits.holdout_countries)
        splits = replace(splits, holdout_countries=tuple(names))

    provenance = {"question_id": Value("string"), "num_options": Value("int32"), "prompt_group": Value("string")}
    if task == "distribution":
        columns = {"prompt": MESSAGES, "options": List(Value("string")), "distribution": List(Value("float64"))}
        features = Features(columns | {"demographic": {"country": Value("string")}} | provenance)
    else:
        features = row_features(task, ["country"], provenance, prompts.messages)

    def batches(report: Report) -> Iterator[tuple[str, pa.Table]]:
        survey = country_shares(read_source(source), min_countries, report)
        groups = near_duplicate_groups([q.text for q in survey.questions], [q.question_id for q in survey.questions])
        code = _split(survey, groups, splits)
        dropped = int((code == DROPPED).sum())
        report.drop("cells", "of a held-out country and a question that is not for testing", dropped)
        in_a_split = len(np.unique(survey.question[code != DROPPED]))
        report.drop("questions", "no cell of theirs is in a split", len(survey.questions) - in_a_split)
        rows_per_cell = 1 if task == "distribution" else answers_per_cell
        if task != "distribution":
            report.read(LAST_UNIT[task], report.kept("cells") * rows_per_cell)
            report.note("people simulated, one per answer", report.kept("cells") * rows_per_cell)
        rows = _Rows(survey, groups, prompts, task, answers_per_cell, splits.seed)
        step = max(1, ROWS_PER_BATCH // rows_per_cell)
        for start in tqdm(range(0, len(code), step), unit=f" × {step} cells", disable=None):
            some = code[start : start + step]
            for split in np.unique(some[some != DROPPED]):
                columns = rows.columns(np.flatnonzero(some == split) + start)
                yield SPLITS[split], pa.table(columns).select(list(features)).cast(features.arrow_schema)

    return Conversion(features, batches, f"GlobalOpinionQA, {task}", splits.names, GLOBAL_OPINIONS)


def _split(survey: CountryShares, groups: list[str], splits: SplitOptions) -> np.ndarray:
    """The split of each cell: its question's, its own, and what its country allows."""
    # What one country answered to almost the same question stays together.
    country = np.array(survey.countries, dtype=object)[survey.country]
    names = [f"{groups[question]}\0{name}" for question, name in zip(survey.question, country, strict=True)]
    unique, first, cell = np.unique(names, return_index=True, return_inverse=True)
    people = pd.DataFrame({"country": country[first]}, index=unique, dtype=object)
    return split_rows(split_people(people, splits)[cell], split_prompts(groups, splits)[survey.question])


class _Rows:
    """Builds columns of rows from what is known per question, per country and per cell."""

    def __init__(
        self,
        survey: CountryShares,
        groups: list[str],
        prompts: PromptFormat,
        task: str,
        answers_per_cell: int,
        seed: int,
    ) -> None:
        self.survey, self.task, self.answers_per_cell, self.seed = survey, task, answers_per_cell, seed
        self.in_one_list = prompts.messages
        openings = [prompts.opening({"country": country}, "survey") for country in survey.countries]
        self.system = pa.array([opening.system for opening in openings], pa.string())
        self.prefix = pa.array([opening.prefix for opening in openings])
        self.ask = pa.array([prompts.question(question) for question in survey.questions])
        self.profile = profile_structs(pd.DataFrame({"country": survey.countries}, dtype=object))
        self.options = pa.array([question.options for question in survey.questions], pa.list_(pa.string()))
        self.question_id = pa.array([question.question_id for question in survey.questions])
        self.num_options = pa.array([len(question.options) for question in survey.questions], pa.int32())
        self.group = pa.array(groups)

    def columns(self, cells: np.ndarray) -> dict[str, pa.Array]:
        """All columns of all rows of some cells."""
        if self.task == "distribution":
            distribution = pa.array([self.survey.distribution[cell] for cell in cells], pa.list_(pa.float64()))
            question = pa.array(self.survey.question[cells])
            answer = {"options": self.options.take(question), "distribution": distribution}
            return self._shared(cells) | {"prompt": message_lists(*self._prompt(cells))} | answer
        answers = self.answers_per_cell
        drawn, other = (np.concatenate(part) for part in zip(*map(self._draw, cells), strict=True))
        chosen, rejected = (pa.array(list(OPTION_LETTERS)).take(pa.array(option)) for option in (drawn, other))
        row_cell = np.repeat(cells, answers)
        person = pa.array((cells[:, None] * answers + np.arange(answers)).ravel()).cast(pa.string())
        width = max(6, len(str(len(self.survey.distribution) * answers - 1)))
        person = pc.binary_join_element_wise("simulated-", pc.utf8_lpad(person, width, "0"), "")
        columns = self._shared(row_cell) | {"person_id": person}
        if self.in_one_list:
            return columns | {"messages": message_lists(*self._prompt(row_cell), ("assistant", chosen))}
        # A prompt is built once per cell and repeated.
        repeated = pa.array(np.repeat(np.arange(len(cells)), answers))
        columns["prompt"] = message_lists(*self._prompt(cells)).take(repeated)
        if self.task == "sft":
            return columns | {"completion": message_lists(("assistant", chosen))}
        return columns | {
            "chosen": message_lists(("assistant", chosen)),
            "rejected": message_lists(("assistant", rejected)),
        }

    def _shared(self, cells: np.ndarray) -> dict[str, pa.Array]:
        question, country = pa.array(self.survey.question[cells]), pa.array(self.survey.country[cells])
        return {
            "demographic": self.profile.take(country),
            "question_id": self.question_id.take(question),
            "num_options": self.num_options.take(question),
            "prompt_group": self.group.take(question),
        }

    def _prompt(self, cells: np.ndarray) -> tuple[tuple[str, pa.Array], tuple[str, pa.Array]]:
        question, country = pa.array(self.survey.question[cells]), pa.array(self.survey.country[cells])
        user = joined(self.prefix.take(country), self.ask.take(question))
        return ("system", self.system.take(country)), ("user", user)

    def _draw(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """A cell's answers, and beside each another option. From seed, question and country alone."""
        question = self.survey.questions[self.survey.question[cell]].question_id
        country = self.survey.countries[self.survey.country[cell]]
        key = keyed_digest(self.seed, "answers", question, country)
        rng = np.random.default_rng(int.from_bytes(key, "big"))
        distribution = np.array(self.survey.distribution[cell])
        drawn = draw_options(rng, np.broadcast_to(distribution, (self.answers_per_cell, len(distribution))))
        others = np.ones((self.answers_per_cell, len(distribution)))
        others[np.arange(self.answers_per_cell), drawn] = 0.0
        return drawn, draw_options(rng, others)
